//! How fast a whole unlearning step is on this machine, against the machine's own matrix products: `dunlearn bench step` for the
//! ranks that are there, `dunlearn bench rank` for one rank of a mesh that is not; and whether devices and layouts compute what
//! one CPU computes: `dunlearn check`.

mod check;
mod checkpoint;
mod rank;
mod rate;
mod step;
mod trace;

pub use check::{Check, Line, check, text as check_text};
pub use checkpoint::{CheckpointResult, checkpoint};
pub use rank::{RankBench, RankResult, rank};
pub use rate::matrix_rate;
pub use step::{StepBench, StepResult, step};
pub use trace::Trace;
