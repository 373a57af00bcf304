//! `launch.jsonl`: what was started, how it ended, what was decided; a line each, over all launches of a run folder.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::supervisor::Before;

pub(super) struct Journal(File);

impl Journal {
    pub(super) fn open(run: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(run)?;
        std::fs::OpenOptions::new().create(true).append(true).open(run.join("launch.jsonl")).map(Self)
    }

    /// Adds a line; a journal that cannot be written stops nobody.
    pub(super) fn write(&mut self, event: &str, facts: &Value) {
        let mut line = json!({ "event": event, "time": unix_seconds() });
        if let (Value::Object(line), Value::Object(facts)) = (&mut line, facts) {
            line.extend(facts.clone());
        }
        let _ = self.0.write_all(format!("{line}\n").as_bytes());
    }
}

pub(super) fn unix_seconds() -> f64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0.0, |time| time.as_secs_f64())
}

/// What stood in the run folder when Slurm job `job` first started ranks for it; None where it never did.
pub(super) fn first_start(run: &Path, job: &str) -> Option<Before> {
    let text = std::fs::read_to_string(run.join("launch.jsonl")).unwrap_or_default();
    let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let first = lines.find(|line| line["event"] == "start" && line["slurm_job"] == job)?;
    serde_json::from_value(first["before"].clone()).ok()
}
