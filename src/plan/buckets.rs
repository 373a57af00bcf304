//! Gradient buffers and the optimizer in numbers: `train/gradients.rs` and the end of `train/step.rs`.

use std::collections::VecDeque;

use super::rank::Rank;
use super::tally::{Flight, Held, Operands, Part, Pass, Tally};
use crate::config::Float;
use crate::dist::wire::{FEW, Op};
use crate::model::sharding::{Class, ParamId};
use crate::train::MAX_UNDER_WAY;

/// Gradients of a run, step after step.
pub struct Buckets {
    flats: Vec<Option<Held>>,
    touched: Vec<bool>,
    /// Backward of the last micro-batch is running.
    pub last: bool,
    started: usize,
    /// Buckets whose sums have ended, with what they hold beyond their buffers.
    summed: VecDeque<Option<Held>>,
    under_way: VecDeque<Sum>,
}

struct Sum {
    flight: Option<Flight>,
    /// The transport's own buffer.
    copy: Option<Held>,
    /// The bucket in the kind that it is sent in, where that is another.
    sent: Option<Held>,
}

impl Buckets {
    pub fn new(rank: &Rank, t: &mut Tally) -> Self {
        let buckets = rank.layout.buckets.len();
        let mut new = Self {
            flats: (0..buckets).map(|_| None).collect(),
            touched: vec![false; rank.table.params.len()],
            last: false,
            started: 0,
            summed: VecDeque::new(),
            under_way: VecDeque::new(),
        };
        if !rank.config.optimizer.in_backward {
            (0..buckets).for_each(|bucket| new.flat(rank, bucket, t));
        }
        new
    }

    pub fn begin(&mut self) {
        self.touched.fill(false);
        self.last = false;
        self.started = 0;
    }

    /// `dW += dy^T x` over `tokens` rows.
    pub fn product(&mut self, rank: &Rank, param: ParamId, tokens: u64, t: &mut Tally) {
        let Some((bucket, _)) = rank.layout.places[param] else { return };
        let first = !std::mem::replace(&mut self.touched[param], true);
        self.flat(rank, bucket, t);
        let shape = &rank.table.params[param].shape;
        let (m, n) = (shape[0] as u64, shape[1] as u64);
        let (element, gradient) = (rank.element(), element(rank));
        t.product(Operands::Tn, m, tokens, n);
        if element != gradient && !t.widens() {
            // the product in its own kind, and widened where it is added
            let own = if rank.engine.host { m * n * element } else { 0 };
            let wide = if first { 0 } else { m * n * gradient };
            t.brief(Part::Workspace, own + wide);
        }
        if !first {
            t.pass(Pass::Copy, 2 * m * n * gradient);
        }
    }

    pub fn vector(&mut self, rank: &Rank, param: ParamId, t: &mut Tally) {
        let Some((bucket, _)) = rank.layout.places[param] else { return };
        self.touched[param] = true;
        self.flat(rank, bucket, t);
        t.brief(Part::Workspace, 4 * rank.table.params[param].num_elements() as u64);
    }

    /// Rows added up at some of a matrix's rows.
    pub fn rows(&mut self, rank: &Rank, param: ParamId, rows: u64, t: &mut Tally) {
        let Some((bucket, _)) = rank.layout.places[param] else { return };
        let first = !std::mem::replace(&mut self.touched[param], true);
        self.flat(rank, bucket, t);
        if first {
            t.pass(Pass::Copy, element(rank) * rank.table.params[param].num_elements() as u64);
        }
        let numbers = rows * rank.hidden();
        t.brief(Part::Workspace, if element(rank) == rank.element() { 0 } else { numbers * element(rank) });
        t.pass(Pass::Copy, 3 * numbers * element(rank));
    }

    /// Starts, and with stepping inside backward takes, what a unit's backward completes.
    pub fn complete(&mut self, rank: &Rank, unit: usize, t: &mut Tally) {
        while self.last && self.start_one(rank, unit, t) {
            if rank.config.optimizer.in_backward {
                self.take(rank, false, t);
            }
        }
    }

    /// All that is left, whatever this rank had to do.
    pub fn start_all(&mut self, rank: &Rank, t: &mut Tally) {
        self.last = true;
        self.complete(rank, 0, t);
    }

    /// The end of a step: norm, update and the other owners' weights.
    pub fn finish(&mut self, rank: &Rank, t: &mut Tally) {
        if rank.config.optimizer.in_backward {
            return self.take(rank, true, t);
        }
        while self.wait_oldest(t) {}
        norms(rank, 1, t);
        for bucket in 0..rank.layout.buckets.len() {
            update(rank, bucket, t);
        }
        for bucket in (0..rank.layout.buckets.len()).rev() {
            gather(rank, bucket, t);
        }
        let sums = std::mem::take(&mut self.summed);
        t.free_all(sums.into_iter().flatten());
    }

    fn start_one(&mut self, rank: &Rank, unit: usize, t: &mut Tally) -> bool {
        let ready = rank.layout.buckets.get(self.started).is_some_and(|bucket| bucket.last_unit >= unit);
        if ready {
            self.start_next(rank, t);
        }
        ready
    }

