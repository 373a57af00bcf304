//! `metrics.jsonl`: one JSON object a line, written through at once.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

/// An open metrics file; ranks other than the first have none and write nothing.
pub struct Metrics(Option<File>);

impl Metrics {
    pub fn create(path: &Path) -> io::Result<Self> {
        File::create(path).map(|file| Self(Some(file)))
    }

    /// Replaces the file by `lines` and goes on after them; what was there is lost only when they are on disk.
    pub fn go_on(path: &Path, lines: &[String]) -> io::Result<Self> {
        let partial = path.with_extension("jsonl.partial");
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut file = File::create(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, path)?;
        std::fs::OpenOptions::new().append(true).open(path).map(|file| Self(Some(file)))
    }

    pub fn nowhere() -> Self {
        Self(None)
    }

    /// What was written is on disk, whatever happens to the machine.
    pub fn sync(&self) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), File::sync_data)
    }

    pub fn write(&mut self, line: &impl Serialize) -> io::Result<()> {
        let Some(file) = &mut self.0 else { return Ok(()) };
        let mut text = serde_json::to_string(line).map_err(io::Error::other)?;
        text.push('\n');
        file.write_all(text.as_bytes())
    }
}
