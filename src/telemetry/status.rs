//! `status.json`: where a run is, for whoever looks from outside. One rank writes it, whole or not at all.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Time between two writings.
const EVERY: Duration = Duration::from_secs(2);
/// A run that has not written for so long is dead. Unit: seconds.
const DEAD: f64 = 30.0;
const FILE: &str = "status.json";

/// How a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    #[default]
    Running,
    Finished,
    /// Asked to stop; it can be started again.
    Stopped,
    Failed,
}

/// What is told of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub state: RunState,
    /// Why it failed.
    pub message: Option<String>,
    /// With the step, where there is one: `step 12`.
    pub phase: String,
    pub phase_seconds: f64,
    /// Steps that are done.
    pub step: usize,
    pub steps: usize,
    pub loss: Option<f64>,
    /// Mean of the last steps, newer ones count more.
    pub step_seconds: Option<f64>,
    pub tokens_per_s: Option<f64>,
    /// Of the steps that are left.
    pub seconds_left: Option<f64>,
    /// Memory of rank 0.
    pub rss_bytes: u64,
    pub device_bytes: u64,
    pub checkpoint: Option<Saved>,
    pub ranks: usize,
    pub tp: usize,
    pub dp: usize,
    pub version: String,
    pub host: String,
    pub pid: u32,
    /// Where the same is told over HTTP.
    pub address: Option<String>,
    /// Unix times.
    pub started: f64,
    /// Of the last step that was done.
    pub progressed: Option<f64>,
    pub updated: f64,
}

/// The last complete checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    pub step: usize,
    /// Unix time.
    pub time: f64,
}

/// Whether a run lives, as far as its file tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Life {
    Running,
    Finished,
    Stopped,
    Failed,
    /// Seconds since its last word.
    Dead(f64),
}

/// The status of a run in the making. Clones share it; only that of a rank that has a place for it is written.
#[derive(Clone, Default)]
pub struct Board(Arc<Shared>);

#[derive(Default)]
struct Shared {
    status: Mutex<Status>,
    /// None: nobody is told. Held while the file is written.
    path: Mutex<Option<PathBuf>>,
}

impl Board {
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        let mut status = lock(&self.0.status);
        change(&mut status);
        status.updated = unix_seconds();
    }

    pub fn get(&self) -> Status {
        lock(&self.0.status).clone()
    }

    /// A step is done. `seconds`: that it took.
    pub fn step(&self, step: usize, loss: f64, seconds: f64, tokens: usize) {
        self.update(|status| {
            let mean = |old: Option<f64>, new: f64| Some(old.map_or(new, |old| 0.8 * old + 0.2 * new));
            status.step = step;
            status.loss = Some(loss);
            // the first one compiles and connects
            let settled = status.progressed.is_some();
            let old = status.step_seconds.filter(|_| settled);
            status.step_seconds = mean(old, seconds);
            status.tokens_per_s = mean(status.tokens_per_s.filter(|_| settled), tokens as f64 / seconds);
            status.seconds_left = status.step_seconds.map(|each| each * status.steps.saturating_sub(step) as f64);
            status.progressed = Some(unix_seconds());
        });
    }

    /// From here on a thread writes `status.json` into the folder every two seconds, after `look` has filled in what changes by
    /// itself. It ends with the last other clone of the board.
    pub fn live_in(&self, folder: &Path, look: impl Fn(&mut Status) + Send + 'static) {
        *lock(&self.0.path) = Some(folder.join(FILE));
        let shared = Arc::downgrade(&self.0);
        let write = move || {
            let Some(board) = shared.upgrade().map(Self) else { return false };
            if board.get().state == RunState::Running {
                board.update(&look);
                board.write();
            }
            true
        };
        write();
        let thread = std::thread::Builder::new().name("status".to_owned());
        let _ = thread.spawn(move || {
            while write() {
                std::thread::sleep(EVERY);
            }
        });
    }

    /// The last word.
    pub fn end(&self, state: RunState, message: Option<&str>) {
        self.update(|status| {
            if status.state == RunState::Running {
                status.state = state;
                status.message = message.map(str::to_owned);
                status.seconds_left = None;
            }
        });
        self.write();
    }

    /// A status that cannot be written is no reason to end a run.
    fn write(&self) {
        let path = lock(&self.0.path);
        let Some(path) = path.as_ref() else { return };
        let text = serde_json::to_string_pretty(&self.get()).unwrap_or_default();
        let partial = path.with_extension("json.partial");
        let written = std::fs::write(&partial, text + "\n").and_then(|()| std::fs::rename(&partial, path));
        if let Err(error) = written {
            tracing::debug!("{}: {error}", path.display());
        }
    }
}

