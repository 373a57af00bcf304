//! The final norm and the vocabulary-parallel head, in two passes and at chosen positions only.
//!
//! Pass 1 gives log-probability and log-sum-exp of each row and keeps no logits (unless they fit in one chunk). Then the
//! caller decides the weight of each row's gradient. Pass 2 computes the logits again, chunk by chunk, and turns them in
//! place into `weight * (softmax - one-hot)`; it needs no collective but the sum of the hidden gradient.

pub mod distribution;
mod next;

use std::cell::RefCell;

use tch::{Kind, Tensor};

use super::batch::recurring_size;
use super::decoder::Decoder;
use super::weights::{Gradients, Weights};
use crate::dist::Reduce;
use crate::kernels::product::{product, product_into};
use crate::kernels::{rms_norm, softmax};

/// Rows of the last hidden states on their way through the head, filled up to a recurring size with rows of no weight.
pub struct Rows {
    /// `[filled rows, hidden]`, before the final norm.
    x: Tensor,
    rstd: Tensor,
    /// `[filled rows, hidden]`, after the final norm.
    normed: Tensor,
    /// Rows that were asked for.
    len: i64,
    /// Rows in one chunk.
    chunk: i64,
}

/// What pass 1 knows of each row.
pub struct Scores {
    /// `[rows]` f32: log-probability of the target.
    pub logprob: Tensor,
    /// `[filled rows]` f32: log-sum-exp over the whole vocabulary.
    log_sum: Tensor,
    /// `[rows]` bool: the target has the highest probability (the first, where several are equal).
    pub correct: Tensor,
    /// Targets relative to this rank's vocabulary, -1 where they are elsewhere.
    target: Tensor,
    /// Logits of this rank's vocabulary, kept where there is a single chunk.
    logits: Option<Logits>,
}

/// `[rows, vocabulary of this rank]` in a buffer that is used again.
struct Logits {
    buffer: Tensor,
    values: Tensor,
}

/// Buffers for logits that nobody uses at the moment: the largest tensors of a step, of another size in each.
#[derive(Default)]
pub struct LogitsPool(RefCell<Vec<Tensor>>);

impl LogitsPool {
    /// `h: [rows, hidden]` times the transpose of `head: [vocabulary, hidden]`.
    fn product(&self, h: &Tensor, head: &Tensor) -> Logits {
        let (rows, width) = (h.size()[0], head.size()[0]);
        let fits = |buffer: &Tensor| buffer.numel() as i64 >= rows * width && buffer.kind() == h.kind();
        let buffer = self
            .0
            .borrow_mut()
            .pop()
            .filter(fits)
            .unwrap_or_else(|| Tensor::empty([Self::buffer(rows, width)], (h.kind(), h.device())));
        let values = buffer.narrow(0, 0, rows * width).view([rows, width]);
        product_into(&values, h, &head.tr());
        Logits { buffer, values }
    }

    fn give_back(&self, logits: Logits) {
        self.0.borrow_mut().push(logits.buffer);
    }

    /// Elements of a new buffer: an eighth more than asked for, so that slightly larger steps find it large enough.
    pub fn buffer(rows: i64, width: i64) -> i64 {
        rows * width / 8 * 9 + 8
    }
}

/// The head of a reference model: its rows after the final norm and this rank's rows of its head matrix.
pub struct ReferenceHead {
    pub weight: Tensor,
}

/// Pass 1 of the divergence from a reference.
pub struct Divergence {
    /// `[rows]` f32: KL(reference || model).
    pub kl: Tensor,
    log_sum: Tensor,
    ref_log_sum: Tensor,
    logits: Option<(Logits, Logits)>,
}

impl Decoder {
    /// Norms the given positions of `hidden: [tokens, hidden]`.
    ///
    /// `positions: [rows]` i64; `logits_bytes`: memory for one chunk of logits on this rank.
    pub fn rows(&self, weights: &Weights, hidden: &Tensor, positions: &Tensor, logits_bytes: f64) -> Rows {
        let len = positions.size()[0];
        let x = hidden.index_select(0, &fill_up(positions));
        let (normed, rstd) = rms_norm::forward(&x, weights.get(self.table.final_norm), self.arch.norm_eps);
        let chunk = Rows::chunk(self.arch.vocab, self.tp.size(), x.kind().elt_size_in_bytes(), logits_bytes);
        Rows { x, rstd, normed, len, chunk }
    }

