//! Weighted gradient ascent (Wang et al., arXiv 2502.19301).

use super::weighted::{ascent, probability};
use super::{Entry, Needs, number};
use crate::config;
use crate::train::{Forget, Objective, Term, Tokens};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Wga,
    title: "weighted gradient ascent: weight p^beta a token",
    source: "https://arxiv.org/abs/2502.19301",
    needs: Needs::NOTHING,
    build: |config| Forget::Likelihood(Box::new(Wga { beta: number(config.beta) })),
};

/// `(1/N) sum over tokens of p^beta * log p`, p^beta held constant: tokens that are forgotten already count no more.
pub struct Wga {
    pub beta: f64,
}

impl Objective for Wga {
    /// Mean weight of a token.
    fn numbers(&self) -> &'static [&'static str] {
        &["wga_weight"]
    }

    fn term(&self, tokens: &Tokens) -> Term {
        ascent(tokens, &probability(tokens).pow_tensor_scalar(self.beta))
    }
}
