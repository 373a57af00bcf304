//! Ends the process when it waits for others longer than agreed, and leaves its flight record whenever a job goes wrong: a hang
//! becomes a message that names rank, phase and collective.
//!
//! The thread that watches touches no device and no communicator: it must work when those do not.

use std::fmt;
use std::panic::Location;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tch::Kind;

use super::divergence;
use super::flight::{CallState, Dump, Failed, Ring, ranks};
use crate::abi::signals;

/// Time between two looks.
const TICK: Duration = Duration::from_millis(250);
/// A wait counts at most this much a look: a process that was stopped has not waited.
const LONGEST_TICK: Duration = Duration::from_secs(1);
/// How long a rank whose deadline has passed waits for the others' records.
const GATHERING: Duration = Duration::from_secs(2);
/// How long a rank lives on after another has failed, should nothing else end it.
const GRACE: Duration = Duration::from_secs(5);
/// A file in the run folder that asks all ranks for their records.
pub const ASK: &str = "DUMP";

/// What a rank is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Ranks meet, devices are chosen, data is read.
    Start,
    /// The model is read.
    Load,
    /// What training needs beforehand: reference, masks.
    Prepare,
    /// Numbers of the model after this many steps.
    Evaluate(usize),
    /// The first one of this process, in which kernels are compiled and connections opened. From 1.
    FirstStep(usize),
    /// From 1.
    Step(usize),
    /// After this step.
    Save(usize),
    Export,
    /// Nothing is left but to part.
    End,
}

/// Why the watching thread wants the process to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Alarm {
    /// A wait has outlasted its deadline, and this rank is the first to say so.
    Deadline(String),
    /// As above; another rank has said it all.
    DeadlineElsewhere(String),
    /// Another rank has failed and nobody has ended this one.
    OtherRank(String),
}

/// What this rank is doing, for whoever has to say why nothing moves. Clones share the same state.
#[derive(Clone)]
pub struct Watchdog {
    state: Arc<Mutex<State>>,
}

struct State {
    ring: Ring,
    waiting: Option<Wait>,
    /// Waits so far.
    waits: u64,
    phase: Phase,
    phase_since: Instant,
    deadline: Duration,
    home: Option<Home>,
    stood_still: Duration,
    trap: Option<(u64, Box<dyn FnOnce() + Send>)>,
    failed: bool,
}

struct Wait {
    number: u64,
    what: What,
    since: Instant,
}

enum What {
    /// A collective, by its number.
    Call(u64),
    Device(String),
    Other(String),
}

/// Where the records go.
#[derive(Clone)]
struct Home {
    run: PathBuf,
    rank: usize,
    world: usize,
    /// The record that is there was written because of a signal that asks to stop.
    stopping: bool,
}

impl Home {
    fn flight(&self) -> PathBuf {
        self.run.join("flight")
    }
}

