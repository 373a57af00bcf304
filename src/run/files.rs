//! The run folder: `config.toml`, `metrics.jsonl`, `logs/`, `cache/`, `model/`, `summary.json`.

use std::path::{Path, PathBuf};

use serde_json::json;
use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};

use super::summary::Summary;
use super::{Context, RunError};
use crate::config::{self, Config};
use crate::dist::World;
use crate::telemetry::Metrics;

/// A run's folder, there on every rank.
pub struct RunFolder {
    pub path: PathBuf,
}

impl RunFolder {
    /// Makes the folder, writes the resolved configuration and opens this rank's log file. All ranks call it.
    ///
    /// # Errors
    /// On all ranks when the folder holds a finished run and `context.overwrite` is not set.
    pub fn create(config: &Config, context: &Context) -> Result<Self, RunError> {
        let folder = Self { path: config.run.dir.clone() };
        let world = &context.world;
        if world.is_first() {
            let finished = folder.path.join("summary.json").exists();
            if finished && !context.overwrite {
                return Err(RunError::Refused(format!(
                    "{} holds a finished run; choose another run.dir or pass --overwrite",
                    folder.path.display()
                )));
            }
            for path in [folder.path.join("summary.json"), folder.path.join("logs")] {
                let gone = if path.is_dir() { std::fs::remove_dir_all(&path) } else { remove_if_there(&path) };
                gone.map_err(|source| RunError::Write { path, source })?;
            }
            let logs = folder.path.join("logs");
            std::fs::create_dir_all(&logs).map_err(|source| RunError::Write { path: logs, source })?;
            let path = folder.path.join("config.toml");
            std::fs::write(&path, config::to_toml(config)).map_err(|source| RunError::Write { path, source })?;
        }
        world.world.barrier();
        let path = folder.path.join(format!("logs/rank_{:05}.log", world.mesh.rank));
        context.log.open(&path).map_err(|source| RunError::Write { path, source })?;
        tracing::info!("dunlearn {}: {}", env!("CARGO_PKG_VERSION"), folder.path.display());
        tracing::debug!("{}", world.mesh);
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

/// Versions of what this process runs on.
pub fn libraries(context: &Context) -> serde_json::Value {
    json!({ "libtorch": "2.11.0", "tch": "0.24.0", "mpi": context.mpi_version })
}

/// Memory of this process at the moment.
pub fn resident_bytes() -> u64 {
    let (Ok(pid), Ok(mut system)) = (sysinfo::get_current_pid(), System::new()) else { return 0 };
    let memory = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, memory);
    system.process(pid).map_or(0, sysinfo::Process::memory)
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    if path.exists() { std::fs::remove_file(path) } else { Ok(()) }
}
