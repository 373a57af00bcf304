//! SatImp: saturation and importance (Yang et al., arXiv 2505.11953).

use super::weighted::{ascent, probability};
use super::{Entry, Needs, number};
use crate::config;
use crate::train::{Forget, Objective, Term, Tokens};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Satimp,
    title: "saturation and importance: weight p^beta1 (1 - p)^beta2 a token",
    source: "https://arxiv.org/abs/2505.11953",
    needs: Needs::NOTHING,
    build: |config| Forget::Likelihood(Box::new(SatImp { beta1: number(config.beta1), beta2: number(config.beta2) })),
};

/// `(1/N) sum over tokens of p^beta1 (1 - p)^beta2 * log p`, the weight held constant. SimSat is beta2 = 0, SimImp beta1 = 0.
pub struct SatImp {
    pub beta1: f64,
    pub beta2: f64,
}

impl Objective for SatImp {
    /// Mean weight of a token.
    fn numbers(&self) -> &'static [&'static str] {
        &["satimp_weight"]
    }

    fn term(&self, tokens: &Tokens) -> Term {
        let p = probability(tokens);
        let unsure = (-&p + 1.0).clamp_min(0.0);
        ascent(tokens, &(p.pow_tensor_scalar(self.beta1) * unsure.pow_tensor_scalar(self.beta2)))
    }
}
