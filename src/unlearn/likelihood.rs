//! Token means of the log-likelihood: fine-tuning and the retain term (minus), gradient ascent (plus).

use tch::Kind;

use crate::train::{Objective, Term, Tokens};

/// `-(1/N) sum over tokens of log p`, with N the scored tokens of the whole step.
pub struct NegativeLogLikelihood;

/// `(1/N) sum over tokens of log p`: what fine-tuning minimises, with the sign turned (arXiv 2401.06121, section 3).
///
/// A mean over tokens, as in the published code, not over sequences. It has no lower bound.
pub struct GradientAscent;

impl Objective for NegativeLogLikelihood {
    fn term(&self, tokens: &Tokens) -> Term {
        token_mean(tokens, -1.0)
    }
}

impl Objective for GradientAscent {
    fn term(&self, tokens: &Tokens) -> Term {
        token_mean(tokens, 1.0)
    }
}

fn token_mean(tokens: &Tokens, sign: f64) -> Term {
    let each = sign / tokens.totals.tokens;
    Term { loss: tokens.logprob.sum(Kind::Double) * each, weight: tokens.logprob.full_like(each), numbers: Vec::new() }
}