impl Watchdog {
    /// A watchdog that only remembers. `deadline`: of one wait, until the first [`Self::enter`].
    pub fn new(deadline: Duration) -> Self {
        let state = State {
            ring: Ring::new(),
            waiting: None,
            waits: 0,
            phase: Phase::Start,
            phase_since: Instant::now(),
            deadline,
            home: None,
            stood_still: Duration::ZERO,
            trap: None,
            failed: false,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Starts a thread that calls `on_alarm`, which is expected to end the process, once a wait outlasts the deadline or another
    /// rank has failed. It also writes the record when it is asked to: SIGUSR2, a file `DUMP` in the run folder, another rank's
    /// failure, a signal that asks to stop.
    ///
    /// It ends when the last clone of the watchdog is dropped.
    pub fn start(&self, on_alarm: impl Fn(Alarm) + Send + 'static) {
        let state = Arc::downgrade(&self.state);
        std::thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || {
                let mut look = Look::new();
                while let Some(state) = state.upgrade() {
                    if let Some(alarm) = look.at(&Self { state }) {
                        on_alarm(alarm);
                        return;
                    }
                    std::thread::sleep(TICK);
                }
            })
            .expect("invariant: a process can start a thread");
    }

    /// What comes now, and how long one wait may take in it. `Duration::MAX`: as long as it wants.
    pub fn enter(&self, phase: Phase, deadline: Duration) {
        let mut state = self.lock();
        (state.phase, state.phase_since, state.deadline) = (phase, Instant::now(), deadline);
    }

    /// Changes how long one wait may take, in the same phase; gives how long it was.
    pub fn set_deadline(&self, deadline: Duration) -> Duration {
        std::mem::replace(&mut self.lock().deadline, deadline)
    }

    /// What this rank is doing, and since when.
    pub fn phase(&self) -> (Phase, Duration) {
        let state = self.lock();
        (state.phase, state.phase_since.elapsed())
    }

    /// From here on records go to `run/flight`, where the other ranks of the job look too; what is left there of an earlier one must
    /// have been removed.
    pub fn live_in(&self, run: PathBuf, rank: usize, world: usize) {
        self.lock().home = Some(Home { run, rank, world, stopping: false });
    }

    /// Notes that this rank fails, asks the others for their records and writes its own, once. Says whether it is the first.
    pub fn fail(&self, reason: &str) -> bool {
        let home = {
            let mut state = self.lock();
            if std::mem::replace(&mut state.failed, true) {
                return false;
            }
            state.home.clone()
        };
        let Some(home) = home else { return true };
        let first = Failed::leave(&home.flight(), home.rank, reason);
        self.record(reason, false);
        first
    }

    /// Takes back a record that was written because somebody asked the run to stop: it has stopped as it should.
    pub fn all_is_well(&self) {
        if let Some(home) = self.lock().home.take().filter(|home| home.stopping) {
            let _ = std::fs::remove_file(home.flight().join(super::flight::file_name(home.rank)));
            let _ = std::fs::remove_dir(home.flight()); // where it is empty
        }
    }

    /// Number of the next collective, for [`Self::watch_device`].
    pub fn next_call(&self) -> u64 {
        self.lock().ring.next()
    }

    /// Calls `trap` when this rank is about to enter the collective that comes `after` others from here on.
    pub fn trap(&self, after: u64, trap: Box<dyn FnOnce() + Send>) {
        let mut state = self.lock();
        state.trap = Some((state.ring.next() + after, trap));
    }

    /// Runs a wait for what the device has to do until the end of a step; then the collectives before number `calls` are done.
    pub fn watch_device<T>(&self, step: usize, calls: u64, wait: impl FnOnce() -> T) -> T {
        let result = self.wait(What::Device(format!("the device's work up to step {step}")), wait);
        self.lock().ring.settle(calls);
        result
    }

    /// Runs a wait for something else than the other ranks, under the same deadline.
    pub fn watch<T>(&self, what: &str, wait: impl FnOnce() -> T) -> T {
        self.wait(What::Other(what.to_owned()), wait)
    }

    pub(super) fn channel(&self, axis: &str, members: &[usize]) -> usize {
        self.lock().ring.channel(axis, members)
    }

    /// See [`Ring::digest`].
    pub(super) fn digest(&self, channel: usize) -> f64 {
        self.lock().ring.digest(channel)
    }

    /// Runs the part of a collective in which this rank waits. `after`: what it is then. Gives its number too.
    pub(super) fn collective<T>(
        &self,
        (channel, op, kind, count, site): (usize, &'static str, Kind, usize, &'static Location<'static>),
        after: CallState,
        body: impl FnOnce() -> T,
    ) -> (T, u64) {
        let mut state = self.lock();
        if state.trap.as_ref().is_some_and(|(at, _)| state.ring.next() >= *at) {
            let (_, trap) = state.trap.take().expect("invariant: just seen");
            drop(state);
            trap();
            state = self.lock();
        }
        let number = state.ring.begin(channel, op, kind, count, site);
        state.begin_wait(What::Call(number));
        drop(state);
        let result = body();
        self.arrive(number, after);
        (result, number)
    }

    /// Runs the wait for a collective that was started earlier.
    pub(super) fn rejoin<T>(&self, number: u64, after: CallState, body: impl FnOnce() -> T) -> T {
        self.lock().begin_wait(What::Call(number));
        let result = body();
        self.arrive(number, after);
        result
    }

    fn arrive(&self, number: u64, after: CallState) {
        let mut state = self.lock();
        state.waiting = None;
        if after != CallState::Started {
            state.ring.end(number, after);
        }
    }

    fn wait<T>(&self, what: What, wait: impl FnOnce() -> T) -> T {
        self.lock().begin_wait(what);
        let result = wait();
        self.lock().waiting = None;
        result
    }

    /// Writes this rank's record, where it has a place for it.
    fn record(&self, reason: &str, asked: bool) {
        let state = self.lock();
        let Some(home) = &state.home else { return };
        let mut dump = Dump::of_process(home.rank, home.world, reason, asked, state.phase);
        let folder = home.flight();
        state.describe(&mut dump);
        drop(state);
        if let Err(error) = dump.write(&folder) {
            tracing::warn!("no flight record in {}: {error}", folder.display());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin_wait(&mut self, what: What) {
        self.waits += 1;
        self.waiting = Some(Wait { number: self.waits, what, since: Instant::now() });
    }

    fn words(&self, what: &What) -> String {
        match what {
            What::Call(number) => self.ring.words(*number),
            What::Device(text) | What::Other(text) => text.clone(),
        }
    }

    fn describe(&self, dump: &mut Dump) {
        dump.phase_seconds = self.phase_since.elapsed().as_secs_f64();
        dump.deadline_seconds = (self.deadline != Duration::MAX).then_some(self.deadline.as_secs_f64());
        dump.waiting = self.waiting.as_ref().map(|wait| super::flight::Waiting {
            what: self.words(&wait.what),
            seconds: wait.since.elapsed().as_secs_f64(),
            call: match wait.what {
                What::Call(number) => self.ring.index(number),
                _ => None,
            },
            device: matches!(wait.what, What::Device(_)),
        });
        dump.idle_seconds = self.ring.idle().unwrap_or_else(|| self.phase_since.elapsed().as_secs_f64());
        dump.stood_still = self.stood_still.as_secs_f64();
        (dump.channels, dump.calls) = self.ring.calls();
    }
}

/// What the watching thread remembers from one look to the next.
struct Look {
    last: Instant,
    /// The wait under way, and how much of it this process has lived through.
    wait: (u64, Duration),
    ticks: u64,
    /// Looks in a row that found the file `DUMP`.
    asked: u32,
    stopping: bool,
    /// Another rank has failed.
    failed: Option<(Failed, Instant)>,
}

impl Look {
    fn new() -> Self {
        let last = Instant::now();
        Self { last, wait: (0, Duration::ZERO), ticks: 0, asked: 0, stopping: false, failed: None }
    }

    fn at(&mut self, dog: &Watchdog) -> Option<Alarm> {
        let gap = std::mem::replace(&mut self.last, Instant::now()).elapsed();
        self.ticks += 1;
        let (late, home) = {
            let mut state = dog.lock();
            if gap > 2 * LONGEST_TICK {
                state.stood_still = gap;
            }
            (self.late(&state, gap.min(LONGEST_TICK)), state.home.clone())
        };
        if let Some(message) = late {
            return Some(too_late(dog, &message, home));
        }
        if signals::take_record_request() {
            dog.record("SIGUSR2 came", true);
        }
        if let Some(name) = signals::request().filter(|_| !self.stopping) {
            self.stopping = true;
            if let Some(home) = &mut dog.lock().home {
                home.stopping = true;
            }
            dog.record(&format!("{name} came"), false);
        }
        // a look at a shared file system: once a second
        if let Some(home) = home.filter(|_| self.ticks.is_multiple_of(4)) {
            self.look_around(dog, &home);
        }
        let (failed, since) = self.failed.as_ref()?;
        (since.elapsed() > GRACE)
            .then(|| Alarm::OtherRank(format!("rank {} has failed ({})", failed.rank, first_line(&failed.message))))
    }

    /// What to say when the wait under way has taken too long.
    fn late(&mut self, state: &State, lived: Duration) -> Option<String> {
        let wait = state.waiting.as_ref()?;
        if self.wait.0 != wait.number {
            self.wait = (wait.number, Duration::ZERO);
            return None;
        }
        self.wait.1 += lived;
        (self.wait.1 > state.deadline).then(|| {
            let (what, seconds) = (state.words(&wait.what), self.wait.1.as_secs());
            let deadline = state.deadline.as_secs();
            format!("{}: no answer to {what} for {seconds} s (deadline {deadline} s, see run.timeout)", state.phase)
        })
    }

    fn look_around(&mut self, dog: &Watchdog, home: &Home) {
        self.asked = if home.run.join(ASK).exists() { self.asked + 1 } else { 0 };
        if self.asked == 1 {
            dog.record("the file DUMP is there", true);
        }
        // all have seen it by now
        if self.asked >= 4 && home.rank == 0 {
            let _ = std::fs::remove_file(home.run.join(ASK));
        }
        if self.failed.is_none()
            && let Some(failed) = Failed::read(&home.flight())
            && failed.rank != home.rank
        {
            dog.record(&format!("rank {} has failed", failed.rank), false);
            self.failed = Some((failed, Instant::now()));
        }
    }
}

/// A deadline has passed: gathers what the other ranks have to say, and says who is to blame.
fn too_late(dog: &Watchdog, message: &str, home: Option<Home>) -> Alarm {
    let Some(home) = home else { return Alarm::Deadline(message.to_owned()) };
    let first = dog.fail(message);
    let (flight, start) = (home.flight(), Instant::now());
    while Dump::count(&flight) < home.world && start.elapsed() < GATHERING {
        std::thread::sleep(Duration::from_millis(50));
    }
    if !first {
        // the first one has more to say; its message must be out before anybody's end ends the job
        std::thread::sleep(Duration::from_secs(1));
        let who = Failed::read(&flight).map_or_else(String::new, |failed| format!(", told by rank {}", failed.rank));
        return Alarm::DeadlineElsewhere(format!("{message}{who}"));
    }
    let blame = Dump::read_all(&flight).map(|dumps| divergence::verdict(&dumps, home.world));
    let blame = blame.unwrap_or_else(|error| error);
    Alarm::Deadline(format!("{message}\n{blame}\nrecords of the ranks: dunlearn doctor flight {}", home.run.display()))
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

impl Phase {
    /// The step that it belongs to.
    pub fn step(self) -> Option<usize> {
        match self {
            Self::Evaluate(step) | Self::FirstStep(step) | Self::Step(step) | Self::Save(step) => Some(step),
            Self::Start | Self::Load | Self::Prepare | Self::Export | Self::End => None,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Start => write!(f, "start"),
            Self::Load => write!(f, "load"),
            Self::Prepare => write!(f, "prepare"),
            Self::Evaluate(step) => write!(f, "evaluation after step {step}"),
            Self::FirstStep(step) | Self::Step(step) => write!(f, "step {step}"),
            Self::Save(step) => write!(f, "save after step {step}"),
            Self::Export => write!(f, "export"),
            Self::End => write!(f, "end"),
        }
    }
}

/// Ranks that have left no record.
pub(super) fn without_record(dumps: &[Dump], world: usize) -> Vec<usize> {
    (0..world).filter(|rank| dumps.iter().all(|dump| dump.rank != *rank)).collect()
}

/// `rank 2`, `ranks [0, 1]`.
pub(super) fn name_ranks(of: &[usize]) -> String {
    match of {
        [one] => format!("rank {one}"),
        _ => format!("ranks {}", ranks(of)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::print_stdout)]

    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn tp(count: usize) -> (usize, &'static str, Kind, usize, &'static Location<'static>) {
        (0, "all_reduce", Kind::Float, count, Location::caller())
    }

    #[test]
    fn a_wait_past_the_deadline_is_reported_with_its_name() {
        let (send, receive) = mpsc::channel();
        let watchdog = Watchdog::new(Duration::from_millis(300));
        watchdog.channel("tp", &[0, 1]);
        watchdog.start(move |alarm| send.send(alarm).unwrap());
        watchdog.enter(Phase::Step(3), Duration::from_millis(300));
        watchdog.collective(tp(4), CallState::Done, || {
            let alarm = receive.recv_timeout(PATIENCE).unwrap();
            let Alarm::Deadline(text) = alarm else { panic!("{alarm:?}") };
            assert!(text.starts_with("step 3: no answer to all_reduce 0 of tp [0, 1] (Float x 4, src/dist/"), "{text}");
        });
    }

    /// Two ranks of a job in one process: the second never comes.
    #[test]
    fn the_rank_that_does_not_come_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let ranks: Vec<Watchdog> = (0..2)
            .map(|rank| {
                let dog = Watchdog::new(Duration::from_millis(600));
                dog.channel("tp", &[0, 1]);
                dog.live_in(folder.path().to_owned(), rank, 2);
                dog
            })
            .collect();
        let (send, receive) = mpsc::channel();
        for (rank, dog) in ranks.iter().enumerate() {
            let send = send.clone();
            dog.start(move |alarm| send.send((rank, alarm)).unwrap());
            dog.collective(tp(1), CallState::Done, || ());
        }
        let alarms = ranks[0].collective(tp(2), CallState::Done, || {
            let next = || receive.recv_timeout(PATIENCE).unwrap();
            [next(), next()]
        });
        let [(0, Alarm::Deadline(text)), (1, Alarm::OtherRank(other))] = alarms.0 else { panic!("{alarms:?}") };
        assert!(text.contains("rank 1 has not come to all_reduce 1 of tp [0, 1] (Float x 2, "), "{text}");
        assert!(other.starts_with("rank 0 has failed (start: no answer to all_reduce 1 of tp"), "{other}");
        assert_eq!(Dump::read_all(&folder.path().join("flight")).unwrap().len(), 2);
    }

    #[test]
    fn a_process_that_was_stopped_has_not_waited() {
        let dog = Watchdog::new(Duration::from_secs(10));
        dog.channel("tp", &[0, 1]);
        dog.collective(tp(1), CallState::Done, || {
            let mut look = Look::new();
            assert_eq!(look.at(&dog), None);
            look.last = Instant::now().checked_sub(Duration::from_secs(3600)).unwrap();
            assert_eq!(look.at(&dog), None);
            let lived = look.wait.1;
            assert!(lived > Duration::ZERO && lived <= LONGEST_TICK, "{lived:?}");
            look.wait.1 = Duration::from_secs(10);
            assert!(matches!(look.at(&dog), Some(Alarm::Deadline(_))));
        });
        assert!(dog.lock().stood_still.as_secs() >= 3600);
    }

    #[test]
    fn records_are_written_when_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let dog = Watchdog::new(Duration::MAX);
        dog.channel("tp", &[0, 1]);
        dog.live_in(folder.path().to_owned(), 0, 2);
        std::fs::write(folder.path().join("DUMP"), "").unwrap();
        let mut look = Look::new();
        (0..16).for_each(|_| assert_eq!(look.at(&dog), None));
        let dumps = Dump::read_all(&folder.path().join("flight")).unwrap();
        assert!(dumps[0].asked && dumps[0].reason == "the file DUMP is there", "{:?}", dumps[0]);
        assert!(!folder.path().join("DUMP").exists());
        // nothing went wrong, and the record stays: somebody wanted it
        dog.all_is_well();
        assert_eq!(Dump::count(&folder.path().join("flight")), 1);
    }

    /// What it costs to record a collective, against some hundred microseconds that the smallest one takes.
    #[test]
    fn a_record_costs_next_to_nothing() {
        let dog = Watchdog::new(Duration::MAX);
        dog.channel("tp", &[0, 1]);
        dog.start(|_| ());
        let batch = |_| {
            let start = Instant::now();
            (0..1000).for_each(|n| _ = dog.collective(tp(n), CallState::Done, || ()));
            start.elapsed().as_secs_f64() / 1000.0
        };
        let least = (0..50).map(batch).fold(f64::INFINITY, f64::min);
        println!("recording a collective: {:.0} ns", least * 1e9);
        assert!(least < 5e-6, "{least} s");
    }

    #[test]
    fn a_trap_springs_before_its_collective() {
        let dog = Watchdog::new(Duration::MAX);
        dog.channel("tp", &[0, 1]);
        let (send, receive) = mpsc::channel();
        dog.trap(2, Box::new(move || send.send(()).unwrap()));
        let sprung = |n| dog.collective(tp(n), CallState::Done, || receive.try_recv().is_ok()).0;
        assert_eq!([sprung(1), sprung(2), sprung(3), sprung(4)], [false, false, true, false]);
    }
}
