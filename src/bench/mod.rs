//! `dunlearn bench step`: how fast a whole unlearning step is on this machine, against the machine's own matrix products.

mod rate;
mod step;

pub use rate::matrix_rate;
pub use step::{StepBench, StepResult, step};
