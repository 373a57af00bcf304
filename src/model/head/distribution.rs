//! Losses on the whole distribution of a row, vocabulary-parallel and chunk by chunk, with gradients in closed form.
//!
//! With logits z, p = softmax(z), V tokens and target y, l = log-sum-exp of z:
//!
//! | kind | loss of a row | dloss/dz_v |
//! |---|---|---|
//! | `Uniform` | KL(uniform, p) = l - mean(z) - log V | p_v - 1/V |
//! | `SoftTarget` | CE(q, p) = l - sum q z, q = softmax(z_ref - beta \[v = y\]) | p_v - q_v |
//! | `WithoutTarget` | CE(q, p), q = softmax(z without y), held constant | p_v - q_v |
//! | `Hinge` | 1 + p_y - p_k, k = argmax over v != y of p_v | p_v (p_k - p_y) + p_y \[v = y\] - p_k \[v = k\] |
//! | `Margin` | (max z - mean z)^2 | 2 (max z - mean z) (\[v = argmax\] - 1/V) |
//!
//! `Hinge` is max(0, .) of what stands there, which is never negative. `WithoutTarget` is written so that nothing cancels when p_y
//! goes to 1: p_v - q_v = -exp(z_v - (l + l' - z_y)) with l' the log-sum-exp without y, and p_y at y itself.

use tch::{Kind, Tensor};

use super::{Logits, ReferenceHead, Rows, concatenate, fill_up};
use crate::dist::Reduce;
use crate::kernels::product::product;
use crate::kernels::{distribution, softmax};
use crate::model::decoder::Decoder;
use crate::model::weights::{Gradients, Weights};

/// A loss on the whole distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    Uniform,
    /// `beta` is taken from the target's logit of the reference.
    SoftTarget {
        beta: f64,
    },
    WithoutTarget,
    Hinge,
    Margin,
}

impl Distribution {
    /// Whether the reference's rows are needed.
    pub fn needs_reference(self) -> bool {
        matches!(self, Self::SoftTarget { .. })
    }
}

/// Pass 1 of a loss on distributions.
pub struct OfDistribution {
    /// `[rows]` f32.
    pub loss: Tensor,
    kind: Distribution,
    /// `[filled rows]`: targets in this rank's part of the vocabulary, -1 where they are elsewhere.
    target: Tensor,
    gradient: Gradient,
    logits: Option<(Logits, Option<Logits>)>,
}

/// What pass 2 needs of each row, `[filled rows]` each; indices of columns count from the start of the whole vocabulary.
struct Gradient {
    scale: Tensor,
    shift: Tensor,
    constant: Tensor,
    reference_shift: Option<Tensor>,
    add: Vec<(Tensor, Tensor)>,
    set: Option<(Tensor, Tensor)>,
}

/// Numbers of each row over the whole vocabulary, `[filled rows]` f32.
struct Whole {
    log_sum: Tensor,
    target: Tensor,
    best: Tensor,
}

impl Decoder {
    /// Pass 1 for rows with the targets `[rows]` i64 (any id for kinds that have none).
    ///
    /// `reference`: the reference's head and its rows `[rows, hidden]`, for kinds that need them. All ranks of the tensor-parallel
    /// group call it.
    pub fn distribution(
        &self,
        weights: &Weights,
        rows: &Rows,
        targets: &Tensor,
        kind: Distribution,
        reference: Option<(&ReferenceHead, &Tensor)>,
    ) -> OfDistribution {
        let head = weights.get(self.table.head);
        let targets = &fill_up(targets);
        let local = self.columns_here(targets);
        let reference = reference.filter(|_| kind.needs_reference()).map(|(head, rows)| (head, fill_up(rows)));
        let (mut stats, mut extras, mut soft, mut kept) = (Vec::new(), Vec::new(), Vec::new(), None);
        for (start, len) in rows.chunks() {
            let target = local.narrow(0, start, len);
            let z = self.logits.product(&rows.normed.narrow(0, start, len), head);
            stats.push(softmax::statistics(&z.values, &target));
            match kind {
                Distribution::Uniform => extras.push(distribution::sum(&z.values).unsqueeze(1)),
                Distribution::Margin => {
                    let sum = distribution::sum(&z.values);
                    let maximum = stats[stats.len() - 1].select(1, 0);
                    extras.push(Tensor::stack(&[sum, maximum], 1));
                }
                Distribution::WithoutTarget | Distribution::Hinge => {
                    extras.push(distribution::others(&z.values, &target));
                }
                Distribution::SoftTarget { .. } => {}
            }
            let y = reference.as_ref().map(|reference| {
                let y = self.lowered(reference, start, len, &target, kind);
                // q needs the log-sums of all ranks, so they are gathered chunk by chunk
                let shift = self.whole(softmax::statistics(&y.values, &target)).log_sum;
                soft.push((distribution::cross(&z.values, &y.values, &shift), shift));
                y
            });
            if len == rows.filled() {
                kept = Some((z, y));
            } else {
                self.logits.give_back(z);
                y.into_iter().for_each(|y| self.logits.give_back(y));
            }
        }
        let whole = self.whole(concatenate(&stats, softmax::STATISTICS, rows));
        let gathered = |width: i64| self.gather_columns(&concatenate(&extras, width, rows));
        let vocab = self.arch.vocab as f64;
        let (loss, gradient) = match kind {
            Distribution::Uniform => uniform(&whole, &total(&gathered(1), 0), vocab),
            Distribution::Margin => {
                let all = gathered(2);
                let maximum = all.select(2, 1).amax([0i64].as_slice(), false);
                margin(&whole, &total(&all, 0), &maximum, vocab)
            }
            Distribution::WithoutTarget => without_target(&whole, &gathered(distribution::OTHERS), targets),
            Distribution::Hinge => self.hinge(&whole, &gathered(distribution::OTHERS), targets),
            Distribution::SoftTarget { .. } => self.soft_target(&whole, soft),
        };
        OfDistribution { loss: loss.narrow(0, 0, rows.len), kind, target: local, gradient, logits: kept }
    }