impl Status {
    /// Of the run in a folder.
    ///
    /// # Errors
    /// In words: there is none, or the file is none.
    pub fn read(folder: &Path) -> Result<Self, String> {
        let path = folder.join(FILE);
        let text = std::fs::read_to_string(&path).map_err(|error| {
            format!("cannot read {}: {error}; is {} the folder of a run?", path.display(), folder.display())
        })?;
        serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Judges by the age of the file, and on the run's own host by its process too.
    ///
    /// `now`: Unix time; `host`: this one; `lives`: whether a process of this host does.
    pub fn life(&self, now: f64, host: &str, lives: impl Fn(u32) -> bool) -> Life {
        let silent = now - self.updated;
        match self.state {
            RunState::Finished => Life::Finished,
            RunState::Stopped => Life::Stopped,
            RunState::Failed => Life::Failed,
            RunState::Running if silent > DEAD || (self.host == host && !lives(self.pid)) => {
                Life::Dead(silent.max(0.0))
            }
            RunState::Running => Life::Running,
        }
    }

    /// In the text format of Prometheus.
    pub fn prometheus(&self) -> String {
        let Self { step, steps, .. } = self;
        let text = |label: &str| label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ");
        let phase = self.phase.trim_end_matches(|c: char| c.is_ascii_digit() || c == ' ');
        let phase = phase.trim_end_matches(" after step");
        let mut out = String::new();
        let mut gauge = |name: &str, help: &str, labels: &str, value: Option<f64>| {
            if let Some(value) = value {
                out += &format!(
                    "# HELP dunlearn_{name} {help}\n# TYPE dunlearn_{name} gauge\ndunlearn_{name}{labels} {value}\n"
                );
            }
        };
        let about = format!(
            "{{version=\"{}\",host=\"{}\",ranks=\"{}\",tp=\"{}\",dp=\"{}\"}}",
            text(&self.version),
            text(&self.host),
            self.ranks,
            self.tp,
            self.dp
        );
        gauge("info", "What runs where", &about, Some(1.0));
        gauge("phase", "What the run is doing", &format!("{{phase=\"{}\"}}", text(phase)), Some(1.0));
        gauge("phase_seconds", "Time in this phase", "", Some(self.phase_seconds));
        gauge("step", "Steps done", "", Some(*step as f64));
        gauge("steps", "Steps of the run", "", Some(*steps as f64));
        gauge("loss", "Loss of the last step", "", self.loss);
        gauge("step_seconds", "Mean time of the last steps", "", self.step_seconds);
        gauge("tokens_per_second", "Tokens through the model, all ranks", "", self.tokens_per_s);
        gauge("seconds_left", "Expected time of the steps that are left", "", self.seconds_left);
        gauge("resident_bytes", "Memory of rank 0", "", Some(self.rss_bytes as f64));
        gauge("device_bytes", "Device memory of rank 0", "", Some(self.device_bytes as f64));
        gauge("checkpoint_step", "Step of the last checkpoint", "", self.checkpoint.map(|saved| saved.step as f64));
        gauge("started_timestamp_seconds", "Start of the process", "", Some(self.started));
        gauge("progressed_timestamp_seconds", "End of the last step", "", self.progressed);
        gauge("updated_timestamp_seconds", "Last sign of life", "", Some(self.updated));
        out
    }
}

fn unix_seconds() -> f64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0.0, |time| time.as_secs_f64())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_dead_when_it_is_silent_or_its_process_is_gone() {
        let status = Status { host: "a".to_owned(), pid: 7, updated: 1000.0, ..Status::default() };
        let (alive, gone) = (|_| true, |_| false);
        assert_eq!(status.life(1010.0, "a", alive), Life::Running);
        assert_eq!(status.life(1010.0, "b", gone), Life::Running, "another host's processes are not seen");
        assert_eq!(status.life(1010.0, "a", gone), Life::Dead(10.0));
        assert_eq!(status.life(1100.0, "b", gone), Life::Dead(100.0));
        let status = Status { state: RunState::Finished, ..status };
        assert_eq!(status.life(9999.0, "a", gone), Life::Finished);
    }

    #[test]
    fn the_file_is_written_and_keeps_the_last_word() {
        let folder = tempfile::tempdir().unwrap();
        let board = Board::default();
        board.update(|status| status.steps = 10);
        board.step(1, 2.0, 9.0, 100); // of no board yet: nothing is written
        assert!(Status::read(folder.path()).unwrap_err().contains("status.json: No such file"));
        board.live_in(folder.path(), |status| status.phase = "step 2".to_owned());
        board.step(2, 1.5, 1.0, 100);
        board.end(RunState::Failed, Some("rank 1 is gone"));
        board.end(RunState::Finished, None); // too late
        let read = Status::read(folder.path()).unwrap();
        assert_eq!((read.state, read.message.as_deref()), (RunState::Failed, Some("rank 1 is gone")));
        assert_eq!((read.step, read.loss, read.phase.as_str()), (2, Some(1.5), "step 2"));
        assert_eq!(read, board.get());
    }

    #[test]
    fn rates_are_of_the_last_steps() {
        let board = Board::default();
        board.update(|status| status.steps = 12);
        for step in 1..=2 {
            board.step(step, 1.0, 2.0, 64);
        }
        let status = board.get();
        assert_eq!(
            (status.step_seconds, status.tokens_per_s, status.seconds_left),
            (Some(2.0), Some(32.0), Some(20.0))
        );
    }

    #[test]
    fn prometheus_reads_it() {
        let status = Status {
            phase: "save after step 12".to_owned(),
            host: "a\"b".to_owned(),
            step: 12,
            loss: Some(0.5),
            ..Status::default()
        };
        let text = status.prometheus();
        assert!(text.contains("dunlearn_phase{phase=\"save\"} 1\n"), "{text}");
        assert!(text.contains("host=\"a\\\"b\"") && text.contains("\ndunlearn_loss 0.5\n"), "{text}");
        assert!(!text.contains("seconds_left"), "what is not known is not told");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("dunlearn_") && value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
