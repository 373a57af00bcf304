//! The rank that a plan is about, and how it passes rows through products and collectives: `model/linear.rs` and the collectives
//! of `model/decoder.rs` in numbers.

use super::buckets::Buckets;
use super::tally::{Held, Operands, Part, Pass, Tally};
use crate::config::{Config, Precision};
use crate::dist::Mesh;
use crate::dist::wire::{FEW, Op};
use crate::model::Architecture;
use crate::model::sharding::{ParamId, Table};
use crate::train::{Layout, Method};

/// What carries tensors and collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Engine {
    /// Tensors are in host memory.
    pub host: bool,
    /// bf16 is added up as it is; else it is widened to f32 first.
    pub adds_bf16: bool,
    /// A collective has buffers of its own beside its input and output.
    pub copies: bool,
}

impl Engine {
    /// GPUs with NCCL.
    pub const GPU: Self = Self { host: false, adds_bf16: true, copies: false };
    /// CPUs with MPI.
    pub const HOST: Self = Self { host: true, adds_bf16: false, copies: true };
    /// CPUs whose other ranks are not there, see [`crate::dist::planned`].
    pub const ALONE: Self = Self { host: true, adds_bf16: true, copies: false };
}

/// One rank of a run.
pub struct Rank<'a> {
    pub config: &'a Config,
    pub arch: &'a Architecture,
    pub table: Table,
    pub layout: Layout,
    pub mesh: Mesh,
    pub method: &'a Method,
    pub engine: Engine,
    /// Share of what is trained that may change, where not all may.
    pub chosen: Option<f64>,
}

/// One batch on this rank.
pub struct Shape {
    /// Tokens, padding included, and what of them this rank holds between half blocks.
    pub tokens: u64,
    pub own: u64,
    /// First token and length of each sequence.
    pub spans: Vec<(i64, i64)>,
}

