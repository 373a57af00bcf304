//! The run folder: `config.toml`, `metrics.jsonl`, `logs/`, `cache/`, `model/`, `summary.json`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::process::libraries;
use super::summary::Summary;
use super::{Context, RunError};
use crate::config::{self, Config};
use crate::dist::World;
use crate::telemetry::Metrics;

/// A run's folder, there on every rank.
pub struct RunFolder {
    pub path: PathBuf,
}

/// First line of a run folder's `config.toml`: the sign that the folder is ours to write in.
const MARK: &str = "# Resolved configuration of a run, written by dunlearn.\n";
/// What a run writes into its folder, besides `config.toml` and the cache.
const RESULTS: [&str; 4] = ["summary.json", "metrics.jsonl", "logs", "model"];

impl RunFolder {
    /// Refuses a folder in which something would be lost. Touches nothing. All ranks call it.
    ///
    /// Only the first rank looks: on a network file system, what another host has looked for and not found stays invisible
    /// to it for a while.
    ///
    /// # Errors
    /// On all ranks. The folder has files of a run's names that no run has written; it holds the model that is to be read; or it holds the
    /// results of a run, finished or not, and `overwrite` is not set.
    pub fn check(config: &Config, overwrite: bool, world: &World) -> Result<(), RunError> {
        let reason = if world.is_first() { Self::objection(config, overwrite) } else { None };
        let reason = world.world.broadcast_bytes(reason.unwrap_or_default().as_bytes(), 0);
        if reason.is_empty() { Ok(()) } else { Err(RunError::Refused(String::from_utf8_lossy(&reason).into_owned())) }
    }

    /// Why the run must not write into its folder.
    fn objection(config: &Config, overwrite: bool) -> Option<String> {
        let folder = &config.run.dir;
        if let (Ok(model), Ok(target)) = (config.model.path.canonicalize(), folder.join("model").canonicalize())
            && (model.starts_with(&target) || target.starts_with(&model))
        {
            return Some(format!(
                "run.dir: the run would write its model over the one that it reads, {}; choose another run.dir",
                config.model.path.display()
            ));
        }
        let written_by_us =
            std::fs::read_to_string(folder.join("config.toml")).is_ok_and(|text| text.starts_with(MARK));
        let found = RESULTS.iter().chain(&["config.toml", "cache"]).find(|name| folder.join(name).exists());
        if let Some(name) = found.filter(|_| !written_by_us) {
            return Some(format!(
                "run.dir: {} exists and was not written by a run; choose another run.dir, or move it away",
                folder.join(name).display()
            ));
        }
        let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
        let steps = metrics.lines().filter(|line| line.contains("\"loss\"")).count();
        let what = match (folder.join("summary.json").exists(), steps) {
            (true, _) => "a finished run".to_owned(),
            (false, 0) => return None,
            (false, steps) => format!("a run that stopped after {steps} steps"),
        };
        let advice = || format!("{} holds {what}; choose another run.dir or pass --overwrite", folder.display());
        (!overwrite).then(advice)
    }

    /// Makes the folder without results of an earlier run, writes the resolved configuration and opens this rank's log file.
    /// All ranks call it, on a file system that they share, after [`Self::check`].
    ///
    /// # Errors
    /// What cannot be removed or written, on the rank that tried.
    pub fn create(config: &Config, context: &Context) -> Result<Self, RunError> {
        let folder = Self { path: config.run.dir.clone() };
        let world = &context.world;
        if world.is_first() {
            for path in RESULTS.map(|name| folder.path.join(name)) {
                let gone = if path.is_dir() { std::fs::remove_dir_all(&path) } else { remove_if_there(&path) };
                gone.map_err(|source| RunError::Write { path, source })?;
            }
            let logs = folder.path.join("logs");
            std::fs::create_dir_all(&logs).map_err(|source| RunError::Write { path: logs, source })?;
            let path = folder.path.join("config.toml");
            let text = [MARK, &config::to_toml(config)].concat();
            std::fs::write(&path, text).map_err(|source| RunError::Write { path, source })?;
        }
        world.world.barrier();
        let path = folder.path.join(format!("logs/rank_{:05}.log", world.mesh.rank));
        context.log.open(&path).map_err(|source| RunError::Write { path, source })?;
        Ok(folder)
    }

    /// Opens `metrics.jsonl` on the first rank and writes its first line: what runs, on what.
    pub fn metrics(&self, config: &Config, context: &Context) -> Result<Metrics, RunError> {
        let world = &context.world;
        if !world.is_first() {
            return Ok(Metrics::nowhere());
        }
        let path = self.path.join("metrics.jsonl");
        let mut metrics = Metrics::create(&path).map_err(|source| RunError::Write { path, source })?;
        metrics.write(&json!({
            "config_digest": config::digest(config),
            "version": env!("CARGO_PKG_VERSION"),
            "mesh": { "world": world.mesh.world(), "tp": world.mesh.tp, "dp": world.mesh.dp,
                      "sequence_parallel": config.parallel.sequence_parallel, "zero": config.parallel.zero },
            "libraries": libraries(context),
            "device": "cpu",
            "threads": tch::get_num_threads(),
        }))?;
        Ok(metrics)
    }

    /// The cache folder. All ranks call it.
    pub fn cache(&self, world: &World) -> Result<PathBuf, RunError> {
        let path = self.path.join("cache");
        if world.is_first() {
            std::fs::create_dir_all(&path).map_err(|source| RunError::Write { path: path.clone(), source })?;
        }
        world.world.barrier();
        Ok(path)
    }

    pub fn model(&self) -> PathBuf {
        self.path.join("model")
    }

    /// Writes `summary.json`, the sign that the run came to its end. All ranks call it.
    pub fn write_summary(&self, summary: &Summary, world: &World) -> Result<(), RunError> {
        if world.is_first() {
            let path = self.path.join("summary.json");
            let text = serde_json::to_string_pretty(summary).expect("invariant: a summary is JSON");
            let partial = path.with_extension("json.partial");
            std::fs::write(&partial, text + "\n")
                .and_then(|()| std::fs::rename(&partial, &path))
                .map_err(|source| RunError::Write { path, source })?;
        }
        world.world.barrier();
        Ok(())
    }
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    if path.exists() { std::fs::remove_file(path) } else { Ok(()) }
}
