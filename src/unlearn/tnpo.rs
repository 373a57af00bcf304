//! Token-wise NPO (Wang et al., arXiv 2502.19301) and its weighted form.

use tch::Kind;

use super::weighted::{ascent, probability};
use super::{Entry, Needs, number};
use crate::config;
use crate::train::{Forget, Objective, Term, Tokens};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Tnpo,
    title: "token-wise NPO (WTNPO with `alpha` above 1)",
    source: "https://arxiv.org/abs/2502.19301",
    needs: Needs { reference: "log-probabilities", ..Needs::NOTHING },
    build: |config| Forget::Likelihood(Box::new(Tnpo { beta: number(config.beta), alpha: number(config.alpha) })),
};

/// `(1/N) sum over tokens of w * log p` with `w = 2 p^(alpha beta) / (p^beta + p_ref^beta + 1e-5)` held constant.
pub struct Tnpo {
    pub beta: f64,
    /// Further exponent of the numerator: 1 for TNPO, 1.5 in the authors' WTNPO.
    pub alpha: f64,
}

impl Objective for Tnpo {
    fn needs_reference(&self) -> bool {
        true
    }

    /// Mean weight of a token.
    fn numbers(&self) -> &'static [&'static str] {
        &["tnpo_weight"]
    }

    fn term(&self, tokens: &Tokens) -> Term {
        let reference = tokens.reference.expect("invariant: asked for by `needs_reference`");
        let p = probability(tokens).pow_tensor_scalar(self.beta);
        let before = (reference.to_kind(Kind::Double) * self.beta).exp();
        ascent(tokens, &(p.pow_tensor_scalar(self.alpha) * 2.0 / (p + before + 1e-5)))
    }
}
