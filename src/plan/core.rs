//! Attention inside each sequence in numbers: `model/attention_core`.

use super::layers::Heads;
use super::rank::{Rank, Shape};
use super::tally::{Held, Operands, Part, Pass, Product, Tally};
use crate::kernels::attention::Group;
use crate::model::cut_on_host;

/// The mixed values and what backward needs of them.
pub fn forward(rank: &Rank, s: &Shape, layer: usize, heads: Heads, t: &mut Tally) -> (Held, Held) {
    let e = rank.element();
    let mixed = t.hold(Part::Workspace, s.tokens * heads.q * heads.dim * e);
    if !rank.engine.host {
        for &(_, len) in &s.spans {
            scores(len as u64, rank.arch.windows[layer], heads, 2, t);
        }
        t.pass(Pass::Packing, s.tokens * (heads.row() + heads.q * heads.dim) * e);
        let kept = if flash(rank) { 4 * heads.q * s.tokens } else { explicit(s, heads, t) };
        return (mixed, t.hold(Part::Workspace, kept));
    }
    let (groups, long) = cut_on_host(&s.spans);
    let mut log_sums = 0;
    for group in &groups {
        let packed = Packed::new(group, heads, e);
        let held = t.hold(Part::Workspace, 2 * packed.q + 2 * packed.kv);
        log_sums += packed.log_sums;
        let sums = t.hold(Part::Workspace, log_sums);
        t.brief(Part::Workspace, packed.chunk_bytes);
        t.brief(Part::Workspace, packed.log_sums);
        t.free_all([held, sums]);
        packed.forward(heads, t);
        t.pass(Pass::Scores, packed.scores());
        t.pass(Pass::Packing, 4 * packed.q + 4 * packed.kv);
    }
    for &(_, len) in &long {
        let len = len as u64;
        t.brief(Part::Workspace, len * heads.q * heads.dim * e + mask(rank, layer, len));
        log_sums += 4 * heads.q * len;
        scores(len, rank.arch.windows[layer], heads, 2, t);
    }
    let normalisers = t.hold(Part::Workspace, log_sums);
    (mixed, normalisers)
}

/// The caller holds the gradients of q, k and v.
pub fn backward(rank: &Rank, s: &Shape, layer: usize, heads: Heads, t: &mut Tally) {
    let e = rank.element();
    if !rank.engine.host {
        for &(_, len) in &s.spans {
            scores(len as u64, rank.arch.windows[layer], heads, 5, t);
        }
        t.pass(Pass::Packing, 2 * s.tokens * (heads.row() + heads.q * heads.dim) * e);
        if flash(rank) {
            // the three gradients by themselves, q's sum in f32, and one number a row
            let (q, row) = (heads.q * heads.dim, heads.row());
            t.brief(Part::Workspace, s.tokens * (row * e + 4 * q + 4 * heads.q));
        } else {
            explicit(s, heads, t);
        }
        return;
    }
    let (groups, long) = cut_on_host(&s.spans);
    for group in &groups {
        let packed = Packed::new(group, heads, e);
        let held = t.hold(Part::Workspace, 3 * packed.q + 4 * packed.kv);
        t.brief(Part::Workspace, 2 * packed.chunk_bytes);
        t.free(held);
        packed.backward(heads, t);
        t.pass(Pass::ScoresBackward, packed.scores());
        t.pass(Pass::Packing, 6 * packed.q + 8 * packed.kv);
    }
    for &(_, len) in &long {
        let len = len as u64;
        t.brief(Part::Workspace, len * heads.row() * e + mask(rank, layer, len));
        scores(len, rank.arch.windows[layer], heads, 5, t);
    }
}

/// Whether a GPU's flash kernel takes these numbers, see `attention_core/varlen.rs`.
fn flash(rank: &Rank) -> bool {
    rank.element() == 2 && rank.arch.head_dim % 8 == 0 && rank.arch.head_dim <= 256
}

/// Scores of the longest sequence, held four times; nothing is kept.
fn explicit(s: &Shape, heads: Heads, t: &mut Tally) -> u64 {
    let longest = s.spans.iter().map(|(_, len)| *len as u64).max().unwrap_or(0);
    t.brief(Part::Workspace, 4 * 4 * heads.q * longest * longest);
    0
}

/// The mask of a window, beside what it is made from.
fn mask(rank: &Rank, layer: usize, len: u64) -> u64 {
    let windowed = rank.arch.windows[layer].is_some_and(|window| (window as u64) < len);
    if windowed { len * len * (2 * rank.element() + 2) } else { 0 }
}

/// So many products over the scores that a causal window leaves of one sequence.
fn scores(len: u64, window: Option<i64>, heads: Heads, products: u64, t: &mut Tally) {
    let seen = window.map_or(len, |window| (window as u64).min(len));
    // a triangle, and then a band
    let pairs = seen * (seen + 1) / 2 + (len - seen) * seen;
    t.products_of(Product {
        operands: Operands::Nt,
        rows: pairs,
        inner: heads.dim,
        columns: 1,
        batch: products * heads.q,
    });
}

/// One group of sequences, packed head by head.
pub(super) struct Packed {
    /// Bytes of q and of k (or v).
    pub q: u64,
    pub kv: u64,
    /// Bytes of one chunk of scores, and of all log-sums.
    chunk_bytes: u64,
    log_sums: u64,
    entries: u64,
    pub chunk: u64,
    pub rows: u64,
    pub width: u64,
}

impl Packed {
    pub fn new(group: &Group, heads: Heads, e: u64) -> Self {
        let share = heads.q / heads.kv;
        let entries = group.entries(heads.kv as usize, share as usize) as u64;
        let (chunk, width) = (group.chunk(share as usize) as u64, group.width as u64);
        let rows = share * width;
        Self {
            q: entries * rows * heads.dim * e,
            kv: entries * width * heads.dim * e,
            chunk_bytes: chunk * rows * width * e,
            log_sums: entries * rows * 4,
            entries,
            chunk,
            rows,
            width,
        }
    }

    /// Elements.
    fn scores(&self) -> u64 {
        self.entries * self.rows * self.width
    }

    /// Scores and mixed values, of each chunk.
    fn forward(&self, heads: Heads, t: &mut Tally) {
        let (rows, width, dim) = (self.rows, self.width, heads.dim);
        self.products(&[(Operands::Nt, rows, dim, width), (Operands::Nn, rows, width, dim)], t);
    }

    /// Scores again, then the gradients of values, scores, queries and keys.
    fn backward(&self, heads: Heads, t: &mut Tally) {
        let (rows, width, dim) = (self.rows, self.width, heads.dim);
        let scores = (Operands::Nt, rows, dim, width);
        let of_keys = (Operands::Tn, width, rows, dim);
        self.products(&[scores, of_keys, scores, (Operands::Nn, rows, width, dim), of_keys], t);
    }

    fn products(&self, all: &[(Operands, u64, u64, u64)], t: &mut Tally) {
        for _ in 0..self.entries / self.chunk {
            for &(operands, rows, inner, columns) in all {
                t.products_of(Product { operands, rows, inner, columns, batch: self.chunk });
            }
        }
    }
}