    /// Pass 1 for rows with a target: `targets: [rows]` i64 ids. All ranks of the tensor-parallel group call it.
    pub fn scores(&self, weights: &Weights, rows: &Rows, targets: &Tensor, keep_logits: bool) -> Scores {
        self.pass(weights, rows, targets, keep_logits, |_, _| ())
    }

    /// As [`Self::scores`] without logits kept, and mean and variance over the vocabulary of each row's log-probabilities,
    /// `[2, rows]` f64: sum of p log p, and sum of p (log p)^2 minus its square. All ranks of the tensor-parallel group call it.
    pub fn scores_and_moments(&self, weights: &Weights, rows: &Rows, targets: &Tensor) -> (Scores, Tensor) {
        let mut parts = Vec::new();
        let scores = self.pass(weights, rows, targets, false, |logits, statistics| {
            parts.push(Tensor::cat(&[statistics.narrow(1, 0, 2), softmax::moments(logits, statistics)], 1));
        });
        let all = self.tp.all_gather(&concatenate(&parts, 4, rows)).to_kind(Kind::Double);
        let all = all.view([self.tp.size() as i64, rows.filled(), 4]);
        let maximum = all.select(2, 0).amax([0i64].as_slice(), false);
        let mut sums = Tensor::zeros([3, rows.filled()], (Kind::Double, self.device));
        for rank in 0..self.tp.size() as i64 {
            let column = |i| all.get(rank).select(1, i);
            // from this rank's maximum to the common one
            let shift = column(0) - &maximum;
            let (sum, first, second) = (column(1), column(2), column(3));
            let second = second + &shift * (2.0 * &first + &shift * &sum);
            sums += shift.exp() * Tensor::stack(&[sum.copy(), first + &shift * sum, second], 0);
        }
        let (mean, square) = (sums.get(1) / sums.get(0), sums.get(2) / sums.get(0));
        let moments = Tensor::stack(&[&mean - sums.get(0).log(), square - mean.square()], 0);
        (scores, moments.narrow(1, 0, rows.len))
    }

    /// `look` is given each chunk's logits and [`softmax::statistics`].
    fn pass(
        &self,
        weights: &Weights,
        rows: &Rows,
        targets: &Tensor,
        keep_logits: bool,
        mut look: impl FnMut(&Tensor, &Tensor),
    ) -> Scores {
        let head = weights.get(self.table.head);
        let targets = &fill_up(targets);
        let (local, here) = self.local_ids(targets);
        let target = local * here.to_kind(Kind::Int64) - here.logical_not().to_kind(Kind::Int64);
        let mut logits = None;
        let mut parts = Vec::new();
        for (start, len) in rows.chunks() {
            let z = self.logits.product(&rows.normed.narrow(0, start, len), head);
            let statistics = softmax::statistics(&z.values, &target.narrow(0, start, len));
            look(&z.values, &statistics);
            parts.push(statistics);
            if keep_logits && len == rows.filled() {
                logits = Some(z);
            } else {
                self.logits.give_back(z);
            }
        }
        let total = self.combine(&concatenate(&parts, softmax::STATISTICS, rows));
        let (log_sum, target_logit, best) = (total.select(0, 0), total.select(0, 1), total.select(0, 2));
        let correct = best.to_kind(Kind::Int64).eq_tensor(targets);
        let asked = |t: Tensor| t.narrow(0, 0, rows.len);
        Scores {
            logprob: asked(target_logit - &log_sum),
            log_sum: log_sum.contiguous(),
            correct: asked(correct),
            target,
            logits,
        }
    }

