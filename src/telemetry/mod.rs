//! What a run tells: times, logs, progress and metrics. Knows nothing of models.

mod clock;

pub use clock::{Clock, PARTS, Part};
