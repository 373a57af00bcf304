//! What a run tells: times, logs, progress, tables, metrics and status. Knows nothing of models.

mod clock;
mod console;
mod log;
mod metrics;
mod serve;
mod status;
mod table;

pub use clock::{Clock, PARTS, Part, Span};
pub use console::{Console, Progress, ProgressMode};
pub use log::{LogFile, LogFormat, start as start_log};
pub use metrics::Metrics;
pub use serve::serve;
pub use status::{Board, Life, RunState, Saved, Status};
pub use table::table;
