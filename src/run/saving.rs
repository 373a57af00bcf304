//! Saving while a run goes on: when, by whom, and what happens to the files.
//!
//! All ranks decide together at the end of each step, by one small exchange on the host's network: whether to save, whether to
//! stop, whether the files of an open save are written everywhere. A save costs the step the copy of this rank's state; a
//! thread writes it. Rank 0 commits when every rank's file is on disk.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{RunError, process};
use crate::abi::signals;
use crate::checkpoint::state::{StateSlice, write};
use crate::checkpoint::store::{FORMAT, file_name};
use crate::checkpoint::{CheckpointError, Manifest, Snapshot, StateFile, Store};
use crate::config::{self, Config};
use crate::dist::{Reduce, World};
use crate::telemetry::{Board, Saved};
use crate::train::Trainer;

/// How often ranks look whether all files are on disk, once they have to wait for them.
const LOOK: Duration = Duration::from_millis(20);

/// Looks after the checkpoints of one run.
pub struct Saver {
    config: config::Checkpoint,
    run: PathBuf,
    store: Store,
    resolved: Value,
    digests: BTreeMap<String, String>,
    open: Option<Open>,
    snapshot: Snapshot,
    /// Where the last checkpoint is told.
    board: Board,
}

/// A save whose files are being written.
struct Open {
    step: usize,
    optimizer_steps: usize,
    /// Of the method.
    method: Value,
    bytes: usize,
    writer: JoinHandle<Result<StateFile, CheckpointError>>,
}

/// What a step is followed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    pub save: bool,
    /// Save and end.
    pub stop: bool,
    /// The files of an open save are on disk everywhere.
    written: bool,
    /// Another save will be due.
    more: bool,
}

/// What a run does after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    GoOn,
    /// The state is saved; the run can be started again.
    Stop,
}

impl Saver {
    /// `digests`: of the model before training and of the data sets, by name.
    pub fn new(config: &Config, digests: BTreeMap<String, String>, board: &Board) -> Self {
        Self {
            config: config.checkpoint.clone(),
            run: config.run.dir.clone(),
            store: Store::of_run(&config.run.dir),
            resolved: config::to_json(config),
            digests,
            open: None,
            snapshot: Snapshot::default(),
            board: board.clone(),
        }
    }

    /// What is to be done after step `step` (from 1) of `steps`. All ranks call it after each step and get the same answer.
    pub fn ask(&self, step: usize, steps: usize, world: &World) -> Wish {
        let file = |name: &str| world.is_first() && self.run.join(name).exists();
        let stop = signals::request().is_some() || file("STOP");
        let due = self.config.every > 0 && step.is_multiple_of(self.config.every);
        let writing = self.open.as_ref().is_some_and(|open| !open.writer.is_finished());
        let flags = [stop, due || file("SAVE"), writing].map(|flag| f64::from(u8::from(flag)));
        let mut numbers = [&flags[..], &world.calls()].concat();
        world.world.all_reduce_f64(&mut numbers, Reduce::Max);
        let (flags, calls) = numbers.split_at(flags.len());
        world.compare_calls(calls);
        let [stop, save, writing] = [0, 1, 2].map(|i| flags[i] > 0.0);
        // what is done anyway at the end needs no checkpoint
        let before_the_end = step < steps;
        let more = self.config.every > 0 && (step + 1).next_multiple_of(self.config.every) < steps;
        Wish {
            save: save && before_the_end,
            stop: stop && before_the_end,
            written: self.open.is_some() && !writing,
            more,
        }
    }

