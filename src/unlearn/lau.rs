//! Latent adversarial unlearning (Yuan et al., arXiv 2408.10682): NPO and RMU on hidden states that an attack has moved.

use super::{Entry, Needs, npo, number, rmu};
use crate::config::{self, Method};
use crate::train::Adversary;

pub const ADV_NPO: Entry = Entry {
    objective: config::Objective::AdvNpo,
    title: "NPO under attack on the hidden states",
    build: npo::ENTRY.build,
    ..LAU
};

pub const ADV_RMU: Entry = Entry {
    objective: config::Objective::AdvRmu,
    title: "RMU under attack on the hidden states",
    needs: Needs { hidden: true, trains_few: true, ..Needs::NOTHING },
    build: rmu::build,
    ..LAU
};

const LAU: Entry = Entry {
    objective: config::Objective::AdvNpo,
    title: "",
    source: "https://arxiv.org/abs/2408.10682",
    needs: Needs { reference: "log-probabilities", hidden: true, ..Needs::NOTHING },
    build: npo::ENTRY.build,
};

/// The attack that the configuration asks for. The reference is never perturbed.
pub(super) fn adversary(config: &Method) -> Option<Adversary> {
    Some(Adversary {
        edge: config.attack_layer?,
        radius: number(config.attack_radius),
        steps: config.attack_steps.expect("invariant: filled in"),
    })
}
