//! How fast a rank's state goes to disk and comes back, against the disk's own sequential rate in the same folder.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::step::{StepBench, prepared};
use crate::abi::host;
use crate::abi::slices::bytes;
use crate::checkpoint::state::{StateFiles, StateSlice, write};
use crate::checkpoint::{CheckpointError, Snapshot, Stream};
use crate::dist::World;
use crate::model::ModelError;
use crate::telemetry::table;

/// Rates in bytes a second.
#[derive(Clone, Debug, Serialize)]
pub struct CheckpointResult {
    pub bytes: usize,
    /// What a save adds to a step when a thread writes: the copy of the state. The median of those after the first.
    pub stall_seconds: f64,
    /// The first, whose memory is new.
    pub first_stall_seconds: f64,
    pub step_seconds: f64,
    pub write_rate: f64,
    pub disk_write_rate: f64,
    /// With the files in the page cache dropped where the system lets us, as is the disk's.
    pub read_rate: f64,
    pub disk_read_rate: f64,
    /// The largest slice. Unit: bytes.
    pub largest_bytes: usize,
    /// Memory that loading added at its peak beyond the state, which was allocated before; None where the system does not say. Unit:
    /// bytes.
    pub load_extra_bytes: Option<u64>,
}

/// Why it could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("{0}")]
    Disk(#[from] std::io::Error),
}

/// Saves and loads the state of the benchmark's model on one rank; `folder` is on the disk that is meant.
pub fn checkpoint(bench: &StepBench, folder: &Path, world: &World) -> Result<CheckpointResult, Error> {
    let (mut trainer, step_seconds) = prepared(bench, world)?;
    let path = folder.join("bench_checkpoint.safetensors");
    let raw = folder.join("bench_checkpoint.raw");
    let mut snapshot = Snapshot::default();
    let mut stalls = Vec::new();
    for _ in 0..4 {
        let start = Instant::now();
        drop(snapshot.take(trainer.state_parts(world.mesh, true)));
        stalls.push(start.elapsed().as_secs_f64());
    }
    let first_stall_seconds = stalls.remove(0);
    stalls.sort_by(f64::total_cmp);
    let stall_seconds = stalls[stalls.len() / 2];
    let slices = snapshot.take(trainer.state_parts(world.mesh, true));
    let size: usize = slices.iter().map(StateSlice::bytes).sum();
    let mut best = (f64::INFINITY, f64::INFINITY, f64::INFINITY, f64::INFINITY);
    let largest = slices.iter().map(StateSlice::bytes).max().unwrap_or(0);
    let mut load_extra_bytes = None;
    // turn by turn, so that both see the same disk; to names that are new, as those of checkpoints are
    for round in 0..4 {
        for old in [&path, &raw].into_iter().filter(|path| path.exists()) {
            std::fs::remove_file(old)?;
        }
        best.0 = best.0.min(seconds(|| write(&path, &slices).map(drop))?);
        best.1 = best.1.min(seconds(|| write_plainly(&raw, &slices, round % 2 == 0))?);
        forget(&path)?;
        forget(&raw)?;
        // whoever reads second may find the disk warmer or colder
        if round % 2 == 1 {
            best.3 = best.3.min(seconds(|| read_plainly(&raw))?);
        }
        let before = host::forget_peak().then(host::peak_resident_bytes);
        best.2 = best.2.min(seconds(|| trainer.restore(&StateFiles::open([path.as_path()])?, 1, world).map(drop))?);
        let extra = before.map(|before| host::peak_resident_bytes().saturating_sub(before));
        load_extra_bytes = load_extra_bytes.max(extra);
        if round % 2 == 0 {
            best.3 = best.3.min(seconds(|| read_plainly(&raw))?);
        }
    }
    std::fs::remove_file(&path)?;
    std::fs::remove_file(&raw)?;
    let rate = |seconds: f64| size as f64 / seconds;
    Ok(CheckpointResult {
        bytes: size,
        stall_seconds,
        first_stall_seconds,
        step_seconds,
        write_rate: rate(best.0),
        disk_write_rate: rate(best.1),
        read_rate: rate(best.2),
        disk_read_rate: rate(best.3),
        largest_bytes: largest,
        load_extra_bytes,
    })
}

fn seconds<E: Into<Error>>(body: impl FnOnce() -> Result<(), E>) -> Result<f64, Error> {
    let start = Instant::now();
    body().map_err(Into::into)?;
    Ok(start.elapsed().as_secs_f64())
}

/// The same bytes in one stream, synchronised at the end: nothing but the disk. `early`: with the disk at work from the first piece on, or
/// as the system does by itself; the faster one counts.
fn write_plainly(path: &Path, slices: &[StateSlice], early: bool) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut all = slices.iter().map(|slice| bytes(&slice.values));
    if early {
        let mut stream = Stream::new(file, 0);
        all.try_for_each(|bytes| stream.append(bytes))?;
        return stream.finish()?.sync_all();
    }
    all.flat_map(|bytes| bytes.chunks(1 << 20)).try_for_each(|piece| file.write_all(piece))?;
    file.sync_all()
}

fn read_plainly(path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut block = vec![0; 1 << 20];
    while file.read(&mut block)? > 0 {}
    Ok(())
}

/// Asks the system to drop a file's pages, so that reading means the disk.
fn forget(path: &Path) -> std::io::Result<()> {
    host::drop_from_cache(&File::open(path)?);
    Ok(())
}

impl CheckpointResult {
    /// For people.
    pub fn text(&self) -> String {
        let mib = |rate: f64| format!("{:.0}", rate / 1048576.0);
        let row = |what: &str, ours: f64, disk: f64| {
            vec![what.to_owned(), mib(ours), mib(disk), format!("{:.2}", ours / disk)]
        };
        let rows = [
            row("write, hashed and synchronised", self.write_rate, self.disk_write_rate),
            row("read and restore", self.read_rate, self.disk_read_rate),
        ];
        format!(
            "{:.0} MiB of state\n\n{}\nstall of a save written by a thread: {:.1} ms (the first {:.1}); a step takes {:.1} ms, so {:.2} % at every = 10\n\
             loading added {} to the state's own memory; the largest slice has {:.1} MiB\n",
            self.bytes as f64 / 1048576.0,
            table(&["", "MiB/s", "disk alone", "ratio"], &rows),
            1e3 * self.stall_seconds,
            1e3 * self.first_stall_seconds,
            1e3 * self.step_seconds,
            100.0 * self.stall_seconds / (10.0 * self.step_seconds),
            self.load_extra_bytes.map_or("an unknown size".to_owned(), |n| format!("{:.1} MiB", n as f64 / 1048576.0)),
            self.largest_bytes as f64 / 1048576.0
        )
    }
}
