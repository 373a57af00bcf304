//! The flight record: the last collectives of a rank, and the file about them that it leaves when something goes wrong.

use std::collections::VecDeque;
use std::io::Write;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::Kind;

use super::watchdog::Phase;

/// Collectives that a rank remembers: a step or two of the largest models.
const RING: usize = 8192;
/// Version of the files.
const FORMAT: u32 = 1;
/// Who failed first, and why; its presence asks the other ranks for their records.
const FAILED: &str = "FAILED";

/// How far a collective has come on this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallState {
    /// This rank has entered it, or has started it and goes on computing.
    Started,
    /// Handed to a device, which may not have done it yet.
    Queued,
    Done,
}

/// What this rank has called, newest last.
pub(super) struct Ring {
    channels: Vec<Channel>,
    entries: VecDeque<Entry>,
    /// Number of the oldest entry.
    first: u64,
    /// Entries that a device may not have done.
    queued: usize,
}

struct Entry {
    channel: usize,
    seq: u64,
    op: &'static str,
    kind: Kind,
    count: usize,
    site: &'static Location<'static>,
    start: Instant,
    end: Option<Instant>,
    state: CallState,
}

/// A communicator, the same on all its ranks by axis and members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Channel {
    pub axis: String,
    /// Ranks of the job.
    pub members: Vec<usize>,
    /// Collectives that this rank has begun here.
    pub calls: u64,
    /// Of what was called so far: equal on ranks that have called the same.
    #[serde(skip)]
    digest: u64,
}

impl Channel {
    pub(super) fn named(axis: &str, members: &[usize]) -> Self {
        Self { axis: axis.to_owned(), members: members.to_vec(), calls: 0, digest: 0 }
    }
}

/// One collective in a rank's record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// Index of its communicator in [`Dump::channels`].
    pub channel: usize,
    /// Number in its communicator, from 0.
    pub seq: u64,
    pub op: String,
    /// Element type.
    pub kind: String,
    /// Elements.
    pub count: usize,
    /// File and line that called.
    pub site: String,
    pub state: CallState,
    /// Seconds between its start and the record.
    pub age: f64,
    /// Seconds that it took.
    pub seconds: Option<f64>,
}

/// What one rank leaves: `flight/rank_00000.json` in the run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dump {
    pub format: u32,
    pub rank: usize,
    pub world: usize,
    pub host: String,
    pub pid: u32,
    pub version: String,
    /// Why it was written.
    pub reason: String,
    /// Somebody asked for it; nothing need be wrong.
    pub asked: bool,
    /// Unix time.
    pub time: f64,
    pub phase: String,
    pub phase_seconds: f64,
    /// Of one wait in this phase; None: none.
    pub deadline_seconds: Option<f64>,
    /// What the rank waits for, where it waits.
    pub waiting: Option<Waiting>,
    /// Seconds since the last collective ended.
    pub idle_seconds: f64,
    /// Seconds for which this process did not run at all, the last time that it was stopped; 0 where it never was.
    pub stood_still: f64,
    pub channels: Vec<Channel>,
    pub calls: Vec<Call>,
    /// State and name of each thread, as the system says; the first is the one that computes.
    pub threads: Vec<String>,
}

/// A wait under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Waiting {
    pub what: String,
    pub seconds: f64,
    /// Index of the collective in [`Dump::calls`]; None: it waits for something else.
    pub call: Option<usize>,
    /// It waits for its device.
    pub device: bool,
}

/// The first rank that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    pub rank: usize,
    pub message: String,
    /// Unix time.
    pub time: f64,
}

impl Ring {
    pub(super) fn new() -> Self {
        Self { channels: Vec::new(), entries: VecDeque::with_capacity(RING), first: 0, queued: 0 }
    }

    pub(super) fn channel(&mut self, axis: &str, members: &[usize]) -> usize {
        self.channels.push(Channel::named(axis, members));
        self.channels.len() - 1
    }

