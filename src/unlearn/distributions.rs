//! Objectives on the whole distribution of a token: the head has their formulas and gradients (`model::Distribution`).

use super::{Entry, Needs, number};
use crate::config::{self, Compat, Method, Positions};
use crate::data::RowsOf;
use crate::train::{Distribution, Forget, OnRows};

pub const ME: Entry = Entry {
    objective: config::Objective::Me,
    title: "maximising entropy: KL from the uniform distribution",
    source: "https://arxiv.org/abs/2410.08109",
    needs: Needs::NOTHING,
    build: |config| on(config, Distribution::Uniform),
};

pub const UNDIAL: Entry = Entry {
    objective: config::Objective::Undial,
    title: "self-distillation with the answer's logit lowered",
    source: "https://arxiv.org/abs/2402.10052",
    needs: Needs { reference: "final hidden rows", head_copy: true, ..Needs::NOTHING },
    build: |config| on(config, Distribution::SoftTarget { beta: number(config.beta) }),
};

pub const CE_U: Entry = Entry {
    objective: config::Objective::CeU,
    title: "cross-entropy to the model's own distribution without the answer",
    source: "https://arxiv.org/abs/2503.01224",
    needs: Needs::NOTHING,
    build: |config| on(config, Distribution::WithoutTarget),
};

pub const IHL: Entry = Entry {
    objective: config::Objective::Ihl,
    title: "inverted hinge loss (LoKU)",
    source: "https://arxiv.org/abs/2408.06621",
    needs: Needs::NOTHING,
    build: |config| on(config, Distribution::Hinge),
};

pub const PDU: Entry = Entry {
    objective: config::Objective::Pdu,
    title: "flat logits under a bound on the retain loss (primal-dual)",
    source: "https://arxiv.org/abs/2506.05314",
    needs: Needs { retain: true, ..Needs::NOTHING },
    build: |config| on(config, Distribution::Margin),
};

/// The mean of a loss over the answers' tokens, or over all positions that predict one.
fn on(config: &Method, kind: Distribution) -> Forget {
    let over_padding = config.compat == Some(Compat::OpenUnlearning) && config.objective == config::Objective::Undial;
    let rows = match config.positions {
        Some(Positions::All) => RowsOf::Every,
        _ => RowsOf::Scored,
    };
    Forget::Distribution(OnRows { kind, rows, skip: config.skip_tokens.unwrap_or(0), over_padding })
}
