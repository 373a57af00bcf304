//! The training step: micro-batches through the half blocks, gradients summed while backward runs, clipped, applied.
//!
//! Knows what a loss is (an [`Objective`] over log-probabilities, or a divergence) but not which methods exist.

mod batches;
mod gradients;
mod layout;
mod objective;
mod optimizer;
mod parameters;
mod schedule;
mod state;
mod step;

pub use batches::{Batches, StepWork};
pub use gradients::{GradientBuffers, GradientOptions, Reduced};
pub use layout::{Bucket, Layout, Segment};
pub use objective::{Objective, Term, Tokens, Totals};
pub use optimizer::{Optimizer, Update};
pub use parameters::Parameters;
pub use schedule::Schedule;
pub use step::{Launched, Losses, Method, NonFinite, Reference, Retain, StepReport, Trainer, TrainerOptions};

/// The kind of tensor that a configuration names.
pub fn kind(float: crate::config::Float) -> tch::Kind {
    match float {
        crate::config::Float::F32 => tch::Kind::Float,
        crate::config::Float::Bf16 => tch::Kind::BFloat16,
    }
}
