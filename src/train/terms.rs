//! The terms of a loss on one micro-batch: what each gives of the losses, and the gradient that it starts.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::attack::direction;
use super::batches::StepWork;
use super::method::{Cut, Forget, Method, OnRows, Reference, Retain, Steering};
use super::objective::{Objective, Tokens, Totals};
use crate::abi::upload::upload;
use crate::data::{MicroBatch, RowsOf, Sequence, Stream, Text};
use crate::model::{Decoder, Gradients, Rows, Weights};

/// One micro-batch of a step, and what is known of it.
pub(super) struct Look<'a> {
    pub method: &'a Method,
    pub micro_batch: &'a MicroBatch,
    pub work: &'a StepWork,
    pub reference: Option<&'a dyn Reference>,
    /// Numbers of the whole step, for objectives that look first.
    pub looked: Option<&'a Tensor>,
}

/// Parts of the forget and the retain loss and of the objective's numbers, f64.
pub(super) struct Told {
    pub losses: [Tensor; 2],
    pub numbers: Vec<Tensor>,
}

impl Told {
    pub fn nothing(like: &Tensor) -> Self {
        let zero = || Tensor::zeros([], (Kind::Double, like.device()));
        Self { losses: [zero(), zero()], numbers: Vec::new() }
    }
}

