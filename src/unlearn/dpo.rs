//! Direct preference optimization in three dresses: pairs from the data, refusals, alternates.

use tch::Kind;

use super::npo::softplus;
use super::{Entry, Needs, number};
use crate::config::{self, Method};
use crate::data::Texts;
use crate::train::{Forget, Objective, Term, Tokens, join_pairs, split_pairs};

const NEEDS: Needs = Needs { reference: "log-probabilities", ..Needs::NOTHING };

pub const DPO: Entry = Entry {
    objective: config::Objective::Dpo,
    title: "direct preference optimization: chosen before rejected",
    source: "https://arxiv.org/abs/2305.18290",
    needs: Needs { preferred: "a chosen answer", ..NEEDS },
    build,
};

pub const IDK_DPO: Entry = Entry {
    objective: config::Objective::IdkDpo,
    title: "DPO with a refusal before the answer",
    source: "https://arxiv.org/abs/2404.05868",
    needs: Needs { preferred: "a refusal", ..NEEDS },
    build,
};

pub const ALT_PO: Entry = Entry {
    objective: config::Objective::Altpo,
    title: "alternate preference optimization: other answers before the true one",
    source: "https://arxiv.org/abs/2409.13474",
    needs: Needs { preferred: "alternates", ..NEEDS },
    build,
};

fn build(config: &Method) -> Forget {
    Forget::Likelihood(Box::new(Dpo { beta: number(config.beta) }))
}

/// `-(2/beta) mean over samples of log sigmoid(beta (r_preferred - r_answer))`, r = log pi - log pi_ref summed over the text.
///
/// The factor is 2/beta, as in the code of the NPO paper and of OpenUnlearning; DPO's own paper has 1.
pub struct Dpo {
    /// Unit: 1/nat.
    pub beta: f64,
}

impl Objective for Dpo {
    fn needs_reference(&self) -> bool {
        true
    }

    fn texts(&self) -> Texts {
        Texts::Both
    }

    /// Mean over the samples of `r_preferred - r_answer`.
    fn numbers(&self) -> &'static [&'static str] {
        &["dpo_margin"]
    }

    /// Derivative by an answer's log-probability: 2 sigmoid(-beta margin); by the preferred one's: minus that.
    fn term(&self, tokens: &Tokens) -> Term {
        let (answer, preferred) = split_pairs(&tokens.log_ratios());
        let margin = preferred - answer;
        let weight = (&margin * -self.beta).sigmoid() * (2.0 / tokens.totals.sequences);
        Term {
            numbers: vec![margin.sum(Kind::Double) / tokens.totals.sequences],
            loss: softplus(&(margin * -self.beta)).sum(Kind::Double) * (2.0 / self.beta / tokens.totals.sequences),
            weight: tokens.at_tokens(&join_pairs(&weight, &-&weight)),
        }
    }
}
