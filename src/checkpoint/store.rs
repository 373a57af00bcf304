//! The checkpoints of a run: `checkpoints/step_000120/` with a state file a rank, `manifest.json`, and `COMPLETE`.
//!
//! A checkpoint is written under a name that ends in `.partial` and renamed when everything is on disk, and renamed again before it is
//! removed: a folder with the final name is whole at every moment. `COMPLETE` holds the digest of the manifest, the manifest those of
//! the files.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::CheckpointError;
use super::state::StateFiles;
use super::tensor_file::{Written, sync};

/// What a checkpoint is of. Its files are listed by rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    pub dunlearn: String,
    /// Steps that were done.
    pub step: usize,
    /// Steps that the optimizer has counted.
    pub optimizer_steps: usize,
    /// The configuration as the run resolved it.
    pub config: Value,
    /// Digests of the model before training and of the data sets, by name.
    pub digests: std::collections::BTreeMap<String, String>,
    pub tp: usize,
    pub dp: usize,
    /// State of the method, where it has any.
    pub method: Value,
    pub files: Vec<StateFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    pub name: String,
    pub bytes: u64,
    /// BLAKE3, in hex.
    pub digest: String,
}

/// The format that this version writes and reads.
pub const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const COMPLETE: &str = "COMPLETE";
/// End of the name of a checkpoint that stands aside for another of its step.
const REPLACED: &str = ".replaced";

/// The checkpoints of one run.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
}

/// One complete checkpoint.
#[derive(Clone, Debug)]
pub struct Saved {
    pub folder: PathBuf,
    pub manifest: Manifest,
}

impl Store {
    /// The checkpoints below a run's folder.
    pub fn of_run(run: &Path) -> Self {
        Self { folder: run.join("checkpoints") }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Steps of the complete checkpoints, ascending. None where there is no folder yet.
    ///
    /// # Errors
    /// A folder that cannot be read: what is in it must not pass for nothing.
    pub fn steps(&self) -> Result<Vec<usize>, CheckpointError> {
        let mut steps = Vec::new();
        for file in self.names()? {
            let known = file.strip_suffix(REPLACED).unwrap_or(&file);
            let step = known.strip_prefix("step_").and_then(|digits| digits.parse().ok());
            steps.extend(step.filter(|&step| name(step) == known));
        }
        steps.sort_unstable();
        steps.dedup();
        Ok(steps)
    }

    fn names(&self) -> Result<Vec<String>, CheckpointError> {
        let read = |source| CheckpointError::Read { path: self.folder.clone(), source };
        match std::fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(read(error)),
            Ok(entries) => {
                entries.map(|entry| Ok(entry.map_err(read)?.file_name().to_string_lossy().into_owned())).collect()
            }
        }
    }

    /// Opens a checkpoint and holds its manifest against its sign of completeness. The files' digests are not read.
    pub fn open(&self, step: usize) -> Result<Saved, CheckpointError> {
        let path = self.folder.join(name(step));
        let aside = self.replaced(step);
        let saved = Saved::open(if !path.exists() && aside.exists() { &aside } else { &path })?;
        if saved.manifest.step != step {
            let reason = format!("is of step {}, in a folder that is named after step {step}", saved.manifest.step);
            return Err(CheckpointError::Malformed { path: path.join(MANIFEST), reason });
        }
        Ok(saved)
    }

