//! What a likelihood method is: log-probabilities in, a loss and one weight per token out.

use tch::{Kind, Tensor};

use crate::data::Texts;

/// Scored tokens of one stream in one micro-batch. Sequences are whole: none continues in another micro-batch.
///
/// With [`Texts::Both`] the sequences come in pairs: of sample k the answer is sequence 2k, the preferred answer 2k + 1.
pub struct Tokens<'a> {
    /// `[tokens]`: log-probability of each token.
    pub logprob: &'a Tensor,
    /// `[tokens]`: the same under the model before training; for objectives that ask for it.
    pub reference: Option<&'a Tensor>,
    /// `[tokens]` i64: the sequence that each token belongs to.
    pub sequence: &'a Tensor,
    /// Sequences in this micro-batch.
    pub num_sequences: i64,
    /// Counts over the whole step, all ranks and micro-batches: the denominators.
    pub totals: Totals,
    /// `[n]` f64: what [`Objective::look`] gave, summed over the whole step; for objectives that look first.
    pub looked: Option<&'a Tensor>,
}

/// What one step holds of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Samples, whatever the number of their texts.
    pub sequences: f64,
    /// Rows that count: scored tokens (of the answers, where both texts are there), or all tokens.
    pub tokens: f64,
}

/// A micro-batch's part of a loss.
pub struct Term {
    /// The part itself, one number; the parts of a step add up to the loss.
    pub loss: Tensor,
    /// `[tokens]`: its derivative by each log-probability.
    pub weight: Tensor,
    /// Parts of [`Objective::numbers`], in that order, one number each; they add up over the step as the loss does.
    pub numbers: Vec<Tensor>,
}

/// A loss over log-probabilities. It knows neither ranks nor micro-batches beyond [`Tokens::totals`].
pub trait Objective {
    /// Whether [`Tokens::reference`] must be there.
    fn needs_reference(&self) -> bool {
        false
    }

    /// The texts of a sample that [`Self::term`] is given.
    fn texts(&self) -> Texts {
        Texts::Answer
    }

    /// Names of what the method tells of each step besides its loss, as they stand in `metrics.jsonl`.
    fn numbers(&self) -> &'static [&'static str] {
        &[]
    }

    /// The texts that [`Self::look`] is given, for a loss that is no sum over samples: they go through the model once more, without
    /// backward, before anything else in the step.
    fn looks_at(&self) -> Option<Texts> {
        None
    }

    /// How many numbers [`Self::look`] gives.
    fn num_looked(&self) -> i64 {
        0
    }

    /// Numbers that [`Self::term`] must know of the whole step: this micro-batch's part, `[n]` f64.
    fn look(&self, _tokens: &Tokens) -> Tensor {
        unreachable!("invariant: only asked of an objective that looks")
    }

    fn term(&self, tokens: &Tokens) -> Term;
}

impl Tokens<'_> {
    /// The sum of `each: [tokens]` over every sequence: `[sequences]` f64.
    pub fn sum_by_sequence(&self, each: &Tensor) -> Tensor {
        let each = each.to_kind(Kind::Double);
        let zeros = each.new_zeros([self.num_sequences], (Kind::Double, each.device()));
        zeros.index_add(0, self.sequence, &each)
    }

    /// Scored tokens of every sequence: `[sequences]` f64.
    pub fn lengths(&self) -> Tensor {
        self.sum_by_sequence(&self.logprob.ones_like())
    }

    /// `log pi - log pi_ref` of every sequence, summed over its tokens: `[sequences]` f64.
    pub fn log_ratios(&self) -> Tensor {
        let reference = self.reference.expect("invariant: asked for by `needs_reference`");
        self.sum_by_sequence(&(self.logprob.to_kind(Kind::Double) - reference.to_kind(Kind::Double)))
    }

    /// A number of every sequence at each of its tokens, in the kind of the log-probabilities: `[tokens]`.
    pub fn at_tokens(&self, by_sequence: &Tensor) -> Tensor {
        by_sequence.index_select(0, self.sequence).to_kind(self.logprob.kind())
    }
}

/// Answers and preferred answers of pairs: `[pairs]` each, from `[sequences]`.
pub fn split_pairs(by_sequence: &Tensor) -> (Tensor, Tensor) {
    let pairs = by_sequence.view([-1, 2]);
    (pairs.select(1, 0), pairs.select(1, 1))
}

/// The inverse of [`split_pairs`].
pub fn join_pairs(answer: &Tensor, preferred: &Tensor) -> Tensor {
    Tensor::stack(&[answer, preferred], 1).view([-1])
}
