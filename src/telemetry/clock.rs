//! Where the time of a step goes.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

/// Parts of a step whose times add up to the step's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Embedding,
    Attention,
    Mlp,
    Head,
    Optimizer,
}

/// All parts, in the order in which a step runs through them.
pub const PARTS: [(Part, &str); 5] = [
    (Part::Embedding, "embedding"),
    (Part::Attention, "attention"),
    (Part::Mlp, "mlp"),
    (Part::Head, "head"),
    (Part::Optimizer, "optimizer"),
];

/// Adds up times; a part does not contain another.
#[derive(Default)]
pub struct Clock {
    times: [Cell<Duration>; PARTS.len()],
    settle: RefCell<Option<Box<dyn Fn()>>>,
    spans: RefCell<Option<Vec<Span>>>,
}

/// When a part ran.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub part: Part,
    pub start: Instant,
    pub end: Instant,
}

impl Clock {
    /// Runs `body` and adds its time to `part`.
    pub fn time<T>(&self, part: Part, body: impl FnOnce() -> T) -> T {
        self.settle();
        let start = Instant::now();
        let result = body();
        self.settle();
        let end = Instant::now();
        let cell = &self.times[part as usize];
        cell.set(cell.get() + (end - start));
        if let Some(spans) = self.spans.borrow_mut().as_mut() {
            spans.push(Span { part, start, end });
        }
        result
    }

    /// Calls `wait` around every part, for a device that works on while the host has gone ahead: times are then true, and the
    /// whole is slower. None: times are the host's.
    pub fn settle_with(&self, wait: Option<Box<dyn Fn()>>) {
        *self.settle.borrow_mut() = wait;
    }

    /// From now on notes when each part runs.
    pub fn record(&self) {
        *self.spans.borrow_mut() = Some(Vec::new());
    }

    /// What was noted since [`Self::record`], and no more from now on.
    pub fn recorded(&self) -> Vec<Span> {
        self.spans.borrow_mut().take().unwrap_or_default()
    }

    pub fn get(&self, part: Part) -> Duration {
        self.times[part as usize].get()
    }

    /// Starts from zero.
    pub fn reset(&self) {
        self.times.iter().for_each(|cell| cell.set(Duration::ZERO));
    }

    fn settle(&self) {
        if let Some(wait) = self.settle.borrow().as_ref() {
            wait();
        }
    }
}
