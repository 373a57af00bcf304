//! A step in numbers: `train/step.rs` from top to bottom.

use super::buckets::Buckets;
use super::head::{Pool, Term};
use super::layers::Tape;
use super::rank::{Rank, Shape};
use super::tally::{Held, Part, Pass, Phase, Tally};
use crate::config::Recompute;
use crate::data::{MicroBatch, Stream, Text};
use crate::dist::wire::Op;
use crate::model::Keep;
use crate::train::{Adversary, Forget, Retain, StepWork};

/// What stays from step to step.
pub struct Walker {
    pub buckets: Buckets,
    pub pool: Pool,
}

impl Rank<'_> {
    /// One optimizer step.
    pub fn step(&self, work: &StepWork, state: &mut Walker, t: &mut Tally) {
        state.buckets.begin();
        if let Some(objective) = self.method.objective(Stream::Forget).filter(|o| o.looks_at().is_some()) {
            for micro_batch in &work.looks {
                self.scoring(micro_batch, &mut state.pool, Phase::Forward, t);
            }
            self.call("dp", Op::AllReduce, objective.num_looked() as u64, 8, t);
        }
        for (index, micro_batch) in work.micro_batches.iter().enumerate() {
            state.buckets.last = index + 1 == work.micro_batches.len();
            self.micro_batch(micro_batch, state, t);
        }
        t.enter(Phase::Backward);
        state.buckets.start_all(self, t);
        self.call("dp", Op::AllReduce, 2 + self.method.numbers().len() as u64, 8, t);
        t.enter(Phase::Optimizer);
        state.buckets.finish(self, t);
    }

    /// Forward without backward, and scores of the rows that have them: evaluation, the reference, a look at the samples.
    pub fn scoring(&self, micro_batch: &MicroBatch, pool: &mut Pool, phase: Phase, t: &mut Tally) {
        let s = self.shape(&micro_batch.lengths());
        let batch = self.batch(&s, t);
        t.enter(phase);
        let (x, _) = self.forward(&s, Keep::Nothing, phase, t);
        let hidden = self.all_tokens(&s, Part::Workspace, t);
        self.score(micro_batch.positions.len() as u64, pool, t);
        t.free_all([hidden, x, batch]);
    }

    /// All layers: the rows behind them and what they kept.
    pub fn forward(&self, s: &Shape, keep: Keep, phase: Phase, t: &mut Tally) -> (Held, Vec<[Tape; 2]>) {
        let x = self.enter(s, t);
        self.through(s, x, 0..self.arch.num_layers, keep, phase, t)
    }

    /// What forward keeps in a step.
    pub fn keep(&self) -> Keep {
        match self.config.train.recompute {
            Recompute::None => Keep::Everything,
            Recompute::HalfBlock => Keep::Inputs,
        }
    }

    fn micro_batch(&self, micro_batch: &MicroBatch, state: &mut Walker, t: &mut Tally) {
        let s = self.shape(&micro_batch.lengths());
        let batch = self.batch(&s, t);
        let here = |stream| micro_batch.rows(stream).len() as u64;
        let needs_head = [Stream::Forget, Stream::Retain].iter().any(|&at| here(at) > 0 && self.method.needs_head(at));
        let watched = self.method.watched();
        let depth = if needs_head { self.arch.num_layers } else { watched.unwrap_or(self.arch.num_layers) };
        let first = self.table.first_trained_layer().min(depth);
        let adversary = self.method.adversary.filter(|_| here(Stream::Forget) > 0);
        let mut stops: Vec<usize> =
            [adversary.map(|a| a.edge), watched, Some(first), Some(depth)].into_iter().flatten().collect();
        stops.sort_unstable();
        stops.dedup();
        let keep = self.keep();
        t.enter(Phase::Forward);
        let (h, e) = (self.hidden(), self.element());
        let mut x = self.enter(&s, t);
        let (mut tapes, mut looked, mut from) = (Vec::new(), None, 0);
        for stop in stops {
            let keep = if stop <= first { Keep::Nothing } else { keep };
            let (y, tape) = self.through(&s, x, from..stop, keep, Phase::Forward, t);
            if stop > first {
                tapes.push((from..stop, tape));
            }
            x = y;
            if let Some(adversary) = adversary.filter(|adversary| adversary.edge == stop) {
                self.attack(&adversary, micro_batch, &s, &mut state.pool, t);
            }
            if watched == Some(stop) {
                looked = Some(self.all_tokens(&s, Part::Activations, t));
            }
            from = stop;
        }
        t.enter(Phase::Head);
        let d_top = needs_head.then(|| {
            let hidden = self.all_tokens(&s, Part::Head, t);
            let d_hidden = t.hold(Part::Head, s.tokens * h * e);
            self.terms(micro_batch, state, t);
            t.free(hidden);
            d_hidden
        });
        state.buckets.complete(self, self.table.num_units() - 1, t);
        let d_watched = looked.map(|looked| {
            self.on_hidden(micro_batch, &s, t);
            t.free(looked);
            t.hold(Part::Workspace, s.tokens * h * e)
        });
        t.enter(Phase::Backward);
        let grad = match d_top {
            Some(d_top) if self.spread() => {
                let own = t.hold(Part::Workspace, s.own * h * e);
                t.free(d_top);
                own
            }
            Some(d_top) => d_top,
            None => t.hold(Part::Workspace, s.own * h * e),
        };
        t.free(x);
        while let Some((layers, tape)) = tapes.pop() {
            self.back_through(&s, tape, layers, Some(&mut state.buckets), t);
        }
        if self.table.first_trained_layer() == 0 {
            self.leave_embedding(&s, grad, state, t);
        } else {
            t.free(grad);
            state.buckets.complete(self, 0, t);
        }
        t.free_all(d_watched);
        t.free(batch);
    }

    /// The terms that are computed from the head.
    fn terms(&self, micro_batch: &MicroBatch, state: &mut Walker, t: &mut Tally) {
        let here = |stream| micro_batch.rows(stream).len() as u64;
        let likely = |stream| if self.method.objective(stream).is_some() { here(stream) } else { 0 };
        let Walker { buckets, pool } = state;
        let rows = likely(Stream::Forget) + likely(Stream::Retain);
        if rows > 0 {
            self.head(rows, Term::Likelihood, pool, Some(buckets), t);
        }
        if let Forget::Distribution(on) = self.method.forget
            && here(Stream::Forget) > 0
        {
            self.head(here(Stream::Forget), Term::Distribution(on.kind), pool, Some(buckets), t);
        }
        if matches!(self.method.retain, Retain::Divergence) && here(Stream::Retain) > 0 {
            self.head(here(Stream::Retain), Term::Divergence, pool, Some(buckets), t);
        }
    }

    /// Terms on hidden rows: differences in f32 of the rows that they look at.
    fn on_hidden(&self, micro_batch: &MicroBatch, s: &Shape, t: &mut Tally) {
        let all = |stream| {
            let sequences = micro_batch.sequences.iter().filter(|sequence| sequence.stream == stream);
            sequences.map(|sequence| sequence.len as u64).sum::<u64>()
        };
        let grad = t.hold(Part::Workspace, s.tokens * self.hidden() * self.element());
        for rows in [all(Stream::Forget), all(Stream::Retain)] {
            t.brief(Part::Workspace, 4 * rows * self.hidden() * 4);
            t.pass(Pass::Copy, 6 * rows * self.hidden() * 4);
        }
        t.free(grad);
    }

    /// The inner steps of an adversary, see `train/attack.rs`.
    fn attack(&self, adversary: &Adversary, micro_batch: &MicroBatch, s: &Shape, pool: &mut Pool, t: &mut Tally) {
        let (h, e, layers) = (self.hidden(), self.element(), adversary.edge..self.arch.num_layers);
        let forget = micro_batch.sequences.iter().filter(|q| q.stream == Stream::Forget && q.text == Text::Answer);
        let rows: usize = forget.map(|sequence| sequence.rows.len()).sum();
        let whole = self.all_tokens(s, Part::Workspace, t);
        // clean rows and what is added to them, in f32
        let wide = t.hold(Part::Activations, 2 * 4 * s.tokens * h);
        t.free(whole);
        for _ in 0..adversary.steps {
            let x = t.hold(Part::Workspace, s.own * h * e);
            let (y, tapes) = self.through(s, x, layers.clone(), Keep::Inputs, Phase::Forward, t);
            let whole = self.all_tokens(s, Part::Workspace, t);
            let d_y = t.hold(Part::Head, s.tokens * h * e);
            self.head(rows as u64, Term::Likelihood, pool, None, t);
            let grad = t.hold(Part::Workspace, s.own * h * e);
            self.back_through(s, tapes, layers.clone(), None, t);
            t.free(whole);
            let whole = self.all_tokens(s, Part::Workspace, t);
            t.brief(Part::Workspace, 3 * 4 * s.tokens * h);
            t.pass(Pass::Copy, 12 * 4 * s.tokens * h);
            t.free_all([whole, grad, d_y, y]);
        }
        t.free(wide);
    }

    /// Ids and the tables of the rotary embedding.
    fn batch(&self, s: &Shape, t: &mut Tally) -> Held {
        t.hold(Part::Workspace, s.tokens * (8 + 4 * self.arch.rope.dim as u64))
    }

    /// The rows that enter the first layer.
    fn enter(&self, s: &Shape, t: &mut Tally) -> Held {
        let bytes = s.tokens * self.hidden() * self.element();
        let x = t.hold(Part::Workspace, bytes);
        t.pass(Pass::Copy, 2 * bytes);
        if self.tp() == 1 {
            return x;
        }
        t.brief(Part::Workspace, bytes);
        self.reduce_tokens(x, s, t)
    }

    fn leave_embedding(&self, s: &Shape, grad: Held, state: &mut Walker, t: &mut Tally) {
        let whole = self.all_tokens(s, Part::Workspace, t);
        // each rank picks the tokens of its rows out of the vocabulary
        let here = s.tokens.div_ceil(self.tp());
        let picked = if self.tp() > 1 { here * self.hidden() * self.element() } else { 0 };
        let picked = t.hold(Part::Workspace, picked);
        state.buckets.rows(self, self.table.embedding, here, t);
        t.free_all([picked, whole, grad]);
        state.buckets.complete(self, 0, t);
    }
}
