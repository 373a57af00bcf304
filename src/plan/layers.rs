//! The half blocks in numbers: `model/attention.rs` and `model/mlp.rs`, statement by statement. A test holds what is kept against
//! the real tapes, byte for byte, and the calls against those of the real step.

use super::buckets::Buckets;
use super::core;
use super::rank::{Rank, Shape};
use super::tally::{Held, Part, Pass, Phase, Tally};
use crate::model::Keep;
use crate::model::sharding::{attention_unit, mlp_unit};

/// What forward kept of one half block.
pub struct Tape {
    x: Held,
    rest: Vec<Held>,
}

/// Heads of this rank.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub q: u64,
    pub kv: u64,
    pub dim: u64,
}

impl Heads {
    pub fn of(rank: &Rank) -> Self {
        let (arch, tp) = (rank.arch, rank.tp());
        Self { q: arch.num_heads as u64 / tp, kv: arch.num_kv_heads as u64 / tp, dim: arch.head_dim as u64 }
    }

    /// Elements of q, k and v of a token.
    pub fn row(&self) -> u64 {
        (self.q + 2 * self.kv) * self.dim
    }
}

/// What lies between a norm and the last product of a half block, by name of what drops it when.
struct Attention {
    rstd: Held,
    qkv: Held,
    /// q and k after their norms, and what those need.
    normed_heads: Vec<Held>,
    mixed: Held,
    normalisers: Held,
}

struct Mlp {
    rstd: Held,
    gate_up: Held,
}