    /// Pass 2: as [`Decoder::scores_backward`] with `weight` = dloss/d(loss of a row).
    pub fn distribution_backward(
        &self,
        weights: &Weights,
        rows: &Rows,
        of: OfDistribution,
        weight: &Tensor,
        reference: Option<(&ReferenceHead, &Tensor)>,
        sink: &mut dyn Gradients,
    ) -> Tensor {
        let head = weights.get(self.table.head);
        let weight = fill_up(&weight.to_kind(Kind::Float));
        let reference = reference.map(|(head, rows)| (head, fill_up(rows)));
        let OfDistribution { kind, target, gradient, mut logits, .. } = of;
        let add: Vec<(Tensor, &Tensor)> = gradient.add.iter().map(|(at, x)| (self.columns_here(at), x)).collect();
        let set = gradient.set.as_ref().map(|(at, x)| (self.columns_here(at), x));
        let d_normed = rows.chunks().map(|(start, len)| {
            let h = rows.normed.narrow(0, start, len);
            let part = |t: &Tensor| t.narrow(0, start, len);
            let again = || {
                let y = |reference| self.lowered(reference, start, len, &part(&target), kind);
                (self.logits.product(&h, head), reference.as_ref().map(y))
            };
            let (mut z, y) = logits.take().unwrap_or_else(again);
            let add: Vec<(Tensor, Tensor)> = add.iter().map(|(at, x)| (part(at), part(x))).collect();
            let set = set.as_ref().map(|(at, x)| (part(at), part(x)));
            let shift = gradient.reference_shift.as_ref().map(part);
            let row = distribution::Row {
                scale: &part(&gradient.scale),
                shift: &part(&gradient.shift),
                constant: &part(&gradient.constant),
                reference: y.as_ref().zip(shift.as_ref()).map(|(y, shift)| (&y.values, shift)),
                add: &add.iter().map(|(at, x)| (at, x)).collect::<Vec<_>>(),
                set: set.as_ref().map(|(at, x)| (at, x)),
            };
            distribution::gradient(&mut z.values, &row, &part(&weight));
            sink.product(self.table.head, &z.values, &h);
            let d_h = product(&z.values, head);
            self.logits.give_back(z);
            y.into_iter().for_each(|y| self.logits.give_back(y));
            d_h
        });
        let d_normed: Vec<Tensor> = d_normed.collect();
        self.norm_backward(weights, rows, &d_normed, sink)
    }

    /// With k the best other token: 1 + p_y - p_k.
    fn hinge(&self, whole: &Whole, all: &Tensor, targets: &Tensor) -> (Tensor, Gradient) {
        let (best, rank) = all.select(2, 0).max_dim(0, false);
        let starts: Vec<i64> = (0..self.tp.size()).map(|rank| self.vocabulary_start(rank)).collect();
        let starts = crate::abi::upload::upload(&starts, self.device).unsqueeze(1);
        let at = all.select(2, 3).to_kind(Kind::Int64) + starts;
        let at = at.gather(0, &rank.unsqueeze(0), false).squeeze_dim(0);
        let p_target = (&whole.target - &whole.log_sum).exp();
        let p_best = (best - &whole.log_sum).exp();
        let gradient = Gradient {
            scale: &p_best - &p_target,
            shift: whole.log_sum.shallow_clone(),
            constant: p_best.zeros_like(),
            reference_shift: None,
            add: vec![(targets.shallow_clone(), p_target.shallow_clone()), (at, -&p_best)],
            set: None,
        };
        (1.0 + p_target - p_best, gradient)
    }

