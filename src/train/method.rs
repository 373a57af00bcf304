//! What is minimised: a forget term, a retain term, and what a method changes about the forward pass or over the steps.

use serde_json::{Value, json};
use tch::Tensor;

use super::attack::Adversary;
use super::objective::Objective;
use super::step::Losses;
use crate::data::{RowsOf, Stream, Text, Texts};
use crate::model::{Distribution, ReferenceHead};

/// `forget_weight * forget + retain_weight * retain`.
pub struct Method {
    /// On forget samples, or on the samples to train on.
    pub forget: Forget,
    pub forget_weight: f64,
    pub retain: Retain,
    pub retain_weight: f64,
    /// Perturbs the forget samples' hidden states before the loss sees them.
    pub adversary: Option<Adversary>,
    /// Moves `retain_weight` over the steps.
    pub dual: Option<Dual>,
    /// Of whatever a method draws.
    pub seed: u64,
}

/// A forget term.
pub enum Forget {
    Likelihood(Box<dyn Objective>),
    Distribution(OnRows),
    Hidden(Steering),
}

/// The mean over rows of a loss on the whole distribution.
#[derive(Clone, Copy, Debug)]
pub struct OnRows {
    pub kind: Distribution,
    pub rows: RowsOf,
    /// Scored tokens at the start of each answer that do not count.
    pub skip: usize,
    /// Divide by samples x (longest sample - 1), as programs do that average over padded batches.
    pub over_padding: bool,
}

/// Pulls the hidden states of the forget samples to a random direction: mean over rows and dimensions of
/// `(h - coefficient * u)^2`, with u uniform in [0, 1) and of length 1 (RMU, arXiv 2403.03218).
#[derive(Clone, Copy, Debug)]
pub struct Steering {
    /// Rows that enter this layer are steered: the output of layer `edge - 1`.
    pub edge: usize,
    pub coefficient: f64,
    /// The coefficient is multiplied with the length of the reference's row.
    pub adaptive: bool,
    /// All tokens, or those of the answer.
    pub rows: RowsOf,
    /// Mean over each sample's rows, then over samples, instead of over all rows.
    pub by_sample: bool,
}

/// What holds the model on the retain samples.
pub enum Retain {
    None,
    Likelihood(Box<dyn Objective>),
    /// KL(reference || model), summed over rows and divided by [`super::Totals::tokens`].
    Divergence,
    /// Mean over rows and dimensions of the squared difference from the reference's rows that enter layer `edge`.
    Embedding {
        edge: usize,
        rows: RowsOf,
        by_sample: bool,
    },
}

/// The weight of a retain term that is to stay below a bound: the dual variable of the constraint (PDU, arXiv 2506.05314).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dual {
    /// Largest retain loss that is accepted.
    pub bound: f64,
    /// Step size of the dual variable.
    pub rate: f64,
    /// Steps before it moves.
    pub warmup: usize,
}

/// What the model before training says of the samples.
pub trait Reference {
    /// Log-probabilities of the scored tokens of one of a forget sample's texts.
    fn logprobs(&self, sample: usize, text: Text) -> &[f32];
    /// The head of the reference model, where [`Method::reference`] asks for rows.
    fn head(&self) -> &ReferenceHead;
    /// The sample's rows (those that the method's [`Cut`] names) after the reference's final norm, `[rows, hidden]` in the model's kind.
    fn rows(&self, stream: Stream, sample: usize) -> Tensor;
    /// The sample's rows that enter the edge which the method looks at, `[tokens, hidden]` in the model's kind.
    fn hidden(&self, stream: Stream, sample: usize) -> Tensor;
}

/// What of a stream's samples goes through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub texts: Texts,
    /// Rows of the head.
    pub rows: RowsOf,
    /// Rows that the denominator counts.
    pub counted: RowsOf,
    /// Rows at the start and at the end of each sample that do not count.
    pub skip: usize,
    pub tail: usize,
}

impl Default for Cut {
    fn default() -> Self {
        Self { texts: Texts::Answer, rows: RowsOf::Scored, counted: RowsOf::Scored, skip: 0, tail: 0 }
    }
}

/// What must be known of the model before training.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReferenceNeeds {
    /// Log-probabilities of these texts of the forget samples.
    pub logprobs: Vec<Text>,
    /// Rows after the final norm, and the head.
    pub rows: Vec<Stream>,
    /// Rows that enter an edge.
    pub hidden: Vec<(Stream, usize)>,
}

impl Method {
    /// A method without anything that changes over the steps.
    pub fn new(forget: Forget, retain: Retain) -> Self {
        Self { forget, forget_weight: 1.0, retain, retain_weight: 1.0, adversary: None, dual: None, seed: 0 }
    }