    /// Pass 2: given dloss/dlogprob, hands on the head's gradients and gives that of the rows before the final norm.
    ///
    /// `weight: [rows]` f32. All ranks of the tensor-parallel group call it with the same weights.
    pub fn scores_backward(
        &self,
        weights: &Weights,
        rows: &Rows,
        scores: Scores,
        weight: &Tensor,
        sink: &mut dyn Gradients,
    ) -> Tensor {
        let head = weights.get(self.table.head);
        // dlogprob/dlogits = one-hot - softmax
        let weight = fill_up(&-weight.to_kind(Kind::Float));
        let Scores { log_sum, target, mut logits, .. } = scores;
        let d_normed = rows.chunks().map(|(start, len)| {
            let h = rows.normed.narrow(0, start, len);
            let mut z = logits.take().unwrap_or_else(|| self.logits.product(&h, head));
            let part = |t: &Tensor| t.narrow(0, start, len);
            softmax::gradient(&mut z.values, &part(&log_sum), &part(&weight), &part(&target));
            sink.product(self.table.head, &z.values, &h);
            let d_h = product(&z.values, head);
            self.logits.give_back(z);
            d_h
        });
        let d_normed: Vec<Tensor> = d_normed.collect();
        self.norm_backward(weights, rows, &d_normed, sink)
    }

    /// Pass 1 of KL(reference || model) at rows whose reference rows (after its final norm) are `reference: [rows, hidden]`.
    ///
    /// All ranks of the tensor-parallel group call it.
    pub fn divergence(&self, weights: &Weights, rows: &Rows, head: &ReferenceHead, reference: &Tensor) -> Divergence {
        let (own, other) = (weights.get(self.table.head), &head.weight);
        let reference = &fill_up(reference);
        let nowhere = Tensor::full([rows.filled()], -1, (Kind::Int64, self.device));
        let mut kept = None;
        let (mut own_stats, mut other_stats, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        for (start, len) in rows.chunks() {
            let z = self.logits.product(&rows.normed.narrow(0, start, len), own);
            let y = self.logits.product(&reference.narrow(0, start, len), other);
            own_stats.push(softmax::statistics(&z.values, &nowhere.narrow(0, start, len)));
            other_stats.push(softmax::statistics(&y.values, &nowhere.narrow(0, start, len)));
            // the second pass over a chunk needs the log-sums of all ranks, so they are gathered chunk by chunk
            let log_sum = self.combine(&other_stats[other_stats.len() - 1]).select(0, 0).contiguous();
            chunks.push((softmax::cross_difference(&z.values, &y.values, &log_sum), log_sum));
            if len == rows.filled() {
                kept = Some((z, y));
            } else {
                self.logits.give_back(z);
                self.logits.give_back(y);
            }
        }
        let log_sum = self.combine(&concatenate(&own_stats, softmax::STATISTICS, rows)).select(0, 0).contiguous();
        let (cross, ref_log_sum): (Vec<Tensor>, Vec<Tensor>) = chunks.into_iter().unzip();
        let mut cross = Tensor::cat(&cross, 0);
        let ref_log_sum = Tensor::cat(&ref_log_sum, 0);
        self.tp.all_reduce(&mut cross, Reduce::Sum);
        let kl = (cross + &log_sum - &ref_log_sum).narrow(0, 0, rows.len);
        Divergence { kl, log_sum, ref_log_sum, logits: kept }
    }

    /// Pass 2 of the divergence: as [`Self::scores_backward`] with `weight` = dloss/dkl.
    #[expect(clippy::too_many_arguments, reason = "the operands of one formula")]
    pub fn divergence_backward(
        &self,
        weights: &Weights,
        rows: &Rows,
        divergence: Divergence,
        head: &ReferenceHead,
        reference: &Tensor,
        weight: &Tensor,
        sink: &mut dyn Gradients,
    ) -> Tensor {
        let own = weights.get(self.table.head);
        let (weight, reference) = (fill_up(&weight.to_kind(Kind::Float)), &fill_up(reference));
        let Divergence { log_sum, ref_log_sum, mut logits, .. } = divergence;
        let d_normed = rows.chunks().map(|(start, len)| {
            let h = rows.normed.narrow(0, start, len);
            let part = |t: &Tensor| t.narrow(0, start, len);
            let again = || (self.logits.product(&h, own), self.logits.product(&part(reference), &head.weight));
            let (mut z, y) = logits.take().unwrap_or_else(again);
            softmax::divergence_gradient(
                &mut z.values,
                &part(&log_sum),
                &y.values,
                &part(&ref_log_sum),
                &part(&weight),
            );
            sink.product(self.table.head, &z.values, &h);
            let d_h = product(&z.values, own);
            self.logits.give_back(z);
            self.logits.give_back(y);
            d_h
        });
        let d_normed: Vec<Tensor> = d_normed.collect();
        self.norm_backward(weights, rows, &d_normed, sink)
    }

    /// Gradient of the rows before the final norm from the vocabulary shards' parts of the gradient after it.
    fn norm_backward(&self, weights: &Weights, rows: &Rows, parts: &[Tensor], sink: &mut dyn Gradients) -> Tensor {
        let mut d_normed = match parts {
            [] => rows.normed.zeros_like(),
            [single] => single.shallow_clone(),
            parts => Tensor::cat(parts, 0),
        };
        self.tp.all_reduce(&mut d_normed, Reduce::Sum);
        let norm = weights.get(self.table.final_norm);
        let mut grad = d_normed.zeros_like();
        sink.vector(self.table.final_norm, &rms_norm::backward(&mut grad, &d_normed, &rows.x, norm, &rows.rstd));
        grad.narrow(0, 0, rows.len)
    }

    /// Log-sum-exp, target logit and index of the maximum over the whole vocabulary, `[3, rows]` f32, from each rank's
    /// [`softmax::statistics`].
    ///
    /// One gather of four numbers a row; every rank combines them in rank order and gets the same bits.
    fn combine(&self, statistics: &Tensor) -> Tensor {
        let rows = statistics.size()[0];
        // the index of the maximum counts from the start of the whole vocabulary
        let _ = statistics.narrow(1, 3, 1).g_add_scalar_(self.table.vocab.start as f64);
        let all = self.tp.all_gather(statistics).view([self.tp.size() as i64, rows, softmax::STATISTICS]);
        let (maxima, sums) = (all.select(2, 0), all.select(2, 1));
        let maximum = maxima.amax([0i64].as_slice(), true);
        let mut total = Tensor::zeros([rows], (Kind::Float, self.device));
        let mut target = Tensor::zeros([rows], (Kind::Float, self.device));
        for rank in 0..self.tp.size() as i64 {
            total += sums.get(rank) * (maxima.get(rank) - maximum.get(0)).exp();
            target += all.get(rank).select(1, 2);
        }
        // argmax over the ranks gives the first of equal maxima
        let best = all.select(2, 3).gather(0, &maxima.argmax(0, true), false).squeeze_dim(0);
        Tensor::stack(&[maximum.squeeze_dim(0) + total.log(), target, best], 0)
    }
}

impl Rows {
    /// Rows that were asked for.
    pub fn len(&self) -> i64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `[rows, hidden]`, after the final norm.
    pub fn normed(&self) -> Tensor {
        self.normed.narrow(0, 0, self.len)
    }