    /// Makes the folder that a checkpoint is written in.
    pub fn begin(&self, step: usize) -> Result<PathBuf, CheckpointError> {
        let path = self.partial(step);
        let write = |source| CheckpointError::Write { path: path.clone(), source };
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(write)?;
        }
        let first = !self.folder.exists();
        std::fs::create_dir_all(&path).map_err(write)?;
        if first && let Some(run) = self.folder.parent() {
            sync(run)?;
        }
        Ok(path)
    }

    /// Where the files of an open checkpoint go.
    pub fn partial(&self, step: usize) -> PathBuf {
        self.folder.join(format!("{}.partial", name(step)))
    }

    /// Turns an open checkpoint, whose files are on disk, into a complete one. One rank calls it. One of the same step that could not be
    /// removed is left to [`Self::clean`].
    pub fn commit(&self, manifest: &Manifest) -> Result<(), CheckpointError> {
        let partial = self.partial(manifest.step);
        let text = serde_json::to_string_pretty(manifest).expect("invariant: a manifest is JSON") + "\n";
        write_synced(&partial.join(MANIFEST), &text)?;
        let digest = blake3::hash(text.as_bytes()).to_hex().to_string() + "\n";
        write_synced(&partial.join(COMPLETE), &digest)?;
        sync(&partial)?;
        let path = self.folder.join(name(manifest.step));
        let write = |source| CheckpointError::Write { path: path.clone(), source };
        // the same step again: the old one stands aside until the new one has its name
        let old = path.exists().then(|| self.replaced(manifest.step));
        if let Some(old) = &old {
            std::fs::rename(&path, old).map_err(write)?;
        }
        std::fs::rename(&partial, &path).map_err(write)?;
        sync(&self.folder)?;
        if let Some(old) = old {
            let _ = std::fs::remove_dir_all(old);
        }
        Ok(())
    }

    /// Where a checkpoint stands aside for another of the same step.
    fn replaced(&self, step: usize) -> PathBuf {
        self.folder.join(format!("{}{REPLACED}", name(step)))
    }

    /// Puts the folder in order after an interruption: what an unfinished save or removal has left is removed, a checkpoint that stood
    /// aside for one that never came has its name again. Gives a sentence for each.
    pub fn clean(&self) -> Result<Vec<String>, CheckpointError> {
        let mut told = Vec::new();
        for file in self.names()?.into_iter().filter(|file| file.starts_with("step_")) {
            let path = self.folder.join(&file);
            let write = |source| CheckpointError::Write { path: path.clone(), source };
            let aside = file.strip_suffix(REPLACED).map(|name| (name, self.folder.join(name)));
            if let Some((name, known)) = aside.filter(|(_, known)| !known.exists()) {
                std::fs::rename(&path, &known).map_err(write)?;
                told.push(format!("{name} is back: the save that was to replace it was interrupted"));
            } else if [".partial", REPLACED, ".removed"].iter().any(|end| file.ends_with(end)) {
                std::fs::remove_dir_all(&path).map_err(write)?;
                told.push(format!("removed {file}, which an interruption has left"));
            }
        }
        Ok(told)
    }

    /// Keeps the newest `last` checkpoints (0: all) and those of every `every`th step (0: none besides), removes the others.
    pub fn keep(&self, last: usize, every: usize) -> Result<(), CheckpointError> {
        let steps = self.steps()?;
        let old = if last == 0 { 0 } else { steps.len().saturating_sub(last) };
        for step in steps[..old].iter().filter(|&&step| every == 0 || step % every != 0) {
            let path = self.folder.join(name(*step));
            let gone = path.with_extension("removed");
            let removed = std::fs::rename(&path, &gone).and_then(|()| std::fs::remove_dir_all(&gone));
            removed.map_err(|source| CheckpointError::Write { path, source })?;
        }
        Ok(())
    }
}

impl Saved {
    /// See [`Store::open`].
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).map_err(|source| CheckpointError::Read { path, source })
        };
        let path = folder.join(MANIFEST);
        let malformed = |reason: String| CheckpointError::Malformed { path: path.clone(), reason };
        let (text, sign) = (read(MANIFEST)?, read(COMPLETE)?);
        let digest = blake3::hash(text.as_bytes()).to_hex().to_string();
        if sign.trim() != digest {
            let reason = format!("was changed: its digest is {digest}, {COMPLETE} says {}", sign.trim());
            return Err(malformed(reason));
        }
        let manifest: Manifest = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        if manifest.format != FORMAT {
            return Err(malformed(format!("has format {}, this version reads {FORMAT}", manifest.format)));
        }
        if let Some(file) = manifest.files.iter().find(|file| file.name.contains(['/', '\\']) || file.name == "..") {
            return Err(malformed(format!("names the file {:?}; expected a file name without a folder", file.name)));
        }
        Ok(Self { folder: folder.to_owned(), manifest })
    }

    /// Reads the files that fall to rank `rank` of `size` and holds them against the manifest's sizes and digests.
    pub fn verify(&self, rank: usize, size: usize) -> Result<(), CheckpointError> {
        for file in self.manifest.files.iter().skip(rank).step_by(size) {
            let path = self.folder.join(&file.name);
            let read = |source| CheckpointError::Read { path: path.clone(), source };
            let malformed = |reason: String| CheckpointError::Malformed { path: path.clone(), reason };
            let bytes = std::fs::metadata(&path).map_err(read)?.len();
            if bytes != file.bytes {
                return Err(malformed(format!("has {bytes} bytes, the manifest says {}", file.bytes)));
            }
            let mut hasher = blake3::Hasher::new();
            // read, not mapped: a mapped file counts as memory
            File::open(&path).and_then(|file| hasher.update_reader(file).map(drop)).map_err(read)?;
            let digest = hasher.finalize().to_hex().to_string();
            if digest != file.digest {
                return Err(malformed(format!(
                    "was changed: its digest is {digest}, the manifest says {}",
                    file.digest
                )));
            }
        }
        Ok(())
    }

    /// All slices.
    pub fn state(&self) -> Result<StateFiles, CheckpointError> {
        let paths: Vec<PathBuf> = self.manifest.files.iter().map(|file| self.folder.join(&file.name)).collect();
        StateFiles::open(paths.iter().map(PathBuf::as_path))
    }

    /// Bytes of the state files.
    pub fn bytes(&self) -> u64 {
        self.manifest.files.iter().map(|file| file.bytes).sum()
    }
}