    /// Does what was asked for after step `step`, whose numbers are known. All ranks call it.
    ///
    /// # Errors
    /// On all ranks when one of them could not write.
    pub fn act(&mut self, wish: Wish, trainer: &Trainer, step: usize, world: &World) -> Result<Next, RunError> {
        if self.open.is_some() && (wish.written || wish.save || wish.stop) {
            // a slow disk delays the next save, it loses none
            self.commit(world)?;
        }
        if wish.more && self.config.background {
            self.snapshot.prepare(|| trainer.state_sizes(world.mesh, self.config.save_optimizer));
        } else if self.open.is_none() && !wish.save && !wish.stop {
            // the last save has used it
            self.snapshot = Snapshot::default();
        }
        if wish.save || wish.stop {
            trainer.check_weights(step, world)?;
            self.begin(trainer, step, world)?;
            if wish.stop || !self.config.background {
                self.commit(world)?;
            }
            if world.is_first() {
                let _ = std::fs::remove_file(self.run.join(if wish.stop { "STOP" } else { "SAVE" }));
            }
        }
        Ok(if wish.stop { Next::Stop } else { Next::GoOn })
    }

    /// What all ranks write for one checkpoint, about.
    pub fn bytes(&self, trainer: &Trainer, world: &World) -> u64 {
        let mine = trainer.decoder.table.params.iter().map(|param| param.num_elements() as u64).sum::<u64>();
        // weights and two moments in f32, of this rank's shards of the model
        mine * world.mesh.tp as u64 * 12
    }

    /// Waits for a save that is still open. All ranks call it.
    pub fn finish(&mut self, world: &World) -> Result<(), RunError> {
        if self.open.is_some() {
            self.commit(world)?;
        }
        self.snapshot = Snapshot::default();
        // asked for during the last step: nothing is left to stop or to save
        if world.is_first() {
            for name in ["STOP", "SAVE"] {
                let _ = std::fs::remove_file(self.run.join(name));
            }
        }
        Ok(())
    }

    fn begin(&mut self, trainer: &Trainer, step: usize, world: &World) -> Result<(), RunError> {
        // one rank makes the folder; what it could not do, all hear of
        let made = if world.is_first() { self.store.begin(step).map(drop) } else { Ok(()) };
        let optimizer = self.config.save_optimizer;
        self.agree(made, trainer.state_sizes(world.mesh, optimizer).iter().sum(), world)?;
        // what is written before the next step begins needs no copy, where it can be written from
        let in_place = !self.config.background && trainer.decoder.device == tch::Device::Cpu;
        let slices = match in_place {
            true => trainer.state(world.mesh, optimizer),
            false => self.snapshot.take(trainer.state_parts(world.mesh, optimizer)),
        };
        let bytes = slices.iter().map(StateSlice::bytes).sum();
        let path = self.store.partial(step).join(file_name(world.mesh.rank));
        let name = file_name(world.mesh.rank);
        let writer = std::thread::spawn(move || write(&path, &slices).map(|written| StateFile::new(name, written)));
        self.open = Some(Open {
            step,
            optimizer_steps: trainer.optimizer.steps(),
            method: trainer.method.state(),
            bytes,
            writer,
        });
        Ok(())
    }

