//! What ranks leave for their supervisor: that all are up, and how one ended. Small files in a folder that all hosts see, because a
//! launcher's exit code and its pipes may say nothing when a host is lost.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// How a rank ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ending {
    pub rank: usize,
    pub host: String,
    /// Exit code.
    pub code: i32,
    pub message: String,
    /// Seconds since 1970 by the rank's clock.
    pub time: f64,
}

/// The folder of one start.
#[derive(Clone, Debug)]
pub struct Notes {
    folder: PathBuf,
}

const READY: &str = "ready";

impl Notes {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// The start's name, which the run writes into its summary.
    pub fn id(&self) -> String {
        self.folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Says that every rank is up and takes signals. One rank calls it, after all have met.
    pub fn say_ready(&self) {
        let _ = std::fs::write(self.folder.join(READY), "");
    }

    pub fn is_ready(&self) -> bool {
        self.folder.join(READY).exists()
    }

    /// Leaves a rank's last words; the first of a rank count. A folder that is gone is nobody's concern any more.
    pub fn leave(&self, ending: &Ending) {
        let path = self.folder.join(format!("end_{:05}.json", ending.rank));
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
        let text = serde_json::to_string(ending).expect("invariant: words are JSON");
        let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
    }

    /// How ranks have ended so far, by rank.
    pub fn endings(&self) -> Vec<Ending> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let texts = entries.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
        let mut all: Vec<Ending> = texts.filter_map(|text| serde_json::from_str(&text).ok()).collect();
        all.sort_by_key(|ending| ending.rank);
        all
    }

    /// Takes the folder away.
    pub fn clear(&self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_words_of_a_rank_count() {
        let folder = tempfile::tempdir().unwrap();
        let notes = Notes::new(folder.path());
        let ending = |rank, code| Ending { rank, host: "n1".to_owned(), code, message: "x".to_owned(), time: 1.5 };
        notes.leave(&ending(3, 101));
        notes.leave(&ending(3, 103));
        notes.leave(&ending(1, 102));
        std::fs::write(folder.path().join("end_00002.json"), "{\"rank\":").unwrap();
        assert_eq!(notes.endings(), [ending(1, 102), ending(3, 101)]);
        assert!(!notes.is_ready());
        notes.say_ready();
        assert!(notes.is_ready());
        notes.clear();
        notes.leave(&ending(0, 2));
        assert!(notes.endings().is_empty());
    }
}
