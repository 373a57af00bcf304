//! What a person sees while a run goes on: log lines and progress bars that do not disturb each other.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use tracing_subscriber::fmt::MakeWriter;

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressMode {
    /// Bars that are drawn again in place.
    Bar,
    /// A line now and then.
    Plain,
    /// As `Plain`, as log events: for machines.
    Events,
    Silent,
}

/// Standard error, shared by log lines and bars. Clones write to the same place.
#[derive(Clone)]
pub struct Console {
    mode: ProgressMode,
    bars: MultiProgress,
}

/// One long step with a known end.
pub struct Progress {
    label: String,
    unit: &'static str,
    total: u64,
    done: u64,
    start: Instant,
    last_line: Instant,
    console: Console,
    bar: Option<ProgressBar>,
}

/// Time between two plain progress lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

impl Console {
    pub fn new(mode: ProgressMode) -> Self {
        let target = match mode {
            // launchers put a pipe between us and the terminal, so the caller decides, not a look at the handle
            ProgressMode::Bar => ProgressDrawTarget::term_like_with_hz(Box::new(Ansi::default()), 8),
            _ => ProgressDrawTarget::hidden(),
        };
        Self { mode, bars: MultiProgress::with_draw_target(target) }
    }

    /// Starts a long step of `total` `unit`s.
    pub fn progress(&self, label: &str, total: u64, unit: &'static str) -> Progress {
        let bar = (self.mode == ProgressMode::Bar).then(|| {
            let template =
                format!("  {{prefix:<22}} {{bar:28}} {{pos:>6}}/{{len}} {unit}  {{per_sec}}  {{eta}} left  {{msg}}");
            let style = ProgressStyle::with_template(&template)
                .expect("invariant: the template is a constant but for its unit")
                .with_key("per_sec", move |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                    let _ = write!(out, "{}/s", rate(state.per_sec()));
                })
                .progress_chars("━╸ ");
            self.bars.add(ProgressBar::new(total).with_style(style).with_prefix(label.to_owned()))
        });
        let now = Instant::now();
        let console = self.clone();
        Progress { label: label.to_owned(), unit, total, done: 0, start: now, last_line: now, console, bar }
    }

    /// Whether a program reads the log.
    pub fn is_for_machines(&self) -> bool {
        self.mode == ProgressMode::Events
    }

    /// Prints text as it is, above any bar.
    pub fn print(&self, text: &str) {
        self.bars.suspend(|| {
            let _ = io::stderr().write_all(text.as_bytes());
        });
    }
}

impl Progress {
    /// `count` more units are done; `note` is shown behind the bar.
    pub fn advance(&mut self, count: u64, note: &str) {
        self.done += count;
        if let Some(bar) = &self.bar {
            bar.set_message(note.to_owned());
            bar.set_position(self.done);
        } else if matches!(self.console.mode, ProgressMode::Plain | ProgressMode::Events)
            && (self.last_line.elapsed() > PLAIN_EVERY || self.done == self.total)
            && self.start.elapsed() > Duration::from_secs(2)
        {
            self.last_line = Instant::now();
            let seconds = self.start.elapsed().as_secs_f64();
            let left = seconds / self.done.max(1) as f64 * self.total.saturating_sub(self.done) as f64;
            let Self { label, unit, total, done, .. } = self;
            if self.console.mode == ProgressMode::Events {
                tracing::info!(phase = label, done, total, unit, seconds, seconds_left = left, note, "progress");
                return;
            }
            let per_second = rate(*done as f64 / seconds);
            let note = if note.is_empty() { String::new() } else { format!("  {note}") };
            self.console.print(&format!("  {label}: {done}/{total} {unit}, {per_second}/s, {left:.0} s left{note}\n"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish();
            // a finished bar leaves the bars that are drawn again and stays as text
            self.console.bars.remove(bar);
            self.console.print(&self.closing_line());
        }
    }
}

impl Progress {
    fn closing_line(&self) -> String {
        let Self { label, unit, total, done, start, .. } = self;
        let seconds = start.elapsed().as_secs_f64();
        format!("  {label:<22} {done}/{total} {unit} in {seconds:.1} s, {}/s\n", rate(*done as f64 / seconds))
    }
}

/// Three digits are enough for a rate.
fn rate(x: f64) -> String {
    match x {
        x if x >= 1e6 => format!("{:.1}M", x / 1e6),
        x if x >= 1e4 => format!("{:.1}k", x / 1e3),
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}

/// A terminal that understands the usual escape sequences, whatever lies between.
#[derive(Debug, Default)]
struct Ansi {
    buffer: Arc<Mutex<String>>,
}

impl Ansi {
    fn push(&self, text: &str) -> io::Result<()> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
        Ok(())
    }
}

impl TermLike for Ansi {
    fn width(&self) -> u16 {
        120
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        if n > 0 { self.push(&format!("\x1b[{n}A")) } else { Ok(()) }
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        if n > 0 { self.push(&format!("\x1b[{n}B")) } else { Ok(()) }
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        if n > 0 { self.push(&format!("\x1b[{n}C")) } else { Ok(()) }
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        if n > 0 { self.push(&format!("\x1b[{n}D")) } else { Ok(()) }
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.push(text)?;
        self.push("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.push(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.push("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        let text = std::mem::take(&mut *self.buffer.lock().unwrap_or_else(PoisonError::into_inner));
        io::stderr().write_all(text.as_bytes())?;
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for Console {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { console: self.clone(), text: Vec::new() }
    }
}

/// Collects one log line and writes it at once.
pub struct Line {
    console: Console,
    text: Vec<u8>,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.console.print(&String::from_utf8_lossy(&self.text));
    }
}
