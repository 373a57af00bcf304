//! What a run tells: times, logs, progress, tables and metrics. Knows nothing of models.

mod clock;
mod console;
mod log;
mod metrics;
mod table;

pub use clock::{Clock, PARTS, Part, Span};
pub use console::{Console, Progress, ProgressMode};
pub use log::{LogFile, LogFormat, start as start_log};
pub use metrics::Metrics;
pub use table::table;
