//! Where a run is: says so to the watchdog, with the longest wait that is allowed there, and to whoever asks.

use std::cell::Cell;
use std::path::Path;
use std::time::Duration;

use crate::config::{Config, Source};
use crate::dist::{Phase, Watchdog};

/// Ranks wait for each other's files at least at this rate, of the whole job: a slow network disk under many readers. Unit: bytes a second.
const DISK: f64 = 50e6;
/// Text is read and cut into tokens at least at this rate. Unit: bytes a second.
const TEXT: f64 = 0.5e6;
/// Time to start a process, whatever it reads.
const STARTING: Duration = Duration::from_secs(60);

/// The phases of one run on one rank.
pub(super) struct Stages<'a> {
    watchdog: &'a Watchdog,
    /// Of one wait in a step.
    timeout: Duration,
    /// A step is behind: what is compiled or connected once is there.
    warm: Cell<bool>,
}

impl<'a> Stages<'a> {
    pub(super) fn new(config: &Config, watchdog: &'a Watchdog) -> Self {
        let stages = Self { watchdog, timeout: Duration::from_secs(config.run.timeout), warm: Cell::new(false) };
        stages.enter(Phase::Start, text_bytes(config));
        stages
    }

    /// `bytes`: what all ranks together read or write in this phase.
    pub(super) fn enter(&self, phase: Phase, bytes: u64) {
        let deadline = self.deadline(phase, bytes);
        self.watchdog.enter(phase, deadline);
        if bytes >= 1_000_000_000 {
            let (size, minutes) = (bytes as f64 / 1e9, deadline.as_secs_f64() / 60.0);
            tracing::info!("{phase}: {size:.1} GB; a rank that waits longer than {minutes:.0} min ends the job");
        } else if !matches!(phase, Phase::Step(_)) {
            tracing::debug!("{phase}: deadline of a wait {:.0} s", deadline.as_secs_f64());
        }
    }

    /// Step `step` (from 1) begins.
    pub(super) fn step(&self, step: usize) {
        self.enter(if self.warm.get() { Phase::Step(step) } else { Phase::FirstStep(step) }, 0);
    }

    /// A step is done.
    pub(super) fn warmed_up(&self) {
        self.warm.set(true);
    }

    fn deadline(&self, phase: Phase, bytes: u64) -> Duration {
        let at = |rate: f64| Duration::from_secs_f64(bytes as f64 / rate);
        match phase {
            Phase::Start => self.timeout + STARTING + at(TEXT),
            Phase::Load | Phase::Save(_) | Phase::Export => self.timeout + at(DISK),
            Phase::Step(_) => self.timeout,
            Phase::FirstStep(_) => 2 * self.timeout,
            Phase::Prepare | Phase::Evaluate(_) if self.warm.get() => self.timeout,
            Phase::Prepare | Phase::Evaluate(_) => 2 * self.timeout,
            Phase::End => self.timeout.max(STARTING),
        }
    }
}

/// Size of the data sets on disk.
fn text_bytes(config: &Config) -> u64 {
    let data = &config.data;
    let sources = [&data.forget, &data.retain, &data.train].into_iter().flatten();
    let similar = config.subspace.iter().flat_map(|subspace| &subspace.similar);
    sources.chain(similar).map(|source: &Source| size(&source.path)).sum()
}

fn size(path: &Path) -> u64 {
    match std::fs::metadata(path) {
        Ok(about) if about.is_dir() => {
            std::fs::read_dir(path).map_or(0, |listed| listed.flatten().map(|entry| size(&entry.path())).sum())
        }
        Ok(about) => about.len(),
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_grow_with_what_is_read_and_shrink_when_warm() {
        let dog = Watchdog::new(Duration::MAX);
        let stages = Stages { watchdog: &dog, timeout: Duration::from_secs(100), warm: Cell::new(false) };
        let seconds = |phase, bytes| stages.deadline(phase, bytes).as_secs();
        assert_eq!(seconds(Phase::Load, 141_000_000_000), 100 + 2820);
        assert_eq!(seconds(Phase::Save(3), 0), 100);
        assert_eq!(seconds(Phase::Start, 1_000_000), 162);
        assert_eq!((seconds(Phase::FirstStep(1), 0), seconds(Phase::Evaluate(0), 0)), (200, 200));
        stages.warmed_up();
        assert_eq!((seconds(Phase::Step(2), 0), seconds(Phase::Evaluate(2), 0)), (100, 100));
        stages.step(7);
        assert_eq!(dog.phase().0, Phase::Step(7));
    }
}
