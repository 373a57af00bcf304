//! The head in numbers: `model/head.rs` and `model/head/distribution.rs`.

use super::buckets::Buckets;
use super::rank::Rank;
use super::tally::{Held, Operands, Part, Pass, Tally};
use crate::dist::wire::Op;
use crate::kernels::distribution::OTHERS;
use crate::kernels::softmax::STATISTICS;
use crate::model::{Distribution, LogitsPool, Rows};

/// Buffers of logits that are used again.
#[derive(Default)]
pub struct Pool(Vec<(i64, Held)>);

/// Logits of one chunk.
struct Logits(i64, Held);

/// What is computed from the rows.
#[derive(Clone, Copy, Debug)]
pub enum Term {
    Likelihood,
    Distribution(Distribution),
    /// From a reference.
    Divergence,
}

struct Chosen {
    held: Vec<Held>,
    filled: u64,
    chunk: u64,
}

impl Chosen {
    fn chunks(&self) -> Vec<u64> {
        let starts = (0..self.filled).step_by(self.chunk as usize);
        starts.map(|start| self.chunk.min(self.filled - start)).collect()
    }
}

impl Pool {
    fn product(&mut self, rank: &Rank, rows: u64, t: &mut Tally) -> Logits {
        let width = rank.table.vocab.end - rank.table.vocab.start;
        t.product(Operands::Nt, rows, rank.hidden(), width as u64);
        let rows = rows as i64;
        match self.0.pop() {
            Some((len, held)) if len >= rows * width => Logits(len, held),
            other => {
                t.free_all(other.map(|(_, held)| held));
                let len = LogitsPool::buffer(rows, width);
                Logits(len, t.hold(Part::Head, len as u64 * rank.element()))
            }
        }
    }

    fn give_back(&mut self, logits: Logits) {
        self.0.push((logits.0, logits.1));
    }
}

impl Rank<'_> {
    fn vocabulary(&self) -> u64 {
        (self.table.vocab.end - self.table.vocab.start) as u64
    }

    fn rows(&self, asked: u64, t: &mut Tally) -> Chosen {
        let filled = Rows::padded(asked as usize) as u64;
        let chunk = Rows::chunk(self.arch.vocab, self.mesh.tp, self.element() as usize, self.logits_bytes()) as u64;
        let x = t.hold(Part::Head, filled * self.hidden() * self.element());
        let (normed, rstd) = self.norm(filled, self.hidden(), Part::Head, t);
        Chosen { held: vec![x, normed, rstd], filled, chunk }
    }

    /// One gather of the rows' statistics.
    fn combine(&self, rows: u64, width: i64, t: &mut Tally) {
        self.call("tp", Op::AllGather, self.tp() * rows * width as u64, 4, t);
    }

    /// Pass 1 alone: scores of so many rows.
    pub fn score(&self, asked: u64, pool: &mut Pool, t: &mut Tally) {
        let rows = self.rows(asked, t);
        for len in rows.chunks() {
            let z = pool.product(self, len, t);
            t.pass(Pass::Logits, len * self.vocabulary());
            pool.give_back(z);
        }
        self.combine(rows.filled, STATISTICS, t);
        t.free_all(rows.held);
    }

    /// Both passes of a term over so many rows.
    pub fn head(&self, asked: u64, term: Term, pool: &mut Pool, mut buckets: Option<&mut Buckets>, t: &mut Tally) {
        let (h, e, vocab) = (self.hidden(), self.element(), self.vocabulary());
        let reference = match term {
            Term::Divergence => true,
            Term::Distribution(kind) => kind.needs_reference(),
            Term::Likelihood => false,
        };
        // the reference's rows, and once more filled up
        let padded = Rows::padded(asked as usize) as u64;
        let known = t.hold(Part::Caches, if reference { (asked + padded) * h * e } else { 0 });
        let rows = self.rows(asked, t);
        let single = rows.chunk >= rows.filled;
        let mut kept = Vec::new();
        for len in rows.chunks() {
            let mut logits = vec![pool.product(self, len, t)];
            t.pass(Pass::Logits, len * vocab);
            if reference {
                logits.push(pool.product(self, len, t));
                t.pass(Pass::Logits, 2 * len * vocab);
                // its log-sums are of all ranks, chunk by chunk
                self.combine(len, STATISTICS, t);
            }
            if matches!(term, Term::Distribution(kind) if !kind.needs_reference()) {
                t.pass(Pass::Logits, len * vocab);
            }
            if single {
                kept = logits;
            } else {
                logits.into_iter().for_each(|logits| pool.give_back(logits));
            }
        }
        self.combine(rows.filled, STATISTICS, t);
        match term {
            Term::Distribution(Distribution::Uniform) => self.combine(rows.filled, 1, t),
            Term::Distribution(Distribution::Margin) => self.combine(rows.filled, 2, t),
            Term::Distribution(Distribution::WithoutTarget | Distribution::Hinge) => {
                self.combine(rows.filled, OTHERS, t);
            }
            Term::Distribution(Distribution::SoftTarget { .. }) | Term::Divergence => {
                self.call("tp", Op::AllReduce, rows.filled, 4, t);
            }
            Term::Likelihood => {}
        }
        let mut parts = Vec::new();
        for len in rows.chunks() {
            let logits = if kept.is_empty() {
                t.again = true;
                let mut logits = vec![pool.product(self, len, t)];
                if reference {
                    logits.push(pool.product(self, len, t));
                }
                t.again = false;
                logits
            } else {
                std::mem::take(&mut kept)
            };
            t.pass(Pass::Logits, len * vocab * if reference { 2 } else { 1 });
            if let Some(buckets) = &mut buckets {
                buckets.product(self, self.table.head, len, t);
            }
            parts.push(t.hold(Part::Head, len * h * e));
            t.product(Operands::Nn, len, vocab, h);
            logits.into_iter().for_each(|logits| pool.give_back(logits));
        }
        let joined = t.hold(Part::Head, if parts.len() > 1 { rows.filled * h * e } else { 0 });
        self.all_reduce("tp", rows.filled * h, e, t);
        let grad = t.hold(Part::Head, rows.filled * h * e);
        self.norm_backward(rows.filled, h, t);
        if let Some(buckets) = &mut buckets {
            buckets.vector(self, self.table.final_norm, t);
        }
        t.free_all(parts);
        t.free_all([joined, grad, known]);
        t.free_all(rows.held);
    }
}
