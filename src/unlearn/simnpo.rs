//! SimNPO (Fan et al., arXiv 2410.07163): NPO without a reference, normalised by length.

use tch::Kind;

use super::npo::softplus;
use super::{Entry, Needs, number};
use crate::config;
use crate::train::{Forget, Objective, Term, Tokens};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Simnpo,
    title: "SimNPO: NPO without a reference, by length",
    source: "https://arxiv.org/abs/2410.07163",
    needs: Needs::NOTHING,
    build: |config| Forget::Likelihood(Box::new(SimNpo { beta: number(config.beta), delta: number(config.delta) })),
};

/// `-(2/beta) mean over samples of log sigmoid(beta (nll / length - delta))`.
///
/// `delta` stands inside, as in the authors' code (which calls it gamma): the paper's margin is beta * delta.
pub struct SimNpo {
    /// Unit: 1/nat.
    pub beta: f64,
    /// Unit: nats a token.
    pub delta: f64,
}

impl Objective for SimNpo {
    /// Mean over the samples of the log-probability of a token.
    fn numbers(&self) -> &'static [&'static str] {
        &["simnpo_logprob"]
    }

    /// With m the mean log-probability of an answer's tokens: loss (2/beta) softplus(beta (m + delta)), derivative by a token
    /// 2 sigmoid(beta (m + delta)) / length.
    fn term(&self, tokens: &Tokens) -> Term {
        let lengths = tokens.lengths();
        let mean = tokens.sum_by_sequence(tokens.logprob) / &lengths;
        let scaled = (&mean + self.delta) * self.beta;
        let weight = scaled.sigmoid() * (2.0 / tokens.totals.sequences) / lengths;
        Term {
            numbers: vec![mean.sum(Kind::Double) / tokens.totals.sequences],
            loss: softplus(&scaled).sum(Kind::Double) * (2.0 / self.beta / tokens.totals.sequences),
            weight: tokens.at_tokens(&weight),
        }
    }
}
