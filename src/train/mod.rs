//! The training step: micro-batches through the half blocks, gradients summed while backward runs, clipped, applied.
//!
//! Knows what a loss is (an [`Objective`] over log-probabilities, a loss on distributions or on hidden states) but not which methods
//! exist.

mod attack;
mod batches;
mod gradients;
mod layout;
mod method;
mod objective;
mod optimizer;
mod parameters;
mod random;
mod schedule;
mod selection;
mod state;
mod step;
mod terms;

pub use crate::model::Distribution;
pub use attack::Adversary;
pub use batches::{Batches, Cuts, StepWork};
pub use gradients::{Flight, GradientBuffers, GradientOptions, MAX_UNDER_WAY, Reduced};
pub use layout::{Bucket, Layout, Segment};
pub use method::{Cut, Dual, Forget, Method, OnRows, Reference, ReferenceNeeds, Retain, Steering};
pub use objective::{Objective, Term, Tokens, Totals, join_pairs, split_pairs};
pub use optimizer::{Optimizer, Update};
pub use parameters::{Parameters, Source};
pub use random::RandomTrainer;
pub use schedule::Schedule;
pub use selection::Selection;
pub use step::{Launched, Losses, NonFinite, StepReport, Trainer, TrainerOptions};

/// The kind of tensor that a configuration names.
pub fn kind(float: crate::config::Float) -> tch::Kind {
    match float {
        crate::config::Float::F32 => tch::Kind::Float,
        crate::config::Float::Bf16 => tch::Kind::BFloat16,
    }
}