    /// A digest of everything called on a channel so far, exact as a floating-point number.
    pub(super) fn digest(&self, channel: usize) -> f64 {
        (self.channels[channel].digest >> 12) as f64
    }

    /// Notes a collective; gives its number on this rank.
    pub(super) fn begin(
        &mut self,
        channel: usize,
        op: &'static str,
        kind: Kind,
        count: usize,
        site: &'static Location<'static>,
    ) -> u64 {
        let at = &mut self.channels[channel];
        let seq = at.calls;
        at.calls += 1;
        let words = op.bytes().map(u64::from).chain([kind as u64, count as u64]);
        at.digest = words.fold(at.digest, |hash, word| {
            (hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95) // FxHash
        });
        if self.entries.len() == RING {
            self.entries.pop_front();
            self.first += 1;
        }
        let (start, state) = (Instant::now(), CallState::Started);
        self.entries.push_back(Entry { channel, seq, op, kind, count, site, start, end: None, state });
        self.next() - 1
    }

    /// Number of the next collective.
    pub(super) fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    pub(super) fn end(&mut self, number: u64, state: CallState) {
        if let Some(entry) = self.index(number).and_then(|index| self.entries.get_mut(index)) {
            entry.state = state;
            entry.end = Some(Instant::now());
            self.queued += usize::from(state == CallState::Queued);
        }
    }

    /// A device has done everything that was queued before `number`.
    pub(super) fn settle(&mut self, number: u64) {
        if self.queued == 0 {
            return;
        }
        let upto = self.index(number).unwrap_or(0).min(self.entries.len());
        let queued = self.entries.range_mut(..upto).filter(|entry| entry.state == CallState::Queued);
        queued.for_each(|entry| entry.state = CallState::Done);
        self.queued = self.entries.iter().filter(|entry| entry.state == CallState::Queued).count();
    }

    /// The collective in words: `all_reduce 118 of tp [0, 1] (Float x 4096, src/model/mlp.rs:88)`.
    pub(super) fn words(&self, number: u64) -> String {
        self.index(number).and_then(|index| self.entries.get(index)).map_or_else(String::new, |entry| {
            let channel = &self.channels[entry.channel];
            let site = format!("{}:{}", entry.site.file(), entry.site.line());
            words(entry.op, entry.seq, channel, &format!("{:?}", entry.kind), entry.count, &site)
        })
    }

    /// Seconds since the newest collective ended, or None where one is under way or none was.
    pub(super) fn idle(&self) -> Option<f64> {
        self.entries.iter().rev().find_map(|entry| entry.end).map(|end| end.elapsed().as_secs_f64())
    }

    pub(super) fn index(&self, number: u64) -> Option<usize> {
        number.checked_sub(self.first).map(|index| index as usize)
    }

    pub(super) fn calls(&self) -> (Vec<Channel>, Vec<Call>) {
        let now = Instant::now();
        let calls = self.entries.iter().map(|entry| Call {
            channel: entry.channel,
            seq: entry.seq,
            op: entry.op.to_owned(),
            kind: format!("{:?}", entry.kind),
            count: entry.count,
            site: format!("{}:{}", entry.site.file(), entry.site.line()),
            state: entry.state,
            age: rounded(now.saturating_duration_since(entry.start).as_secs_f64()),
            seconds: entry.end.map(|end| rounded(end.saturating_duration_since(entry.start).as_secs_f64())),
        });
        (self.channels.clone(), calls.collect())
    }
}

