//! The run folder: `config.toml`, `metrics.jsonl`, `logs/`, `cache/`, `model/`, `summary.json`, `report.html`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::process::{self, libraries};
use super::resume::{Past, Start};
use super::summary::Summary;
use super::{Context, RunError};
use crate::checkpoint::Store;
use crate::config::{self, Checkpoint, Config, Resume};
use crate::dist::{ASK, World};
use crate::telemetry::{Metrics, RunState, Saved};

/// A run's folder, there on every rank.
pub struct RunFolder {
    pub path: PathBuf,
}

/// First line of a run folder's `config.toml`: the sign that the folder is ours to write in.
const MARK: &str = "# Resolved configuration of a run, written by dunlearn.\n";
/// What a run writes into its folder, besides `config.toml`, the cache and tasks.
const RESULTS: [&str; 12] = [
    "summary.json",
    "status.json",
    "metrics.jsonl",
    "logs",
    "model",
    "adapter",
    "mask.safetensors",
    "checkpoints",
    "eval",
    "report.html",
    "flight",
    "flight.old",
];

impl RunFolder {
    /// Refuses a folder in which something would be lost. Touches nothing. All ranks call it.
    ///
    /// Only the first rank looks: on a network file system, what another host has looked for and not found stays invisible
    /// to it for a while.
    ///
    /// # Errors
    /// On all ranks. The folder has files of a run's names that no run has written; it holds the model that is to be read; or it holds the
    /// results of a run, finished or not, and `overwrite` is not set.
    pub fn check(config: &Config, overwrite: bool, world: &World) -> Result<Start, RunError> {
        let verdict = || match Start::of(config, overwrite) {
            Ok(start) => (Self::objection(config, overwrite, start).unwrap_or_default(), start),
            Err(reason) => (reason, Start::New),
        };
        let (reason, start) = if world.is_first() { verdict() } else { Default::default() };
        let reason = world.world.broadcast_bytes(reason.as_bytes(), 0);
        if !reason.is_empty() {
            return Err(RunError::Refused(String::from_utf8_lossy(&reason).into_owned()));
        }
        let step = match start {
            Start::New => String::new(),
            Start::Resume(step) => step.to_string(),
        };
        let step = world.world.broadcast_bytes(step.as_bytes(), 0);
        Ok(std::str::from_utf8(&step).ok().and_then(|step| step.parse().ok()).map_or(Start::New, Start::Resume))
    }

    /// Why the run must not write into its folder.
    fn objection(config: &Config, overwrite: bool, start: Start) -> Option<String> {
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
        let found = RESULTS.iter().chain(&["config.toml", "cache", "tasks"]).find(|name| folder.join(name).exists());
        if let Some(name) = found.filter(|_| !written_by_us) {
            return Some(format!(
                "run.dir: {} exists and was not written by a run; choose another run.dir, or move it away",
                folder.join(name).display()
            ));
        }
        let finished = folder.join("summary.json").exists();
        // what is trained of a task is kept layer by layer, with what it was trained from
        if start != Start::New || (config.method.objective.is_weight_space() && !finished) {
            return None;
        }
        let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
        let steps = metrics.lines().filter(|line| line.contains("\"loss\"")).count();
        let what = match (finished, steps) {
            (true, _) => "a finished run".to_owned(),
            (false, 0) => return None,
            // the same run again, killed before its first checkpoint: whoever starts it again wants it from the start
            (false, steps) if Self::is_young(config, steps) => return None,
            (false, steps) => format!("a run that stopped after {steps} steps"),
        };
        let advice = || format!("{} holds {what}; choose another run.dir or pass --overwrite", folder.display());
        (!overwrite).then(advice)
    }

