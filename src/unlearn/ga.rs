//! Gradient ascent (Jang et al., arXiv 2210.01504, equation 1).

use super::nll::token_mean;
use super::{Entry, Needs};
use crate::config;
use crate::train::{Forget, Objective, Term, Tokens};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Ga,
    title: "gradient ascent; GradDiff with `nll`, KL-min with `kl`",
    source: "https://arxiv.org/abs/2210.01504",
    needs: Needs::NOTHING,
    build: |_| Forget::Likelihood(Box::new(GradientAscent)),
};

/// `(1/N) sum over tokens of log p`: what fine-tuning minimises, with the sign turned.
///
/// A mean over tokens, as in the published code, not over sequences. It has no lower bound.
pub struct GradientAscent;

impl Objective for GradientAscent {
    fn term(&self, tokens: &Tokens) -> Term {
        token_mean(tokens, 1.0)
    }
}