    /// Waits until all ranks' files are on disk, however slow a disk is: the ranks answer each other all the while, so that the deadline
    /// of a wait tells a slow disk from a rank that has stopped. All ranks call it.
    fn wait(&self, world: &World) {
        let start = Instant::now();
        let mut told = false;
        loop {
            let writing = self.open.as_ref().is_some_and(|open| !open.writer.is_finished());
            let mut flags = [f64::from(u8::from(writing))];
            world.world.all_reduce_f64(&mut flags, Reduce::Max);
            if flags == [0.0] {
                return;
            }
            if !told && start.elapsed() > Duration::from_secs(60) {
                tracing::warn!(
                    "waiting for the files of a save: the disk is slower than the steps between two of them"
                );
                told = true;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Completes the checkpoint once all ranks' files are there.
    fn commit(&mut self, world: &World) -> Result<(), RunError> {
        self.wait(world);
        let Open { step, optimizer_steps, method, bytes, writer } =
            self.open.take().expect("invariant: a save is open");
        let file = world.watchdog.watch("this rank's disk", || writer.join());
        let file = file.expect("invariant: the writing thread does not panic");
        let described = file.as_ref().map(|file| serde_json::to_string(file).expect("invariant: a file is JSON"));
        let text = described.as_ref().map_or_else(|_| String::new(), Clone::clone);
        let all = world.world.gather_bytes(text.as_bytes());
        self.agree(file.map(drop), bytes, world)?;
        let committed = if world.is_first() {
            let files = all.iter().map(|text| serde_json::from_slice(text).expect("invariant: written by us above"));
            let manifest = Manifest {
                format: FORMAT,
                dunlearn: env!("CARGO_PKG_VERSION").to_owned(),
                step,
                optimizer_steps,
                config: self.resolved.clone(),
                digests: self.digests.clone(),
                tp: world.mesh.tp,
                dp: world.mesh.dp,
                method,
                files: files.collect(),
            };
            let committed = self.store.commit(&manifest);
            if committed.is_ok()
                && let Err(error) = self.store.keep(self.config.keep_last, self.config.keep_every)
            {
                // somebody reads it, say: the run can do without; the next start tries again
                tracing::warn!("an older checkpoint could not be removed: {error}");
            }
            committed
        } else {
            Ok(())
        };
        self.agree(committed, bytes, world)?;
        self.board.update(|status| status.checkpoint = Some(Saved { step, time: process::unix_seconds() }));
        tracing::info!("saved after step {step}: {}", self.store.folder().join(format!("step_{step:06}")).display());
        Ok(())
    }

    /// One rank's failure is everybody's, with its own words.
    fn agree(&self, mine: Result<(), CheckpointError>, bytes: usize, world: &World) -> Result<(), RunError> {
        let words = match &mine {
            Ok(()) => String::new(),
            Err(error) => {
                let folder = self.store.folder();
                let free = signals::free_bytes(if folder.exists() { folder } else { &self.run });
                let free = free.map_or_else(String::new, |free| format!("; {free} bytes are free there"));
                format!(
                    "{error}: this rank has {bytes} bytes to save{free}. The checkpoints before are as they were; make room and start again"
                )
            }
        };
        let all = world.world.gather_bytes(words.as_bytes());
        match all.iter().enumerate().find(|(_, words)| !words.is_empty()) {
            None => Ok(()),
            Some((rank, words)) => {
                Err(RunError::Refused(format!("saving, rank {rank}: {}", String::from_utf8_lossy(words))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::dist::run_threads;

    /// One rank's disk takes five times the deadline of a wait.
    #[test]
    fn a_slow_disk_is_no_stopped_rank() {
        let folder = tempfile::tempdir().unwrap();
        let alarm = Arc::new(AtomicBool::new(false));
        run_threads(1, 2, |world| {
            let heard = Arc::clone(&alarm);
            world.watchdog.set_deadline(Duration::from_secs(1));
            world.watchdog.start(move |_| heard.store(true, Ordering::Relaxed));
            let store = Store::of_run(folder.path());
            if world.is_first() {
                store.begin(3).unwrap();
            }
            world.world.barrier();
            let rank = world.mesh.rank;
            let writer = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_secs(5 * rank as u64));
                Ok(StateFile { name: file_name(rank), bytes: 0, digest: String::new() })
            });
            let mut saver = Saver {
                config: config::Checkpoint::default(),
                run: folder.path().to_owned(),
                store,
                resolved: Value::Null,
                digests: BTreeMap::new(),
                open: Some(Open { step: 3, optimizer_steps: 3, method: Value::Null, bytes: 0, writer }),
                snapshot: Snapshot::default(),
                board: Board::default(),
            };
            saver.finish(&world).unwrap();
        });
        assert!(!alarm.load(Ordering::Relaxed), "the wait for a disk was taken for a rank that stopped");
        assert_eq!(Store::of_run(folder.path()).open(3).unwrap().manifest.files.len(), 2);
    }
}