    /// Whether the folder holds this very run, so far from its start that no checkpoint need be there.
    fn is_young(config: &Config, steps: usize) -> bool {
        let Checkpoint { every, resume, .. } = config.checkpoint;
        let open = std::fs::read_dir(Store::of_run(&config.run.dir).folder()).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with(".partial")))
        });
        let text = std::fs::read_to_string(config.run.dir.join("config.toml")).unwrap_or_default();
        let same = text.strip_prefix(MARK).is_some_and(|text| text == config::to_toml(config));
        same && every > 0 && resume == Resume::Auto && (open || steps <= 2 * every)
    }

    /// Makes the folder without results of an earlier run, writes the resolved configuration and opens this rank's log file.
    /// All ranks call it, on a file system that they share, after [`Self::check`].
    ///
    /// # Errors
    /// What cannot be removed or written, on the rank that tried.
    pub fn create(config: &Config, context: &Context, start: Start) -> Result<Self, RunError> {
        let folder = Self { path: config.run.dir.clone() };
        let world = &context.world;
        if world.is_first() {
            let write = |path: &Path, source| RunError::Write { path: path.to_owned(), source };
            // the sign that the folder is ours comes first and in one piece: a run may be killed right here
            std::fs::create_dir_all(&folder.path).map_err(|e| write(&folder.path, e))?;
            let path = folder.path.join("config.toml");
            replace(&path, &[MARK, &config::to_toml(config)].concat()).map_err(|e| write(&path, e))?;
            if start == Start::New {
                folder.remove_checkpoints()?;
            }
            // a run that goes on writes its model once more: the one that is there may lack what comes after it
            let old = if start == Start::New { &RESULTS[..] } else { &["model", "adapter"] };
            // why it ended may still be asked for
            for path in old.iter().filter(|name| !name.starts_with("flight")).map(|name| folder.path.join(name)) {
                let gone = if path.is_dir() { std::fs::remove_dir_all(&path) } else { remove_if_there(&path) };
                gone.map_err(|e| write(&path, e))?;
            }
            folder.put_flight_away()?;
            // asked of a run that ended before all of its ranks had looked
            let ask = folder.path.join(ASK);
            remove_if_there(&ask).map_err(|e| write(&ask, e))?;
            let logs = folder.path.join("logs");
            std::fs::create_dir_all(&logs).map_err(|e| write(&logs, e))?;
        }
        if world.is_first() {
            for told in Store::of_run(&folder.path).clean()? {
                tracing::info!("{told}");
            }
        }
        world.world.barrier();
        let path = folder.path.join(format!("logs/rank_{:05}.log", world.mesh.rank));
        context.log.open(&path).map_err(|source| RunError::Write { path, source })?;
        Ok(folder)
    }

    /// Keeps the flight records of the start before this one, and makes room for new ones.
    fn put_flight_away(&self) -> Result<(), RunError> {
        let (flight, old) = (self.path.join("flight"), self.path.join("flight.old"));
        if !flight.exists() {
            return Ok(());
        }
        let gone = if old.exists() { std::fs::remove_dir_all(&old) } else { Ok(()) };
        gone.and_then(|()| std::fs::rename(&flight, &old)).map_err(|source| RunError::Write { path: flight, source })
    }

    /// From here on flight records go into the folder, and rank 0's status.
    pub fn watch(&self, context: &Context) {
        let world = &context.world;
        world.watchdog.live_in(self.path.clone(), world.mesh.rank, world.mesh.world());
        if !world.is_first() {
            return;
        }
        let checkpoint = self.newest_checkpoint();
        context.board.update(|status| {
            (status.ranks, status.tp, status.dp) = (world.mesh.world(), world.mesh.tp, world.mesh.dp);
            status.version = env!("CARGO_PKG_VERSION").to_owned();
            status.host = sysinfo::System::host_name().unwrap_or_default();
            status.pid = std::process::id();
            status.started = process::unix_seconds() - context.started.elapsed().as_secs_f64();
            status.checkpoint = checkpoint;
        });
        let watchdog = world.watchdog.clone();
        context.board.live_in(&self.path, move |status| {
            let (phase, since) = watchdog.phase();
            (status.phase, status.phase_seconds) = (phase.to_string(), since.as_secs_f64());
            status.rss_bytes = process::resident_bytes();
        });
    }

    fn newest_checkpoint(&self) -> Option<Saved> {
        let store = Store::of_run(&self.path);
        let step = store.steps().ok()?.last().copied()?;
        let written =
            std::fs::metadata(store.folder().join(format!("step_{step:06}"))).and_then(|about| about.modified());
        let time = written.ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        Some(Saved { step, time: time.map_or(0.0, |time| time.as_secs_f64()) })
    }

    /// The run ends as it should.
    pub fn leave(&self, state: RunState, context: &Context) {
        context.world.watchdog.all_is_well();
        if context.world.is_first() {
            context.board.end(state, None);
        }
    }

    /// All at once, so that an interruption leaves none of which a part is missing.
    fn remove_checkpoints(&self) -> Result<(), RunError> {
        let (path, gone) = (self.path.join("checkpoints"), self.path.join("checkpoints.removed"));
        let remove = || {
            if gone.exists() {
                std::fs::remove_dir_all(&gone)?;
            }
            if path.exists() {
                std::fs::rename(&path, &gone)?;
                std::fs::remove_dir_all(&gone)?;
            }
            Ok(())
        };
        remove().map_err(|source| RunError::Write { path, source })
    }

    /// Opens `metrics.jsonl` on the first rank and writes its first line: what runs, on what.
    /// A run that goes on keeps the lines up to its step.
    pub fn metrics(
        &self,
        config: &Config,
        context: &Context,
        start: Start,
        forced: &[String],
    ) -> Result<(Metrics, Past), RunError> {
        let world = &context.world;
        let path = self.path.join("metrics.jsonl");
        let past = match start {
            Start::Resume(step) if world.is_first() => Past::read(&path, step)?,
            _ => Past::default(),
        };
        if !world.is_first() {
            return Ok((Metrics::nowhere(), past));
        }
        let opened = if start == Start::New { Metrics::create(&path) } else { Metrics::go_on(&path, &past.lines) };
        let mut metrics = opened.map_err(|source| RunError::Write { path, source })?;
        let resumed = match start {
            Start::New => None,
            Start::Resume(step) => Some(step),
        };
        metrics.write(&json!({
            "config_digest": config::digest(config),
            "version": env!("CARGO_PKG_VERSION"),
            "mesh": { "world": world.mesh.world(), "tp": world.mesh.tp, "dp": world.mesh.dp,
                      "sequence_parallel": config.parallel.sequence_parallel, "zero": config.parallel.zero },
            "libraries": libraries(context),
            "device": context.about_device,
            "threads": tch::get_num_threads(),
            "resumed_after_step": resumed,
            "force_resume": forced,
        }))?;
        Ok((metrics, past))
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

    /// Task matrices by the task's name; kept when a run starts anew.
    pub fn tasks(&self) -> PathBuf {
        self.path.join("tasks")
    }

    /// Where low-rank adapters go, in PEFT's format.
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    pub fn model(&self) -> PathBuf {
        self.path.join("model")
    }

    /// Writes `summary.json`, the sign that the run came to its end. All ranks call it.
    pub fn write_summary(&self, summary: &Summary, world: &World) -> Result<(), RunError> {
        if world.is_first() {
            let path = self.path.join("summary.json");
            let text = serde_json::to_string_pretty(summary).expect("invariant: a summary is JSON");
            replace(&path, &(text + "\n")).map_err(|source| RunError::Write { path, source })?;
        }
        world.world.barrier();
        Ok(())
    }
}

/// Writes a file in one piece: whoever looks sees the old one or the whole new one.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let partial = path.with_extension("partial");
    let mut file = std::fs::File::create(&partial)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&partial, path)
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    if path.exists() { std::fs::remove_file(path) } else { Ok(()) }
}
