//! Gradient ascent with a weight for each token: what WGA, TNPO and SatImp have in common.

use tch::{Kind, Tensor};

use crate::train::{Term, Tokens};

/// `(1/N) sum over tokens of w * log p`, the weights held constant: `weight: [tokens]` f64.
pub(super) fn ascent(tokens: &Tokens, weight: &Tensor) -> Term {
    let each = weight / tokens.totals.tokens;
    Term {
        loss: (tokens.logprob.to_kind(Kind::Double) * &each).sum(Kind::Double),
        numbers: vec![each.sum(Kind::Double)],
        weight: each.to_kind(tokens.logprob.kind()),
    }
}

pub(super) fn probability(tokens: &Tokens) -> Tensor {
    tokens.logprob.to_kind(Kind::Double).exp()
}