/// Microseconds are enough.
fn rounded(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

pub(super) fn words(op: &str, seq: u64, channel: &Channel, kind: &str, count: usize, site: &str) -> String {
    format!("{op} {seq} of {} {} ({kind} x {count}, {site})", channel.axis, ranks(&channel.members))
}

/// `[0, 1, 2]`, or `[0, 2, ... 30: 16 ranks]` for many.
pub(super) fn ranks(members: &[usize]) -> String {
    match members {
        [first, second, .., last] if members.len() > 8 => {
            format!("[{first}, {second}, ... {last}: {} ranks]", members.len())
        }
        _ => format!("{members:?}"),
    }
}

impl Dump {
    /// The parts that a process knows of itself.
    pub(super) fn of_process(rank: usize, world: usize, reason: &str, asked: bool, phase: Phase) -> Self {
        Self {
            format: FORMAT,
            rank,
            world,
            host: sysinfo::System::host_name().unwrap_or_default(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            reason: reason.to_owned(),
            asked,
            time: unix_seconds(),
            phase: phase.to_string(),
            phase_seconds: 0.0,
            deadline_seconds: None,
            waiting: None,
            idle_seconds: 0.0,
            stood_still: 0.0,
            channels: Vec::new(),
            calls: Vec::new(),
            threads: threads(),
        }
    }

    /// Writes the record; the file has its name only when it is whole.
    pub(super) fn write(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(file_name(self.rank));
        let partial = path.with_extension("partial");
        std::fs::write(&partial, serde_json::to_vec(self)?)?;
        std::fs::rename(partial, path)
    }

    /// All records of a folder in the order of ranks.
    ///
    /// # Errors
    /// A file that is none, by its name.
    pub fn read_all(folder: &Path) -> Result<Vec<Self>, String> {
        let listed = std::fs::read_dir(folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
        let names = listed.flatten().map(|entry| entry.path());
        let mut paths: Vec<PathBuf> = names.filter(|path| is_record(path)).collect();
        paths.sort();
        let read = |path: &PathBuf| {
            let complain = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
            let bytes = std::fs::read(path).map_err(|error| complain(&error))?;
            let dump: Self = serde_json::from_slice(&bytes).map_err(|error| complain(&error))?;
            if dump.format != FORMAT {
                return Err(complain(&format!("format {}, expected {FORMAT}", dump.format)));
            }
            if let Some(call) = dump.calls.iter().find(|call| call.channel >= dump.channels.len()) {
                return Err(complain(&format!("a call on channel {} of {}", call.channel, dump.channels.len())));
            }
            Ok(dump)
        };
        paths.iter().map(read).collect()
    }

    /// Records that are there, without reading them.
    pub(super) fn count(folder: &Path) -> usize {
        std::fs::read_dir(folder).map_or(0, |listed| listed.flatten().filter(|entry| is_record(&entry.path())).count())
    }

    /// The collective in which this rank waits.
    pub fn waiting_call(&self) -> Option<&Call> {
        self.calls.get(self.waiting.as_ref()?.call?)
    }

    /// A call of this rank in words.
    pub fn words(&self, call: &Call) -> String {
        words(&call.op, call.seq, &self.channels[call.channel], &call.kind, call.count, &call.site)
    }
}

fn is_record(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("rank_") && name.ends_with(".json")
}

/// Name of a rank's record in the folder.
pub(super) fn file_name(rank: usize) -> String {
    format!("rank_{rank:05}.json")
}

impl Failed {
    /// Leaves the note; false where another rank has left one before.
    pub(super) fn leave(folder: &Path, rank: usize, message: &str) -> bool {
        let failed = Self { rank, message: message.to_owned(), time: unix_seconds() };
        let text = serde_json::to_string(&failed).unwrap_or_default();
        let _ = std::fs::create_dir_all(folder);
        match std::fs::File::create_new(folder.join(FAILED)) {
            Ok(mut file) => {
                let _ = file.write_all(text.as_bytes());
                true
            }
            Err(error) => error.kind() != std::io::ErrorKind::AlreadyExists,
        }
    }

    /// The note of a folder, where there is one.
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(FAILED)).ok()?).ok()
    }
}

pub(super) fn unix_seconds() -> f64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0.0, |time| time.as_secs_f64())
}

