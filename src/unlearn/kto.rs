//! KTO as the NPO paper compares with it (arXiv 2404.05868, appendix), in the form of the paper and in that of its code.

use tch::{Kind, Tensor};

use super::npo::softplus;
use super::{Entry, Needs, number};
use crate::config;
use crate::data::Texts;
use crate::train::{Forget, Objective, Term, Tokens};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Kto,
    title: "Kahneman-Tversky optimization on undesired answers",
    source: "https://arxiv.org/abs/2404.05868",
    needs: Needs { reference: "log-probabilities", preferred: "a refusal", ..Needs::NOTHING },
    build: |config| {
        let is_code = config.form.expect("invariant: filled in") == config::Form::Code;
        Forget::Likelihood(Box::new(Kto { beta: number(config.beta), is_code }))
    },
};

/// `(2/beta) mean over samples of -log sigmoid(z - beta r)`, r the answer's log-ratio to the reference.
///
/// z = beta times the mean over the step's samples of the log-ratio of (question, refusal), held constant. The code has z without
/// beta and adds 1 to the loss. The refusals of the whole global batch are looked at before anything else in the step, so z is the
/// same for every number of ranks and micro-batches.
pub struct Kto {
    /// Unit: 1/nat.
    pub beta: f64,
    pub is_code: bool,
}

impl Objective for Kto {
    fn needs_reference(&self) -> bool {
        true
    }

    /// Mean over the samples of r.
    fn numbers(&self) -> &'static [&'static str] {
        &["kto_log_ratio"]
    }

    fn looks_at(&self) -> Option<Texts> {
        Some(Texts::Preferred)
    }

    fn num_looked(&self) -> i64 {
        1
    }

    fn look(&self, tokens: &Tokens) -> Tensor {
        tokens.log_ratios().sum(Kind::Double).view([1]) / tokens.totals.sequences
    }

    fn term(&self, tokens: &Tokens) -> Term {
        let mean = tokens.looked.expect("invariant: asked for by `looks_at`");
        let z = mean * if self.is_code { 1.0 } else { self.beta };
        let ratio = tokens.log_ratios();
        let scaled = &ratio * self.beta - z;
        let weight = scaled.sigmoid() * (2.0 / tokens.totals.sequences);
        let constant = if self.is_code { tokens.num_sequences as f64 / tokens.totals.sequences } else { 0.0 };
        Term {
            numbers: vec![ratio.sum(Kind::Double) / tokens.totals.sequences],
            loss: softplus(&scaled).sum(Kind::Double) * (2.0 / self.beta / tokens.totals.sequences) + constant,
            weight: tokens.at_tokens(&weight),
        }
    }
}