impl StateFile {
    pub fn new(name: String, written: Written) -> Self {
        Self { name, bytes: written.bytes, digest: written.digest }
    }
}

/// Name of a rank's file.
pub fn file_name(rank: usize) -> String {
    format!("rank_{rank:05}.safetensors")
}

fn name(step: usize) -> String {
    format!("step_{step:06}")
}

fn write_synced(path: &Path, text: &str) -> Result<(), CheckpointError> {
    use std::io::Write as _;
    let write = |source| CheckpointError::Write { path: path.to_owned(), source };
    let mut file = File::create(path).map_err(write)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(write)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(step: usize) -> Manifest {
        Manifest {
            format: FORMAT,
            dunlearn: "0".into(),
            step,
            optimizer_steps: step,
            config: Value::Null,
            digests: std::collections::BTreeMap::new(),
            tp: 1,
            dp: 1,
            method: Value::Null,
            files: Vec::new(),
        }
    }

    fn save(store: &Store, step: usize) {
        store.begin(step).unwrap();
        store.commit(&manifest(step)).unwrap();
    }

    #[test]
    fn what_was_not_committed_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::of_run(folder.path());
        assert!(store.steps().unwrap().is_empty());
        save(&store, 4);
        store.begin(8).unwrap();
        assert_eq!(store.steps().unwrap(), [4]);
        assert_eq!(store.clean().unwrap(), ["removed step_000008.partial, which an interruption has left"]);
        assert_eq!(store.open(4).unwrap().manifest, manifest(4));
        save(&store, 4); // again
        assert_eq!(store.steps().unwrap(), [4]);
    }

    #[test]
    fn a_folder_under_another_steps_name_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::of_run(folder.path());
        save(&store, 4);
        std::fs::rename(store.folder().join("step_000004"), store.folder().join("step_000009")).unwrap();
        let error = store.open(9).err().unwrap().to_string();
        assert!(error.contains("is of step 4, in a folder that is named after step 9"), "{error}");
    }

    /// Interrupted between the two renames of a replacement, and within a removal.
    #[test]
    fn an_interrupted_replacement_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::of_run(folder.path());
        let at = |name: &str| store.folder().join(name);
        save(&store, 4);
        store.begin(4).unwrap();
        std::fs::rename(at("step_000004"), at("step_000004.replaced")).unwrap();
        std::fs::create_dir(at("step_000002.removed")).unwrap();
        assert_eq!(store.steps().unwrap(), [4]);
        assert_eq!(store.open(4).unwrap().manifest, manifest(4), "it counts before anything is cleaned");
        assert_eq!(store.clean().unwrap().len(), 3);
        assert_eq!(store.steps().unwrap(), [4]);
        assert_eq!(store.open(4).unwrap().manifest, manifest(4));
        // after the second rename the new one counts
        std::fs::create_dir(at("step_000004.replaced")).unwrap();
        store.clean().unwrap();
        assert_eq!(store.open(4).unwrap().manifest, manifest(4));
        assert_eq!(store.names().unwrap().len(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_read_is_not_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("checkpoints"), "").unwrap();
        let error = Store::of_run(folder.path()).steps().unwrap_err().to_string();
        assert!(error.starts_with("cannot read ") && error.contains("checkpoints"), "{error}");
    }

    #[test]
    fn retention_keeps_the_newest_and_the_milestones() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::of_run(folder.path());
        for step in [5, 10, 15, 20, 25] {
            save(&store, step);
        }
        store.keep(0, 0).unwrap();
        assert_eq!(store.steps().unwrap().len(), 5);
        store.keep(2, 10).unwrap();
        assert_eq!(store.steps().unwrap(), [10, 20, 25]);
        store.keep(1, 0).unwrap();
        assert_eq!(store.steps().unwrap(), [25]);
    }

    #[test]
    fn a_manifest_that_was_touched_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::of_run(folder.path());
        save(&store, 1);
        let path = store.folder().join("step_000001/manifest.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"step\": 1", "\"step\": 2")).unwrap();
        let error = store.open(1).unwrap_err().to_string();
        assert!(error.contains("manifest.json: was changed: its digest is "), "{error}");
    }
}