    /// `soft`: of each chunk this rank's part of sum q z, and q's log-sum.
    fn soft_target(&self, whole: &Whole, soft: Vec<(Tensor, Tensor)>) -> (Tensor, Gradient) {
        let none = || whole.log_sum.zeros_like();
        let join = |parts: Vec<Tensor>| if parts.is_empty() { none() } else { Tensor::cat(&parts, 0) };
        let (cross, shift): (Vec<Tensor>, Vec<Tensor>) = soft.into_iter().unzip();
        let mut cross = join(cross);
        self.tp.all_reduce(&mut cross, Reduce::Sum);
        let gradient = Gradient {
            scale: whole.log_sum.ones_like(),
            shift: whole.log_sum.shallow_clone(),
            constant: none(),
            reference_shift: Some(join(shift)),
            add: Vec::new(),
            set: None,
        };
        (&whole.log_sum - cross, gradient)
    }

    /// Logits of the reference with beta taken from the target's.
    fn lowered(
        &self,
        (head, rows): &(&ReferenceHead, Tensor),
        start: i64,
        len: i64,
        target: &Tensor,
        kind: Distribution,
    ) -> Logits {
        let mut y = self.logits.product(&rows.narrow(0, start, len), &head.weight);
        if let Distribution::SoftTarget { beta } = kind {
            distribution::lower(&mut y.values, target, beta);
        }
        y
    }

    fn whole(&self, statistics: Tensor) -> Whole {
        let all = self.combine(&statistics);
        let row = |i: i64| all.select(0, i).contiguous();
        Whole { log_sum: row(0), target: row(1), best: row(2) }
    }

    /// Ids relative to this rank's vocabulary, -1 where they are elsewhere.
    fn columns_here(&self, ids: &Tensor) -> Tensor {
        let (local, here) = self.local_ids(ids);
        local * here.to_kind(Kind::Int64) - here.logical_not().to_kind(Kind::Int64)
    }

    /// Every rank's numbers: `[ranks, rows, width]`.
    fn gather_columns(&self, mine: &Tensor) -> Tensor {
        let size = mine.size();
        self.tp.all_gather(mine).view([self.tp.size() as i64, size[0], size[1]])
    }

    fn vocabulary_start(&self, rank: usize) -> i64 {
        crate::dist::part(self.arch.vocab as usize, self.tp.size(), rank).start as i64
    }
}

/// The sum of one column over the ranks, in their order.
fn total(all: &Tensor, column: i64) -> Tensor {
    all.select(2, column).sum_dim_intlist(0i64, false, Kind::Float)
}

fn uniform(whole: &Whole, sum: &Tensor, vocab: f64) -> (Tensor, Gradient) {
    let gradient = Gradient {
        scale: sum.ones_like(),
        shift: whole.log_sum.shallow_clone(),
        constant: sum.full_like(-1.0 / vocab),
        reference_shift: None,
        add: Vec::new(),
        set: None,
    };
    (&whole.log_sum - sum / vocab - vocab.ln(), gradient)
}

fn margin(whole: &Whole, sum: &Tensor, maximum: &Tensor, vocab: f64) -> (Tensor, Gradient) {
    let gap = maximum - sum / vocab;
    let gradient = Gradient {
        scale: gap.zeros_like(),
        // exp(z - max) <= 1: times a scale of 0 it is 0
        shift: maximum.shallow_clone(),
        constant: &gap * (-2.0 / vocab),
        reference_shift: None,
        add: vec![(whole.best.to_kind(Kind::Int64), &gap * 2.0)],
        set: None,
    };
    (gap.square(), gradient)
}

fn without_target(whole: &Whole, all: &Tensor, targets: &Tensor) -> (Tensor, Gradient) {
    let maxima = all.select(2, 0);
    let maximum = maxima.amax([0i64].as_slice(), true);
    let factor = (&maxima - &maximum).exp();
    let over_ranks = |column: i64| (all.select(2, column) * &factor).sum_dim_intlist(0i64, false, Kind::Float);
    let (sum, weighted) = (over_ranks(1), over_ranks(2));
    let log_sum = maximum.squeeze_dim(0) + sum.log();
    let gradient = Gradient {
        scale: sum.full_like(-1.0),
        shift: &whole.log_sum + &log_sum - &whole.target,
        constant: sum.zeros_like(),
        reference_shift: None,
        add: Vec::new(),
        set: Some((targets.shallow_clone(), (&whole.target - &whole.log_sum).exp())),
    };
    (&whole.log_sum - weighted / sum, gradient)
}
