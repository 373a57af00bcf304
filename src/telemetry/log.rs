//! Log lines: rank 0's on standard error, every rank's in its own file.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;

use super::console::Console;

/// How lines on standard error look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where the log file goes once the run folder is known; lines before that are kept.
#[derive(Clone, Default)]
pub struct LogFile(Arc<Mutex<Target>>);

#[derive(Default)]
enum Target {
    #[default]
    Nothing,
    Waiting(Vec<u8>),
    File(File),
}

/// Sets the process's log up. Rank 0 shows everything from `info` on; the others only warnings and errors, with their rank.
pub fn start(rank: usize, world: usize, format: LogFormat, console: &Console) -> LogFile {
    let file = LogFile(Arc::new(Mutex::new(Target::Waiting(Vec::new()))));
    let level = if rank == 0 { LevelFilter::INFO } else { LevelFilter::WARN };
    let prefix = if world > 1 && rank > 0 { format!("rank {rank}: ") } else { String::new() };
    let shown = match format {
        LogFormat::Text => tracing_subscriber::fmt::layer()
            .event_format(Plain { prefix })
            .with_writer(console.clone())
            .with_filter(level)
            .boxed(),
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_target(false)
            .with_writer(console.clone())
            .with_filter(level)
            .boxed(),
    };
    let kept = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .with_writer(file.clone())
        .with_filter(LevelFilter::DEBUG);
    let ours = tracing_subscriber::filter::Targets::new().with_target("dunlearn", Level::DEBUG);
    let subscriber = tracing_subscriber::registry().with(shown).with(kept).with(ours);
    // a second start in one process (tests) keeps the first
    let _ = tracing::subscriber::set_global_default(subscriber);
    file
}

impl LogFile {
    /// Opens `path`, to write behind what is there, and writes what was logged so far.
    pub fn open(&self, path: &Path) -> io::Result<()> {
        let mut file = File::options().append(true).create(true).open(path)?;
        let mut target = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Target::Waiting(lines) = &*target {
            io::Write::write_all(&mut file, lines)?;
        }
        *target = Target::File(file);
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = LogWriter;

    fn make_writer(&'a self) -> LogWriter {
        LogWriter(self.clone())
    }
}

/// Writes through to the file at once: nothing is lost when the process is aborted.
pub struct LogWriter(LogFile);

impl io::Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *self.0.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Target::Nothing => {}
            Target::Waiting(lines) => lines.extend_from_slice(bytes),
            Target::File(file) => return file.write(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines for people: warnings and errors say so, the rest is the message alone.
struct Plain {
    prefix: String,
}

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> std::fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        write!(out, "{}{level}", self.prefix)?;
        context.format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}