/// `S main`, `R dunlearn`, ...: R runs, S waits, D waits for a disk, T is stopped.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let mut found: Vec<(u32, String)> = tasks
        .filter_map(|task| {
            let id = task.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            Some((id, format!("{} {name}", rest.trim_start().chars().next()?)))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, text)| text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn call(ring: &mut Ring, channel: usize, count: usize) -> u64 {
        ring.begin(channel, "all_reduce", Kind::Float, count, Location::caller())
    }

    #[test]
    fn a_ring_forgets_the_oldest_and_keeps_counting() {
        let mut ring = Ring::new();
        let channel = ring.channel("tp", &[0, 1]);
        for count in 0..RING + 10 {
            let number = call(&mut ring, channel, count);
            assert_eq!(number, count as u64);
            ring.end(number, CallState::Done);
        }
        ring.end(3, CallState::Started); // forgotten: nothing happens
        let (channels, calls) = ring.calls();
        assert_eq!((calls.len(), channels[0].calls), (RING, RING as u64 + 10));
        assert_eq!((calls[0].seq, calls[0].count, calls[0].state), (10, 10, CallState::Done));
        assert!(calls[0].site.starts_with("src/dist/flight.rs:"), "{}", calls[0].site);
        assert!(ring.words(RING as u64).starts_with(&format!("all_reduce {RING} of tp [0, 1] (Float x {RING}, src/")));
    }

    #[test]
    fn what_a_device_has_done_is_done() {
        let mut ring = Ring::new();
        let channel = ring.channel("tp", &[0, 1]);
        for state in [CallState::Queued, CallState::Started, CallState::Queued, CallState::Queued] {
            let number = call(&mut ring, channel, 1);
            if state == CallState::Queued {
                ring.end(number, state);
            }
        }
        ring.settle(3);
        let states: Vec<_> = ring.calls().1.iter().map(|call| call.state).collect();
        assert_eq!(states, [CallState::Done, CallState::Started, CallState::Done, CallState::Queued]);
    }

    #[test]
    fn digests_tell_calls_apart() {
        let digest = |counts: &[usize]| {
            let mut ring = Ring::new();
            let channel = ring.channel("tp", &[0, 1]);
            counts.iter().for_each(|&count| _ = call(&mut ring, channel, count));
            ring.digest(channel)
        };
        assert_eq!(digest(&[1, 2]), digest(&[1, 2]));
        assert!(digest(&[1, 2]) != digest(&[2, 1]) && digest(&[1]) != digest(&[1, 0]) && digest(&[1]) != digest(&[2]));
        assert!(digest(&[7, 9]) < (1u64 << 53) as f64);
    }

    #[test]
    fn the_first_to_fail_is_the_one_that_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let flight = folder.path().join("flight");
        assert!(Failed::read(&flight).is_none());
        assert!(Failed::leave(&flight, 3, "no answer"));
        assert!(!Failed::leave(&flight, 1, "gone"));
        let failed = Failed::read(&flight).unwrap();
        assert_eq!((failed.rank, failed.message.as_str()), (3, "no answer"));
        assert_eq!(std::fs::read_dir(&flight).unwrap().count(), 1);
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut ring = Ring::new();
        let channel = ring.channel("dp", &[0, 2]);
        call(&mut ring, channel, 5);
        let (channels, calls) = ring.calls();
        let mut dump = Dump::of_process(2, 4, "asked", true, Phase::Step(7));
        (dump.channels, dump.calls) = (channels, calls);
        dump.write(folder.path()).unwrap();
        dump.channels[0].digest = 0; // of the process, not of the file
        assert_eq!(Dump::read_all(folder.path()).unwrap(), [dump]);
        assert_eq!(Dump::count(folder.path()), 1);
        std::fs::write(folder.path().join("rank_00003.json"), "{").unwrap();
        let text = Dump::read_all(folder.path()).unwrap_err();
        assert!(text.contains("rank_00003.json: EOF"), "{text}");
    }
}