    pub fn cut(&self, stream: Stream) -> Cut {
        match (stream, &self.forget, &self.retain) {
            (Stream::Forget, Forget::Likelihood(objective), _) | (Stream::Retain, _, Retain::Likelihood(objective)) => {
                Cut { texts: objective.texts(), ..Cut::default() }
            }
            (Stream::Forget, Forget::Distribution(on), _) => {
                // behind the last token nothing is predicted
                let tail = usize::from(on.rows == RowsOf::Every);
                Cut { rows: on.rows, counted: on.rows, skip: on.skip, tail, ..Cut::default() }
            }
            (Stream::Forget, Forget::Hidden(steering), _) => Cut { counted: steering.rows, ..Cut::default() },
            (Stream::Retain, _, Retain::Divergence) => {
                Cut { rows: RowsOf::Every, counted: RowsOf::Every, ..Cut::default() }
            }
            (Stream::Retain, _, Retain::Embedding { rows, .. }) => Cut { counted: *rows, ..Cut::default() },
            (Stream::Retain, _, Retain::None) => Cut::default(),
        }
    }

    /// The texts of forget samples that go through the model once more at the start of a step.
    pub fn looks_at(&self) -> Option<Texts> {
        self.likelihood().and_then(|objective| objective.looks_at())
    }

    /// Names of the numbers that each step tells besides its losses.
    pub fn numbers(&self) -> &'static [&'static str] {
        self.likelihood().map_or(&[], |objective| objective.numbers())
    }

    /// What must be known of the model before training.
    pub fn reference(&self) -> ReferenceNeeds {
        let mut needs = ReferenceNeeds::default();
        if let Some(objective) = self.likelihood().filter(|objective| objective.needs_reference()) {
            let texts = [Some(objective.texts()), objective.looks_at()].into_iter().flatten();
            for text in texts.flat_map(|texts| texts.each()) {
                if !needs.logprobs.contains(text) {
                    needs.logprobs.push(*text);
                }
            }
        }
        match &self.forget {
            Forget::Distribution(on) if on.kind.needs_reference() => needs.rows.push(Stream::Forget),
            Forget::Hidden(steering) if steering.adaptive => needs.hidden.push((Stream::Forget, steering.edge)),
            _ => {}
        }
        match self.retain {
            Retain::Divergence => needs.rows.push(Stream::Retain),
            Retain::Embedding { edge, .. } => needs.hidden.push((Stream::Retain, edge)),
            _ => {}
        }
        needs
    }

    /// The edge at which hidden rows are looked at.
    pub fn watched(&self) -> Option<usize> {
        match (&self.forget, &self.retain) {
            (Forget::Hidden(steering), _) => Some(steering.edge),
            (_, Retain::Embedding { edge, .. }) => Some(*edge),
            _ => None,
        }
    }

    /// Whether a stream's term is computed from the head.
    pub fn needs_head(&self, stream: Stream) -> bool {
        match stream {
            Stream::Forget => !matches!(self.forget, Forget::Hidden(_)),
            Stream::Retain => matches!(self.retain, Retain::Likelihood(_) | Retain::Divergence),
        }
    }

    /// The objective of a stream, where it is one over log-probabilities.
    pub fn objective(&self, stream: Stream) -> Option<&dyn Objective> {
        match (stream, &self.forget, &self.retain) {
            (Stream::Forget, Forget::Likelihood(objective), _) | (Stream::Retain, _, Retain::Likelihood(objective)) => {
                Some(objective.as_ref())
            }
            _ => None,
        }
    }

    fn likelihood(&self) -> Option<&dyn Objective> {
        self.objective(Stream::Forget)
    }

    /// Follows a step (from 0) that has ended: the dual variable rises while the retain loss is above its bound.
    pub(super) fn after(&mut self, step: usize, losses: &Losses) {
        if let Some(dual) = self.dual.filter(|dual| step >= dual.warmup) {
            self.retain_weight = (self.retain_weight + dual.rate * (losses.retain - dual.bound)).max(0.0);
        }
    }

    /// What changes over the steps, for a checkpoint; null where nothing does.
    pub fn state(&self) -> Value {
        match self.dual {
            Some(_) => json!({ "dual": self.retain_weight }),
            None => Value::Null,
        }
    }

    /// Takes up the state of [`Self::state`].
    ///
    /// # Errors
    /// A state of another method, in words.
    pub fn restore(&mut self, state: &Value) -> Result<(), String> {
        match (self.dual, state["dual"].as_f64()) {
            (None, _) if state.is_null() => Ok(()),
            (Some(_), Some(weight)) => {
                self.retain_weight = weight;
                Ok(())
            }
            (dual, _) => Err(format!(
                "the state of the method is {state}, expected {}",
                if dual.is_some() { "{\"dual\": number}" } else { "null" }
            )),
        }
    }
}