impl Look<'_> {
    /// Rows of the streams whose terms are likelihoods; they are consecutive.
    pub fn likelihood_rows(&self) -> Range<usize> {
        let ranges = [Stream::Forget, Stream::Retain].map(|stream| match self.method.objective(stream) {
            Some(_) => self.micro_batch.rows(stream),
            None => 0..0,
        });
        match ranges {
            [forget, retain] if forget.is_empty() => retain,
            [forget, retain] if retain.is_empty() => forget,
            [forget, retain] => forget.start..retain.end,
        }
    }

    /// Rows of a stream with samples here, where its term is not a likelihood.
    fn rows_of(&self, stream: Stream, is_this: bool) -> Option<Range<usize>> {
        Some(self.micro_batch.rows(stream)).filter(|rows| is_this && !rows.is_empty())
    }

    /// Whether anything here is computed from the head.
    pub fn needs_head(&self) -> bool {
        let here = |stream| !self.micro_batch.rows(stream).is_empty() && self.method.needs_head(stream);
        here(Stream::Forget) || here(Stream::Retain)
    }

    /// The rows of a forget term on distributions.
    pub fn distribution_rows(&self) -> Option<(Range<usize>, OnRows)> {
        let Forget::Distribution(on) = self.method.forget else { return None };
        Some((self.rows_of(Stream::Forget, true)?, on))
    }

    /// The rows of a retain term that is a divergence.
    pub fn divergence_rows(&self) -> Option<Range<usize>> {
        self.rows_of(Stream::Retain, matches!(self.method.retain, Retain::Divergence))
    }

    /// Weights of the likelihood terms' rows.
    ///
    /// `logprob`: of the rows of [`Self::likelihood_rows`], which begin at `first`.
    pub fn likelihood(&self, logprob: &Tensor, first: usize, told: &mut Told) -> Tensor {
        let weight = logprob.zeros_like();
        let Method { forget_weight, retain_weight, .. } = self.method;
        let terms =
            [(Stream::Forget, forget_weight, self.work.forget), (Stream::Retain, retain_weight, self.work.retain)];
        for (index, (stream, factor, totals)) in terms.into_iter().enumerate() {
            let range = self.micro_batch.rows(stream);
            let Some(objective) = self.method.objective(stream).filter(|_| !range.is_empty()) else { continue };
            let part = |t: &Tensor| t.narrow(0, (range.start - first) as i64, range.len() as i64);
            let term = self.with_tokens(stream, &part(logprob), totals, |tokens| objective.term(tokens), objective);
            told.losses[index] = term.loss.to_kind(Kind::Double);
            if stream == Stream::Forget {
                told.numbers = term.numbers;
            }
            part(&weight).copy_(&(term.weight * *factor));
        }
        weight
    }

    /// Calls `body` with the tokens of one stream.
    pub fn with_tokens<T>(
        &self,
        stream: Stream,
        logprob: &Tensor,
        totals: Totals,
        body: impl FnOnce(&Tokens) -> T,
        objective: &dyn Objective,
    ) -> T {
        let (mut owner, mut before, mut num_sequences) = (Vec::new(), Vec::new(), 0);
        for sequence in self.sequences(stream) {
            owner.resize(owner.len() + sequence.rows.len(), num_sequences);
            num_sequences += 1;
            if objective.needs_reference() {
                let reference = self.reference.expect("invariant: the objective was given its reference");
                before.extend_from_slice(reference.logprobs(sequence.sample, sequence.text));
            }
        }
        let owner = upload(&owner, logprob.device());
        let before = objective.needs_reference().then(|| upload(&before, logprob.device()));
        body(&Tokens {
            logprob,
            reference: before.as_ref(),
            sequence: &owner,
            num_sequences,
            totals,
            looked: self.looked,
        })
    }

    /// A loss on the whole distributions of the forget rows: hands on the head's gradients and gives that of the rows.
    #[expect(clippy::too_many_arguments, reason = "the operands of one formula")]
    pub fn distribution(
        &self,
        decoder: &Decoder,
        weights: &Weights,
        rows: &Rows,
        targets: &Tensor,
        on: OnRows,
        told: &mut Told,
        sink: &mut dyn Gradients,
    ) -> Tensor {
        let before = on.kind.needs_reference().then(|| self.reference_rows(Stream::Forget));
        let known = before.as_ref().map(|rows| (self.known().head(), rows));
        let of = decoder.distribution(weights, rows, targets, on.kind, known);
        let counts = self.counts(Stream::Forget, self.method.cut(Stream::Forget));
        let each = upload(&counts, decoder.device) / self.work.forget.tokens;
        told.losses[0] = (&of.loss.to_kind(Kind::Double) * &each).sum(Kind::Double);
        let weight = each * self.method.forget_weight;
        decoder.distribution_backward(weights, rows, of, &weight, known, sink)
    }

    /// KL(reference || model) over the retain rows: as [`Self::distribution`].
    pub fn divergence(
        &self,
        decoder: &Decoder,
        weights: &Weights,
        rows: &Rows,
        told: &mut Told,
        sink: &mut dyn Gradients,
    ) -> Tensor {
        let (reference, before) = (self.known(), self.reference_rows(Stream::Retain));
        let divergence = decoder.divergence(weights, rows, reference.head(), &before);
        told.losses[1] = divergence.kl.sum(Kind::Double) / self.work.retain.tokens;
        let factor = self.method.retain_weight / self.work.retain.tokens;
        let weight = Tensor::full([rows.len()], factor, (Kind::Float, decoder.device));
        decoder.divergence_backward(weights, rows, divergence, reference.head(), &before, &weight, sink)
    }

    /// Losses on hidden rows: gives their gradient, `[tokens, hidden]` in the kind of `hidden: [tokens, hidden]`.
    pub fn hidden(&self, hidden: &Tensor, told: &mut Told) -> Tensor {
        let mut grad = hidden.zeros_like();
        if let Forget::Hidden(steering) = self.method.forget
            && !self.micro_batch.rows(Stream::Forget).is_empty()
        {
            let place = Place { stream: Stream::Forget, rows: steering.rows, by_sample: steering.by_sample };
            let target = self.steering_target(hidden, steering);
            let factor = self.method.forget_weight;
            told.losses[0] = self.squared_difference(hidden, &target, place, self.work.forget, factor, &mut grad);
        }
        if let Retain::Embedding { rows, by_sample, .. } = self.method.retain
            && !self.micro_batch.rows(Stream::Retain).is_empty()
        {
            let place = Place { stream: Stream::Retain, rows, by_sample };
            let known = self.reference_hidden(Stream::Retain);
            let target = known.index_select(0, &upload(&self.within(Stream::Retain, rows), hidden.device()));
            let factor = self.method.retain_weight;
            told.losses[1] = self.squared_difference(hidden, &target, place, self.work.retain, factor, &mut grad);
        }
        grad
    }

    /// `[rows or 1, hidden]` f32.
    fn steering_target(&self, hidden: &Tensor, steering: Steering) -> Tensor {
        let u = direction(hidden.size()[1], self.method.seed, hidden).unsqueeze(0) * steering.coefficient;
        if !steering.adaptive {
            return u;
        }
        let known = self.reference_hidden(Stream::Forget);
        let known = known.index_select(0, &upload(&self.within(Stream::Forget, steering.rows), hidden.device()));
        let length = known.to_kind(Kind::Float).square().sum_dim_intlist(1i64, true, Kind::Float).sqrt();
        length * u
    }

    /// The loss `sum over rows of w * mean over dimensions of (hidden - target)^2`; its gradient times `factor` goes to `grad`.
    fn squared_difference(
        &self,
        hidden: &Tensor,
        target: &Tensor,
        place: Place,
        totals: Totals,
        factor: f64,
        grad: &mut Tensor,
    ) -> Tensor {
        let device = hidden.device();
        let mut at = Vec::new();
        let mut weight: Vec<f32> = Vec::new();
        for (rows, start) in self.places(place.stream, place.rows) {
            let each = if place.by_sample { rows.len() as f64 * totals.sequences } else { totals.tokens };
            weight.resize(weight.len() + rows.len(), (1.0 / each) as f32);
            at.extend(rows.iter().map(|row| start + row));
        }
        let (at, weight) = (upload(&at, device), upload(&weight, device).unsqueeze(1));
        let difference = hidden.index_select(0, &at).to_kind(Kind::Float) - target.to_kind(Kind::Float);
        let each = weight / hidden.size()[1] as f64;
        let loss = (difference.square() * &each).sum(Kind::Double);
        let d_rows = difference * each * (2.0 * factor);
        let _ = grad.index_add_(0, &at, &d_rows.to_kind(grad.kind()));
        loss
    }

    /// Of each sequence of a stream the tokens that are looked at, counted from its start, and where it starts.
    fn places(&self, stream: Stream, rows: RowsOf) -> Vec<(Vec<i64>, i64)> {
        let mut start = 0;
        let mut places = Vec::new();
        for sequence in &self.micro_batch.sequences {
            if sequence.stream == stream {
                let of = match rows {
                    RowsOf::Every => (0..sequence.len as i64).collect(),
                    // a row of the head is the token before the scored one
                    RowsOf::Scored => {
                        self.micro_batch.positions[sequence.rows.clone()].iter().map(|row| row + 1 - start).collect()
                    }
                };
                places.push((of, start));
            }
            start += sequence.len as i64;
        }
        places
    }

    /// The tokens of [`Self::places`] among all tokens of the stream's sequences here.
    fn within(&self, stream: Stream, rows: RowsOf) -> Vec<i64> {
        let lengths = self.sequences(stream).map(|sequence| sequence.len as i64);
        let starts = lengths.scan(0, |next, len| Some(std::mem::replace(next, *next + len)));
        let places = self.places(stream, rows);
        starts.zip(&places).flat_map(|(start, (rows, _))| rows.iter().map(move |row| start + row)).collect()
    }

    /// 1 for each row of a stream that counts, 0 for those at the start and the end of a sequence that do not.
    fn counts(&self, stream: Stream, cut: Cut) -> Vec<f32> {
        let of = |sequence: &Sequence| {
            let len = sequence.rows.len();
            (0..len).map(move |row| f32::from(u8::from(row >= cut.skip && row + cut.tail < len)))
        };
        self.sequences(stream).flat_map(of).collect()
    }

    fn sequences(&self, stream: Stream) -> impl Iterator<Item = &Sequence> {
        self.micro_batch.sequences.iter().filter(move |sequence| sequence.stream == stream)
    }

    fn known(&self) -> &dyn Reference {
        self.reference.expect("invariant: the method was given its reference")
    }

    fn reference_rows(&self, stream: Stream) -> Tensor {
        self.gathered(stream, |sample| self.known().rows(stream, sample))
    }

    fn reference_hidden(&self, stream: Stream) -> Tensor {
        self.gathered(stream, |sample| self.known().hidden(stream, sample))
    }

    fn gathered(&self, stream: Stream, of: impl Fn(usize) -> Tensor) -> Tensor {
        let parts: Vec<Tensor> = self.sequences(stream).map(|sequence| of(sequence.sample)).collect();
        debug_assert!(self.sequences(stream).all(|sequence| sequence.text == Text::Answer));
        Tensor::cat(&parts, 0)
    }
}

/// Which hidden rows a loss looks at, and how it averages.
#[derive(Clone, Copy)]
struct Place {
    stream: Stream,
    rows: RowsOf,
    by_sample: bool,
}