impl Rank<'_> {
    /// Bytes of a number that the model computes with.
    pub fn element(&self) -> u64 {
        if self.config.train.precision == Precision::Bf16 { 2 } else { 4 }
    }

    pub fn tp(&self) -> u64 {
        self.mesh.tp as u64
    }

    pub fn hidden(&self) -> u64 {
        self.arch.hidden as u64
    }

    pub fn spread(&self) -> bool {
        self.config.parallel.sequence_parallel
    }

    pub fn logits_bytes(&self) -> f64 {
        self.config.train.logits_mib * 1048576.0
    }

    /// `sequences`: lengths, in order.
    pub fn shape(&self, sequences: &[usize]) -> Shape {
        let filled: usize = sequences.iter().sum();
        let multiple = if self.spread() { self.mesh.tp } else { 1 };
        let tokens = crate::model::Batch::padded(filled, multiple) as u64;
        let mut start = 0;
        let spans = sequences.iter().map(|&len| {
            let span = (start, len as i64);
            start += len as i64;
            span
        });
        let spans = spans.collect();
        Shape { tokens, own: if self.spread() { tokens / self.tp() } else { tokens }, spans }
    }

    /// `y = x W^T` with adapters; the caller holds `y`.
    pub fn linear(&self, layer: usize, param: ParamId, tokens: u64, t: &mut Tally) {
        let (rows, columns) = self.size(param);
        t.product(Operands::Nt, tokens, columns, rows);
        for (rows, r) in self.adapters(layer, param) {
            t.brief(Part::Workspace, 2 * tokens * r * self.element());
            t.product(Operands::Nt, tokens, columns, r);
            t.product(Operands::Nt, tokens, r, rows);
        }
    }

    /// `dx = dy W` with adapters; the caller holds `dx`.
    pub fn linear_backward(&self, layer: usize, param: ParamId, tokens: u64, t: &mut Tally) {
        let (rows, columns) = self.size(param);
        t.product(Operands::Nn, tokens, rows, columns);
        for (rows, r) in self.adapters(layer, param) {
            t.brief(Part::Workspace, 2 * tokens * r * self.element());
            t.product(Operands::Nn, tokens, rows, r);
            t.product(Operands::Nn, tokens, r, columns);
        }
    }

    /// `dW += dy^T x` of the matrix and its adapters.
    pub fn linear_gradients(
        &self,
        layer: usize,
        param: ParamId,
        tokens: u64,
        buckets: &mut Option<&mut Buckets>,
        t: &mut Tally,
    ) {
        let Some(buckets) = buckets else { return };
        buckets.product(self, param, tokens, t);
        let (all_rows, columns) = self.size(param);
        let adapters = self.table.layers[layer].adapters.iter().filter(|adapter| adapter.of == param);
        let e = self.element();
        for (adapter, (rows, r)) in adapters.zip(self.adapters(layer, param)) {
            // rows of a wider matrix are copied out of it
            let copied = t.hold(Part::Workspace, if rows < all_rows { tokens * rows * e } else { 0 });
            let inner = t.hold(Part::Workspace, 2 * tokens * r * e);
            t.product(Operands::Nt, tokens, columns, r);
            buckets.product(self, adapter.b, tokens, t);
            t.free(copied);
            t.product(Operands::Nn, tokens, rows, r);
            buckets.product(self, adapter.a, tokens, t);
            t.free(inner);
        }
    }

    /// Rows and columns of a matrix on this rank.
    fn size(&self, param: ParamId) -> (u64, u64) {
        let shape = &self.table.params[param].shape;
        (shape[0] as u64, shape[1] as u64)
    }

    /// Rows and rank of each adapter of a matrix.
    fn adapters(&self, layer: usize, param: ParamId) -> impl Iterator<Item = (u64, u64)> + use<> {
        let all = self.table.layers[layer].adapters.iter().filter(|adapter| adapter.of == param);
        let sizes: Vec<(u64, u64)> = all.map(|adapter| self.size(adapter.b)).collect();
        sizes.into_iter()
    }

    /// A collective of one axis over so many numbers of `bytes` each.
    pub fn call(&self, axis: &'static str, op: Op, numbers: u64, bytes: u64, t: &mut Tally) {
        let ranks = self.ranks(axis);
        if ranks > 1 {
            t.call(axis, op, ranks, numbers * bytes, self.engine.host && numbers <= FEW as u64);
        }
    }

    pub fn ranks(&self, axis: &'static str) -> usize {
        if axis == "tp" { self.mesh.tp } else { self.mesh.dp }
    }

    /// All tokens' rows from this rank's part, which is given up.
    pub fn gather_tokens(&self, x: Held, s: &Shape, t: &mut Tally) -> Held {
        if !self.spread() || self.tp() == 1 {
            return x;
        }
        let whole = self.all_tokens(s, Part::Workspace, t);
        t.free(x);
        whole
    }

    /// A copy of all tokens' rows, with sequence parallelism; the part stays.
    pub fn all_tokens(&self, s: &Shape, part: Part, t: &mut Tally) -> Held {
        let (h, e) = (self.hidden(), self.element());
        if !self.spread() || self.tp() == 1 {
            return t.hold(part, 0);
        }
        let whole = t.hold(part, s.tokens * h * e);
        if self.engine.copies {
            t.brief(Part::Communication, s.own * h * e);
        }
        self.call("tp", Op::AllGather, s.tokens * h, e, t);
        whole
    }

    /// The sum over the ranks of all tokens' rows, or of this rank's part of them.
    pub fn reduce_tokens(&self, partial: Held, s: &Shape, t: &mut Tally) -> Held {
        if self.tp() == 1 {
            return partial;
        }
        let (h, e) = (self.hidden(), self.element());
        if !self.spread() {
            self.all_reduce("tp", s.tokens * h, e, t);
            return partial;
        }
        let wide = e == 2 && !self.engine.adds_bf16;
        let sent = if wide { 4 } else { e };
        let copy = t.hold(Part::Communication, if wide { s.tokens * h * 4 } else { 0 });
        let output = t.hold(Part::Workspace, s.own * h * sent);
        let parts = t.hold(Part::Communication, if self.engine.copies { s.tokens * h * sent } else { 0 });
        t.pass(Pass::Cast, if wide { (s.tokens + s.own) * h * (e + sent) } else { 0 });
        self.call("tp", Op::ReduceScatter, s.tokens * h, sent, t);
        t.free_all([parts, copy]);
        let own = if wide {
            let own = t.hold(Part::Workspace, s.own * h * e);
            t.free(output);
            own
        } else {
            output
        };
        t.free(partial);
        own
    }

    /// An all-reduce in place.
    pub fn all_reduce(&self, axis: &'static str, numbers: u64, element: u64, t: &mut Tally) {
        if self.ranks(axis) == 1 {
            return;
        }
        let wide = element == 2 && !self.engine.adds_bf16;
        let sent = if wide { 4 } else { element };
        let copies = u64::from(wide) + u64::from(self.engine.copies);
        let held = t.hold(Part::Communication, copies * numbers * sent);
        let own = (t.machine().reduce_share * (numbers * sent) as f64) as u64;
        t.brief(Part::Communication, own);
        t.pass(Pass::Cast, if wide { 2 * numbers * (element + sent) } else { 0 });
        self.call(axis, Op::AllReduce, numbers, sent, t);
        t.free(held);
    }

    /// Norms of rows: what they give, and `1/rms` of each.
    pub fn norm(&self, rows: u64, width: u64, part: Part, t: &mut Tally) -> (Held, Held) {
        let rstd = t.hold(part, 4 * rows);
        let normed = t.hold(part, rows * width * self.element());
        t.pass(Pass::Norm, 3 * rows * width * self.element());
        (normed, rstd)
    }

    /// The same with `1/rms` known.
    pub fn norm_again(&self, rows: u64, width: u64, t: &mut Tally) -> Held {
        t.pass(Pass::Norm, 2 * rows * width * self.element());
        t.hold(Part::Workspace, rows * width * self.element())
    }

    /// Backward of a norm, into what is there.
    pub fn norm_backward(&self, rows: u64, width: u64, t: &mut Tally) {
        // partial sums of the weight's gradient, a row of f32 for 64 rows
        t.brief(Part::Workspace, if self.engine.host { rows.div_ceil(64) * width * 4 } else { 0 });
        t.pass(Pass::NormBackward, 4 * rows * width * self.element());
    }
}