    fn filled(&self) -> i64 {
        self.x.size()[0]
    }

    /// Rows that go through the head for `asked`.
    pub fn padded(asked: usize) -> usize {
        recurring_size(asked)
    }

    /// Rows of one chunk of logits of `element` bytes each. The largest shard's width decides: ranks with a smaller one must cut
    /// the same chunks, their collectives go together.
    pub fn chunk(vocab: i64, tp: usize, element: usize, logits_bytes: f64) -> i64 {
        let width = (vocab as u64).div_ceil(tp as u64);
        ((logits_bytes / (width * element as u64) as f64) as i64).max(1)
    }

    /// Start and length of each chunk.
    fn chunks(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        let (rows, chunk) = (self.filled(), self.chunk);
        (0..rows).step_by(chunk as usize).map(move |start| (start, chunk.min(rows - start)))
    }
}

fn concatenate(parts: &[Tensor], width: i64, rows: &Rows) -> Tensor {
    if parts.is_empty() { Tensor::zeros([0, width], (Kind::Float, rows.x.device())) } else { Tensor::cat(parts, 0) }
}

/// Appends zeros along dimension 0 up to a recurring size.
fn fill_up(x: &Tensor) -> Tensor {
    let rows = x.size()[0];
    let more = recurring_size(rows as usize) as i64 - rows;
    let mut shape = x.size();
    shape[0] = more;
    if more == 0 {
        x.contiguous()
    } else {
        Tensor::cat(&[x.shallow_clone(), x.new_zeros(shape, (x.kind(), x.device()))], 0)
    }
}
