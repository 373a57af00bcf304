//! RMU: representation misdirection (Li et al., arXiv 2403.03218).

use super::{Entry, Needs, number};
use crate::config::{self, Compat, Method, Positions};
use crate::data::RowsOf;
use crate::train::{Forget, Steering};

pub const ENTRY: Entry = Entry {
    objective: config::Objective::Rmu,
    title: "steer hidden states to a random direction",
    source: "https://arxiv.org/abs/2403.03218",
    needs: Needs { hidden: true, trains_few: true, ..Needs::NOTHING },
    build,
};

/// `mean over tokens and dimensions of (h - c u)^2`, h the output of layer `layer`, u drawn once from the seed.
///
/// Adaptive: c is multiplied with the length of the reference's row. In OpenUnlearning's form the mean is over each answer's
/// tokens, then over samples.
pub(super) fn build(config: &Method) -> Forget {
    Forget::Hidden(Steering {
        edge: config.layer.expect("invariant: filled in") + 1,
        coefficient: number(config.steering),
        adaptive: config.adaptive.unwrap_or(false),
        rows: rows(config),
        by_sample: config.compat == Some(Compat::OpenUnlearning),
    })
}

/// Tokens whose hidden rows are looked at.
pub(super) fn rows(config: &Method) -> RowsOf {
    match config.positions {
        Some(Positions::Answer) => RowsOf::Scored,
        _ => RowsOf::Every,
    }
}
