//! Answer preservation (Yuan et al., arXiv 2410.08109): the retain term that goes with refusal tuning.

use tch::Kind;

use super::npo::softplus;
use crate::data::Texts;
use crate::train::{Objective, Term, Tokens, join_pairs, split_pairs};

/// `-(1/beta) mean over samples of log sigmoid(beta (log pi(answer) - log pi(refusal)))`: on retain questions the answer stays
/// likelier than a refusal. Sums over the tokens of a text, no reference.
pub struct AnswerPreservation {
    /// Unit: 1/nat.
    pub beta: f64,
}

impl Objective for AnswerPreservation {
    fn texts(&self) -> Texts {
        Texts::Both
    }

    /// Derivative by an answer's log-probability: -sigmoid(-beta margin); by the refusal's: plus that.
    fn term(&self, tokens: &Tokens) -> Term {
        let (answer, refusal) = split_pairs(&tokens.sum_by_sequence(tokens.logprob));
        let scaled = (refusal - answer) * self.beta;
        let weight = scaled.sigmoid() / tokens.totals.sequences;
        Term {
            numbers: Vec::new(),
            loss: softplus(&scaled).sum(Kind::Double) / (self.beta * tokens.totals.sequences),
            weight: tokens.at_tokens(&join_pairs(&-&weight, &weight)),
        }
    }
}
