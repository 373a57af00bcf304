//! What a likelihood method is: log-probabilities in, a loss and one weight per token out.

use tch::Tensor;

/// Scored tokens of one stream in one micro-batch. Sequences are whole: none continues in another micro-batch.
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
}

/// What one step holds of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    pub sequences: f64,
    /// Scored tokens.
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

    /// Names of what the method tells of each step besides its loss, as they stand in `metrics.jsonl`.
    fn numbers(&self) -> &'static [&'static str] {
        &[]
    }

    fn term(&self, tokens: &Tokens) -> Term;
}