    fn start_next(&mut self, rank: &Rank, t: &mut Tally) {
        if self.under_way.len() == MAX_UNDER_WAY {
            self.wait_oldest(t);
        }
        let bucket = &rank.layout.buckets[self.started];
        self.flat(rank, self.started, t);
        for class in [Class::PartialMatrix, Class::PartialVector] {
            let partial = bucket.class(&rank.table, class).len() as u64;
            if partial > 0 {
                rank.all_reduce("tp", partial, element(rank), t);
            }
        }
        self.started += 1;
        let dp = rank.mesh.dp;
        if dp == 1 {
            self.under_way.push_back(Sum { flight: None, copy: None, sent: None });
            self.wait_oldest(t);
            return;
        }
        let numbers = bucket.len as u64;
        let reduce = if rank.config.parallel.reduce_dtype == Float::Bf16 { 2 } else { 4 };
        let sent = (reduce != element(rank)).then(|| t.hold(Part::Communication, numbers * reduce));
        if sent.is_some() {
            t.pass(Pass::Cast, numbers * (reduce + element(rank)));
        }
        if bucket.own.len() == bucket.len {
            rank.all_reduce("dp", numbers, reduce, t);
            self.under_way.push_back(Sum { flight: None, copy: None, sent });
        } else {
            let few = rank.engine.host && bucket.len <= FEW;
            let flight = t.start("dp", Op::ReduceScatter, dp, numbers * reduce, few);
            let copy = rank.engine.copies.then(|| t.hold(Part::Communication, numbers * reduce));
            self.under_way.push_back(Sum { flight: Some(flight), copy, sent });
        }
    }

    fn wait_oldest(&mut self, t: &mut Tally) -> bool {
        let Some(Sum { flight, copy, sent }) = self.under_way.pop_front() else { return false };
        if let Some(flight) = flight {
            t.wait("dp", flight);
        }
        t.free_all(copy);
        self.summed.push_back(sent);
        true
    }

    /// Steps the buckets whose sums have ended, or all, and frees them.
    fn take(&mut self, rank: &Rank, all: bool, t: &mut Tally) {
        loop {
            let bucket = self.started - self.summed.len() - self.under_way.len();
            if self.summed.is_empty() && !(all && self.wait_oldest(t)) {
                return;
            }
            let sent = self.summed.pop_front().expect("invariant: just looked");
            let held = self.flats[bucket].take();
            let mut units: Vec<usize> =
                rank.layout.buckets[bucket].segments(&rank.table).iter().map(|segment| segment.unit).collect();
            units.sort_unstable();
            units.dedup();
            norms(rank, units.len() as u64, t);
            update(rank, bucket, t);
            gather(rank, bucket, t);
            t.free_all(held);
            t.free_all(sent);
        }
    }

    fn flat(&mut self, rank: &Rank, bucket: usize, t: &mut Tally) {
        if self.flats[bucket].is_none() {
            let bytes = rank.layout.buckets[bucket].len as u64 * element(rank);
            self.flats[bucket] = Some(t.hold(Part::Gradients, bytes));
            t.pass(Pass::Fresh, if rank.engine.host { bytes } else { 0 });
        }
    }
}

/// Bytes of a gradient.
fn element(rank: &Rank) -> u64 {
    if rank.config.train.grad_dtype == Float::Bf16 { 2 } else { 4 }
}

/// Norms over all owners: so many numbers.
fn norms(rank: &Rank, numbers: u64, t: &mut Tally) {
    rank.call("tp", Op::AllReduce, numbers, 8, t);
    if rank.layout.buckets.iter().any(|bucket| bucket.own.len() < bucket.len) {
        rank.call("dp", Op::AllReduce, numbers, 8, t);
    }
}

/// The optimizer's pass over this rank's own part of a bucket.
fn update(rank: &Rank, bucket: usize, t: &mut Tally) {
    let bucket = &rank.layout.buckets[bucket];
    let share = rank.chosen.unwrap_or(1.0);
    if rank.chosen.is_some() {
        // a mask widened, then indices, weights, gradients and rounded weights of what is chosen
        t.brief(Part::Workspace, 4 * bucket.own.len() as u64);
        let largest = bucket.segments(&rank.table).iter().map(|segment| segment.own.len()).max().unwrap_or(0);
        let each = 8 + 4 + element(rank) + rank.element();
        t.brief(Part::Workspace, (share * largest as f64) as u64 * each);
        t.pass(Pass::Copy, 8 * bucket.own.len() as u64);
    }
    // the norm reads what the update reads again
    t.pass(Pass::Squares, bucket.own.len() as u64 * element(rank));
    t.pass(Pass::Optimizer, (share * bucket.own.len() as f64) as u64);
}

/// The other owners' weights.
fn gather(rank: &Rank, bucket: usize, t: &mut Tally) {
    let bucket = &rank.layout.buckets[bucket];
    if bucket.own.len() < bucket.len {
        let copy = if rank.engine.copies { bucket.own.len() as u64 * rank.element() } else { 0 };
        let copy = t.hold(Part::Communication, copy);
        rank.call("dp", Op::AllGather, bucket.len as u64, rank.element(), t);
        t.free(copy);
    }
}
