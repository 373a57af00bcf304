//! Negative log-likelihood: fine-tuning, refusal tuning, and the retain term.

use tch::Kind;

use crate::config;
use crate::data::Texts;
use crate::train::{Forget, Objective, Term, Tokens};
use crate::unlearn::{Entry, Needs};

pub const FINETUNE: Entry = Entry {
    objective: config::Objective::Finetune,
    title: "fine-tuning, to make a model that knows",
    source: "",
    needs: Needs::NOTHING,
    build: |_| Forget::Likelihood(Box::new(NegativeLogLikelihood { texts: Texts::Answer })),
};

pub const UNLEARN: Entry = Entry {
    objective: config::Objective::Unlearn,
    title: "UNLEARN: what is the task's own, found layer by layer, is subtracted from the matrices",
    source: "https://arxiv.org/abs/2408.04140",
    needs: Needs { similar: true, trains_few: true, ..Needs::NOTHING },
    ..FINETUNE
};

pub const LEARN: Entry = Entry {
    objective: config::Objective::Learn,
    title: "LEARN, UNLEARN's dual: the task's own matrices are added",
    ..UNLEARN
};

pub const IDK: Entry = Entry {
    objective: config::Objective::Idk,
    title: "refusal tuning: learn to refuse the forget questions",
    source: "https://arxiv.org/abs/2401.06121",
    needs: Needs { preferred: "a refusal", ..Needs::NOTHING },
    build: |_| Forget::Likelihood(Box::new(NegativeLogLikelihood { texts: Texts::Preferred })),
};

/// `-(1/N) sum over tokens of log p`, with N the scored tokens of the whole step.
pub struct NegativeLogLikelihood {
    pub texts: Texts,
}

impl Objective for NegativeLogLikelihood {
    fn texts(&self) -> Texts {
        self.texts
    }

    fn term(&self, tokens: &Tokens) -> Term {
        token_mean(tokens, -1.0)
    }
}

pub(super) fn token_mean(tokens: &Tokens, sign: f64) -> Term {
    let each = sign / tokens.totals.tokens;
    Term { loss: tokens.logprob.sum(Kind::Double) * each, weight: tokens.logprob.full_like(each), numbers: Vec::new() }
}