impl Rank<'_> {
    /// Runs some layers; gives the rows behind them and what they kept.
    pub fn through(
        &self,
        s: &Shape,
        mut x: Held,
        layers: std::ops::Range<usize>,
        keep: Keep,
        phase: Phase,
        t: &mut Tally,
    ) -> (Held, Vec<[Tape; 2]>) {
        let mut tapes = Vec::new();
        for layer in layers {
            t.enter_layer(phase, layer, "attention");
            let (y, attention) = self.attention_forward(s, layer, x, keep, t);
            t.enter_layer(phase, layer, "MLP");
            let (y, mlp) = self.mlp_forward(s, layer, y, keep, t);
            tapes.extend(attention.zip(mlp).map(|(attention, mlp)| [attention, mlp]));
            x = y;
        }
        t.enter(phase);
        (x, tapes)
    }

    /// The reverse; the caller holds the gradient of the rows.
    pub fn back_through(
        &self,
        s: &Shape,
        tapes: Vec<[Tape; 2]>,
        layers: std::ops::Range<usize>,
        mut buckets: Option<&mut Buckets>,
        t: &mut Tally,
    ) {
        for (layer, [attention, mlp]) in layers.rev().zip(tapes.into_iter().rev()) {
            t.enter_layer(Phase::Backward, layer, "MLP");
            self.mlp_backward(s, layer, mlp, &mut buckets, t);
            if let Some(buckets) = &mut buckets {
                buckets.complete(self, mlp_unit(layer), t);
            }
            t.enter_layer(Phase::Backward, layer, "attention");
            self.attention_backward(s, layer, attention, &mut buckets, t);
            if let Some(buckets) = &mut buckets {
                buckets.complete(self, attention_unit(layer), t);
            }
        }
        t.enter(Phase::Backward);
    }

    fn attention_forward(&self, s: &Shape, layer: usize, x: Held, keep: Keep, t: &mut Tally) -> (Held, Option<Tape>) {
        let (rest, normed) = self.attention_inside(s, layer, t);
        t.free(normed);
        self.leave(s, layer, self.table.layers[layer].output, x, keep, rest.list(), t)
    }

    /// The last product of a half block with its sum, the residual, and the tape.
    #[expect(clippy::too_many_arguments, reason = "what both half blocks end with")]
    fn leave(
        &self,
        s: &Shape,
        layer: usize,
        param: usize,
        x: Held,
        keep: Keep,
        rest: Vec<Held>,
        t: &mut Tally,
    ) -> (Held, Option<Tape>) {
        let (h, e) = (self.hidden(), self.element());
        let partial = t.hold(Part::Workspace, s.tokens * h * e);
        // nothing of this is repeated in backward
        self.linear(layer, param, s.tokens, t);
        let y = self.reduce_tokens(partial, s, t);
        t.pass(Pass::Copy, 3 * s.own * h * e);
        let kept = |held, t: &mut Tally| t.recast(held, Part::Activations);
        match keep {
            Keep::Nothing => {
                t.free_all(rest);
                t.free(x);
                (y, None)
            }
            Keep::Inputs => {
                t.free_all(rest);
                let x = kept(x, t);
                (y, Some(Tape { x, rest: Vec::new() }))
            }
            Keep::Everything => {
                let rest = rest.into_iter().map(|held| kept(held, t)).collect();
                let x = kept(x, t);
                (y, Some(Tape { x, rest }))
            }
        }
    }

    fn attention_inside(&self, s: &Shape, layer: usize, t: &mut Tally) -> (Attention, Held) {
        let (heads, e, tokens) = (Heads::of(self), self.element(), s.tokens);
        let (normed, rstd) = self.norm(s.own, self.hidden(), Part::Workspace, t);
        let normed = self.gather_tokens(normed, s, t);
        let qkv = t.hold(Part::Workspace, tokens * heads.row() * e);
        self.linear(layer, self.table.layers[layer].qkv, tokens, t);
        if self.arch.qkv_bias {
            t.pass(Pass::Copy, 2 * tokens * heads.row() * e);
        }
        let mut normed_heads = Vec::new();
        if self.arch.qk_norm {
            for count in [heads.q, heads.kv] {
                let copy = t.hold(Part::Workspace, tokens * count * heads.dim * e);
                let (values, rstd) = self.norm(tokens * count, heads.dim, Part::Workspace, t);
                normed_heads.extend([values, rstd]);
                t.free(copy);
            }
        }
        t.pass(Pass::Rotation, 2 * tokens * (heads.q + heads.kv) * heads.dim * e);
        let (mixed, normalisers) = core::forward(self, s, layer, heads, t);
        (Attention { rstd, qkv, normed_heads, mixed, normalisers }, normed)
    }

    fn attention_backward(
        &self,
        s: &Shape,
        layer: usize,
        tape: Tape,
        buckets: &mut Option<&mut Buckets>,
        t: &mut Tally,
    ) {
        let (heads, h, e, tokens) = (Heads::of(self), self.hidden(), self.element(), s.tokens);
        let (qkv, output) = (self.table.layers[layer].qkv, self.table.layers[layer].output);
        let Tape { x, rest } = tape;
        let (rest, normed) = if rest.is_empty() {
            t.again = true;
            let (rest, normed) = self.attention_inside(s, layer, t);
            t.again = false;
            (rest, Some(normed))
        } else {
            (Attention::from_list(rest, self.arch.qk_norm), None)
        };
        let d_output = self.all_tokens(s, Part::Workspace, t);
        let d_mixed = t.hold(Part::Workspace, tokens * heads.q * heads.dim * e);
        self.linear_backward(layer, output, tokens, t);
        self.linear_gradients(layer, output, tokens, buckets, t);
        t.free(d_output);
        let Attention { rstd, qkv: kept_qkv, normed_heads, mixed, normalisers } = rest;
        let d_qkv = t.hold(Part::Workspace, tokens * heads.row() * e);
        core::backward(self, s, layer, heads, t);
        t.free_all([normalisers, d_mixed, mixed]);
        t.pass(Pass::Rotation, 2 * tokens * (heads.q + heads.kv) * heads.dim * e);
        if self.arch.qk_norm {
            for count in [heads.q, heads.kv] {
                // copies of x and dy, and dx
                let copies = t.hold(Part::Workspace, 3 * tokens * count * heads.dim * e);
                self.norm_backward(tokens * count, heads.dim, t);
                t.pass(Pass::Copy, 8 * tokens * count * heads.dim * e);
                t.free(copies);
            }
        }
        t.free(kept_qkv);
        t.free_all(normed_heads);
        let normed = normed.unwrap_or_else(|| {
            let normed = self.norm_again(s.own, h, t);
            self.gather_tokens(normed, s, t)
        });
        self.linear_gradients(layer, qkv, tokens, buckets, t);
        t.free(normed);
        let d_normed = t.hold(Part::Workspace, tokens * h * e);
        self.linear_backward(layer, qkv, tokens, t);
        let d_normed = self.reduce_tokens(d_normed, s, t);
        self.norm_backward(s.own, h, t);
        t.free_all([d_normed, d_qkv, rstd, x]);
    }

    fn mlp_forward(&self, s: &Shape, layer: usize, x: Held, keep: Keep, t: &mut Tally) -> (Held, Option<Tape>) {
        let (Mlp { rstd, gate_up }, normed) = self.mlp_inside(s, layer, t);
        t.free(normed);
        let activation = self.activation(s, t);
        // dropped behind the product that reads it, before the sum over the ranks: as much as the output is then not held
        let (h, e) = (self.hidden(), self.element());
        t.brief(Part::Workspace, s.tokens * h * e);
        t.free(activation);
        self.leave(s, layer, self.table.layers[layer].down, x, keep, vec![rstd, gate_up], t)
    }

    fn mlp_inside(&self, s: &Shape, layer: usize, t: &mut Tally) -> (Mlp, Held) {
        let (normed, rstd) = self.norm(s.own, self.hidden(), Part::Workspace, t);
        let normed = self.gather_tokens(normed, s, t);
        let gate_up = t.hold(Part::Workspace, s.tokens * 2 * self.width() * self.element());
        self.linear(layer, self.table.layers[layer].gate_up, s.tokens, t);
        (Mlp { rstd, gate_up }, normed)
    }

    /// Columns of the MLP on this rank.
    fn width(&self) -> u64 {
        self.arch.intermediate as u64 / self.tp()
    }

    fn activation(&self, s: &Shape, t: &mut Tally) -> Held {
        t.pass(Pass::Activation, 3 * s.tokens * self.width() * self.element());
        t.hold(Part::Workspace, s.tokens * self.width() * self.element())
    }

    fn mlp_backward(&self, s: &Shape, layer: usize, tape: Tape, buckets: &mut Option<&mut Buckets>, t: &mut Tally) {
        let (h, e, width, tokens) = (self.hidden(), self.element(), self.width(), s.tokens);
        let (gate_up_of, down) = (self.table.layers[layer].gate_up, self.table.layers[layer].down);
        let Tape { x, rest } = tape;
        let (Mlp { rstd, gate_up }, normed) = if rest.is_empty() {
            t.again = true;
            let (rest, normed) = self.mlp_inside(s, layer, t);
            t.again = false;
            (rest, Some(normed))
        } else {
            let mut rest = rest.into_iter();
            let mut next = || rest.next().expect("invariant: a whole tape");
            (Mlp { rstd: next(), gate_up: next() }, None)
        };
        let d_down = self.all_tokens(s, Part::Workspace, t);
        let d_activation = t.hold(Part::Workspace, tokens * width * e);
        self.linear_backward(layer, down, tokens, t);
        let d_gate_up = t.hold(Part::Workspace, tokens * 2 * width * e);
        let activation = t.hold(Part::Workspace, tokens * width * e);
        t.pass(Pass::ActivationBackward, 6 * tokens * width * e);
        t.free_all([gate_up, d_activation]);
        self.linear_gradients(layer, down, tokens, buckets, t);
        t.free_all([d_down, activation]);
        let normed = normed.unwrap_or_else(|| {
            let normed = self.norm_again(s.own, h, t);
            self.gather_tokens(normed, s, t)
        });
        self.linear_gradients(layer, gate_up_of, tokens, buckets, t);
        t.free(normed);
        let d_normed = t.hold(Part::Workspace, tokens * h * e);
        self.linear_backward(layer, gate_up_of, tokens, t);
        let d_normed = self.reduce_tokens(d_normed, s, t);
        self.norm_backward(s.own, h, t);
        t.free_all([d_normed, d_gate_up, rstd, x]);
    }
}

impl Attention {
    fn list(self) -> Vec<Held> {
        let Self { rstd, qkv, normed_heads, mixed, normalisers } = self;
        [rstd, qkv, mixed, normalisers].into_iter().chain(normed_heads).collect()
    }

    fn from_list(list: Vec<Held>, qk_norm: bool) -> Self {
        debug_assert_eq!(list.len(), if qk_norm { 8 } else { 4 });
        let mut list = list.into_iter();
        let mut next = || list.next().expect("invariant: a whole tape");
        let (rstd, qkv, mixed, normalisers) = (next(), next(), next(), next());
        Self { rstd, qkv, mixed, normalisers, normed_heads: list.collect() }
    }
}
