//! Negative preference optimization (Zhang et al., arXiv 2404.05868, equation 3).

use tch::{Kind, Tensor};

use super::{Entry, Needs, number};
use crate::config;
use crate::train::{Forget, Objective, Term, Tokens};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Npo,
    title: "negative preference optimization",
    source: "https://arxiv.org/abs/2404.05868",
    needs: Needs { reference: "log-probabilities", ..Needs::NOTHING },
    build: |config| Forget::Likelihood(Box::new(Npo { beta: number(config.beta) })),
};

/// `(2/beta) mean over sequences of log(1 + (pi/pi_ref)^beta)`.
///
/// `pi` is the probability of the whole answer: log-probabilities are *summed* over its tokens, so `beta` keeps the meaning
/// that it has in the paper. The mean runs over the forget sequences of the whole step.
pub struct Npo {
    /// Unit: 1/nat. As it goes to 0 the gradient goes to that of ascent on summed log-probabilities.
    pub beta: f64,
}

impl Objective for Npo {
    fn needs_reference(&self) -> bool {
        true
    }

    /// Mean over the forget sequences of log(pi/pi_ref), and of the weight 2 pi^beta / (pi^beta + pi_ref^beta), which is 1 at the
    /// start and goes to 0 as a sequence is forgotten.
    fn numbers(&self) -> &'static [&'static str] {
        &["npo_log_ratio", "npo_weight"]
    }

    /// With D = log pi - log pi_ref of a sequence: loss (2/beta) softplus(beta D), derivative 2 sigmoid(beta D).
    fn term(&self, tokens: &Tokens) -> Term {
        let ratio = tokens.log_ratios();
        let scaled = &ratio * self.beta;
        let weight = scaled.sigmoid() * (2.0 / tokens.totals.sequences);
        Term {
            numbers: vec![ratio.sum(Kind::Double) / tokens.totals.sequences, weight.sum(Kind::Double)],
            loss: softplus(&scaled).sum(Kind::Double) * (2.0 / self.beta / tokens.totals.sequences),
            weight: tokens.at_tokens(&weight),
        }
    }
}

/// log(1 + e^x) = -log sigmoid(-x), without overflow at either end.
pub(super) fn softplus(x: &Tensor) -> Tensor {
    -(-x).log_sigmoid()
}
