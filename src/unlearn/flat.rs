//! FLAT: forget data and template answers alone, an f-divergence between them (Wang et al., arXiv 2410.11143).

use tch::{Kind, Tensor};

use super::{Entry, Needs};
use crate::config::{self, Divergence, Mean};
use crate::data::Texts;
use crate::train::{Forget, Objective, Term, Tokens, join_pairs, split_pairs};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Flat,
    title: "FLAT: refusals and forget answers apart in an f-divergence",
    source: "https://arxiv.org/abs/2410.11143",
    needs: Needs { preferred: "a refusal", ..Needs::NOTHING },
    build: |config| {
        let divergence = config.divergence.expect("invariant: filled in");
        let by_batch = config.mean.expect("invariant: filled in") == Mean::Batch;
        Forget::Likelihood(Box::new(Flat { divergence, by_batch }))
    },
};

/// `-g(P_e) + f*(g(P_f))` of the mean token probabilities of the refusal (e) and of the forget answer (f).
///
/// | divergence | loss |
/// |---|---|
/// | tv | (tanh P_f - tanh P_e) / 2 |
/// | kl | exp(P_f - 1) - P_e |
/// | js | log(1 + exp(-P_e)) + P_f + log(1 + exp(-P_f)) - 2 log 2 |
/// | pearson | P_f^2 / 4 + P_f - P_e |
///
/// The means are over each answer's tokens and the loss is averaged over samples; with `by_batch` they are over all tokens of the
/// global batch and the loss is taken once (for which the samples are looked at before anything else in the step).
pub struct Flat {
    pub divergence: Divergence,
    pub by_batch: bool,
}

impl Flat {
    /// Losses, and their derivatives by P_f and by P_e.
    pub(super) fn values(&self, forget: &Tensor, refusal: &Tensor) -> (Tensor, Tensor, Tensor) {
        let minus_one = || refusal.full_like(-1.0);
        match self.divergence {
            Divergence::Tv => {
                let slope = |p: &Tensor| (1.0 - p.tanh().square()) * 0.5;
                ((forget.tanh() - refusal.tanh()) * 0.5, slope(forget), -slope(refusal))
            }
            Divergence::Kl => {
                let grown: Tensor = (forget - 1.0).exp();
                (&grown - refusal, grown, minus_one())
            }
            Divergence::Js => {
                let softplus = |p: &Tensor| super::npo::softplus(&-p);
                let constant = 2.0 * std::f64::consts::LN_2;
                let loss = softplus(refusal) + forget + softplus(forget) - constant;
                (loss, forget.sigmoid(), -(-refusal).sigmoid())
            }
            Divergence::Pearson => (forget.square() * 0.25 + forget - refusal, forget * 0.5 + 1.0, minus_one()),
        }
    }
}

impl Objective for Flat {
    fn texts(&self) -> Texts {
        Texts::Both
    }

    fn looks_at(&self) -> Option<Texts> {
        self.by_batch.then_some(Texts::Both)
    }

    fn num_looked(&self) -> i64 {
        4
    }

    /// Sums of probabilities and numbers of tokens: forget answers, refusals.
    fn look(&self, tokens: &Tokens) -> Tensor {
        let sums = split_pairs(&tokens.sum_by_sequence(&tokens.logprob.to_kind(Kind::Double).exp()));
        let counts = split_pairs(&tokens.lengths());
        Tensor::stack(&[sums.0, sums.1, counts.0, counts.1].map(|x| x.sum(Kind::Double)), 0)
    }

    /// A token's weight is (derivative by the mean) * p / (tokens in the mean).
    fn term(&self, tokens: &Tokens) -> Term {
        let p = tokens.logprob.to_kind(Kind::Double).exp();
        let (loss, by_sequence) = match tokens.looked.filter(|_| self.by_batch) {
            Some(looked) => {
                let at = |i: i64| looked.get(i);
                let (forget, refusal) = (at(0) / at(2), at(1) / at(3));
                let (loss, by_forget, by_refusal) = self.values(&forget, &refusal);
                let pairs = tokens.num_sequences / 2;
                let ones = p.new_ones([pairs], (Kind::Double, p.device()));
                let slopes = join_pairs(&(&ones * by_forget / at(2)), &(&ones * by_refusal / at(3)));
                // every sample tells its share of the one number
                (loss * (pairs as f64 / tokens.totals.sequences), slopes)
            }
            None => {
                let lengths = tokens.lengths();
                let (forget, refusal) = split_pairs(&(tokens.sum_by_sequence(&p) / &lengths));
                let (loss, by_forget, by_refusal) = self.values(&forget, &refusal);
                let slopes = join_pairs(&by_forget, &by_refusal) / lengths / tokens.totals.sequences;
                (loss.sum(Kind::Double) / tokens.totals.sequences, slopes)
            }
        };
        let weight = by_sequence.index_select(0, tokens.sequence) * p;
        Term { loss, weight: weight.to_kind(tokens.logprob.kind()), numbers: Vec::new() }
    }
}
