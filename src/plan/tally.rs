//! What a walk through a step adds up: bytes held by purpose, operations, calls, and seconds on an imagined machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::machine::Machine;
use crate::config::Precision;
use crate::dist::wire::{Call, Op};

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Weights,
    Masters,
    Gradients,
    Moments,
    /// What forward keeps for backward.
    Activations,
    /// Rows of the head and chunks of logits.
    Head,
    /// Copies of the reference's head and rows.
    Caches,
    /// Copies of what is on its way, and what communicators reserve.
    Communication,
    /// What lives within one half block.
    Workspace,
    /// The copy of the state from which saves are written while training goes on.
    Snapshot,
    /// Freed, and kept by the allocator for what is no larger than it keeps.
    Kept,
    /// The process itself: libraries, contexts.
    Runtime,
}

pub const PARTS: [(Part, &str); 12] = [
    (Part::Weights, "weights"),
    (Part::Masters, "master weights"),
    (Part::Gradients, "gradients"),
    (Part::Moments, "optimizer state"),
    (Part::Activations, "activations"),
    (Part::Head, "head and logits"),
    (Part::Caches, "reference"),
    (Part::Communication, "communication"),
    (Part::Workspace, "workspace"),
    (Part::Snapshot, "copy for saves"),
    (Part::Kept, "kept by the allocator"),
    (Part::Runtime, "runtime base"),
];

/// Bytes by [`Part`].
pub type Bytes = [u64; PARTS.len()];

/// Memory that is held until it is given to [`Tally::free`].
#[derive(Debug)]
#[must_use = "memory that is held is freed again"]
pub struct Held(Part, u64);

/// Where in a run the walk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub phase: Phase,
    pub layer: Option<(usize, &'static str)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Load,
    /// Forward passes without backward: reference and evaluation.
    Scoring,
    Forward,
    Head,
    Backward,
    Optimizer,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let phase = match self.phase {
            Phase::Load => "loading",
            Phase::Scoring => "scoring without backward",
            Phase::Forward => "forward",
            Phase::Head => "the head",
            Phase::Backward => "backward",
            Phase::Optimizer => "the optimizer's step",
        };
        match self.layer {
            Some((layer, part)) => write!(f, "{phase}, {part} of layer {layer}"),
            None => f.write_str(phase),
        }
    }
}

/// The most that was held at once.
#[derive(Clone, Debug)]
pub struct Peak {
    pub bytes: Bytes,
    pub place: Place,
}

impl Peak {
    pub fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

/// How the operands of a product lie in memory, as BLAS writes it: T is one that is read transposed. Libraries have code of its own for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operands {
    /// Forward: `x W^T`.
    Nt,
    /// The gradient of an input: `g W`.
    Nn,
    /// The gradient of a matrix: `g^T x`.
    Tn,
}

/// One matrix product, `batch` times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Product {
    pub operands: Operands,
    pub rows: u64,
    pub inner: u64,
    pub columns: u64,
    pub batch: u64,
}

impl Product {
    pub fn operations(&self) -> f64 {
        2.0 * self.rows as f64 * self.inner as f64 * self.columns as f64 * self.batch as f64
    }
}

/// A pass over memory that is no product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// Copies and sums, element by element. This and what follows up to [`Self::Squares`], unit: bytes read and written.
    Copy,
    /// From one kind of number to another.
    Cast,
    Norm,
    NormBackward,
    /// Rotary embedding.
    Rotation,
    /// The MLP's gated activation.
    Activation,
    ActivationBackward,
    /// Rows of tokens into heads for attention, and back.
    Packing,
    /// Zeros in memory that comes from the system anew.
    Fresh,
    /// Sums of squares.
    Squares,
    /// Softmax of attention scores. Unit: elements.
    Scores,
    /// Scores' probabilities again and their gradient. Unit: elements.
    ScoresBackward,
    /// Exponentials of logits. Unit: elements.
    Logits,
    /// Unit: weights.
    Optimizer,
}

impl Pass {
    /// Bytes of a unit where only the memory's rate is known: a logit is read and written once; AdamW reads and writes three f32 and
    /// reads a gradient.
    pub fn bytes(self) -> f64 {
        match self {
            Self::Scores | Self::ScoresBackward | Self::Logits => 4.0,
            Self::Optimizer => 30.0,
            _ => 1.0,
        }
    }
}

/// Seconds of a step by what they are spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seconds {
    pub products: f64,
    pub passes: f64,
    pub optimizer: f64,
    pub tp: f64,
    /// Data-parallel traffic that computing waits for, and what runs beside it.
    pub dp: f64,
    pub hidden: f64,
}

impl Seconds {
    /// Adds a part of others.
    pub fn add(&mut self, other: &Self, share: f64) {
        self.products += share * other.products;
        self.passes += share * other.passes;
        self.optimizer += share * other.optimizer;
        self.tp += share * other.tp;
        self.dp += share * other.dp;
        self.hidden += share * other.hidden;
    }

    /// What hides takes no time.
    pub fn total(&self) -> f64 {
        self.products + self.passes + self.optimizer + self.tp + self.dp
    }
}

/// A collective under way.
pub struct Flight {
    lasts: f64,
    ends: f64,
}

/// Adds up.
pub struct Tally<'a> {
    machine: &'a Machine,
    now: Bytes,
    /// Of that, in pieces small enough for the allocator to keep; and the most of it so far.
    small: u64,
    most_small: u64,
    pub peak: Peak,
    /// Since [`Self::begin`].
    pub own_peak: Peak,
    pub place: Place,
    pub calls: Vec<Call>,
    pub products: BTreeMap<Product, u64>,
    /// Products so far, of which the library may keep code.
    known: BTreeSet<Product>,
    pub seconds: Seconds,
    /// Operations of all products, and of those that compute again what was computed before.
    pub operations: f64,
    pub repeated: f64,
    /// What follows was computed before.
    pub again: bool,
    /// Seconds of what was before the first step.
    pub scoring: f64,
    /// When the data-parallel network is free, counted as [`Seconds::total`].
    free_at: f64,
}

impl<'a> Tally<'a> {
    pub fn new(machine: &'a Machine) -> Self {
        let place = Place { phase: Phase::Load, layer: None };
        Self {
            machine,
            now: Bytes::default(),
            small: 0,
            most_small: 0,
            peak: Peak { bytes: Bytes::default(), place },
            own_peak: Peak { bytes: Bytes::default(), place },
            place,
            calls: Vec::new(),
            products: BTreeMap::new(),
            known: BTreeSet::new(),
            seconds: Seconds::default(),
            operations: 0.0,
            repeated: 0.0,
            again: false,
            scoring: 0.0,
            free_at: 0.0,
        }
    }

    /// Begins a step: its seconds and its own peak count from here.
    pub fn begin(&mut self) {
        self.free_at = 0.0;
        self.own_peak = Peak { bytes: self.now, place: self.place };
    }

    pub fn machine(&self) -> &'a Machine {
        self.machine
    }

    pub fn enter(&mut self, phase: Phase) {
        self.place = Place { phase, layer: None };
    }

    pub fn enter_layer(&mut self, phase: Phase, layer: usize, part: &'static str) {
        self.place = Place { phase, layer: Some((layer, part)) };
    }

    pub fn hold(&mut self, part: Part, bytes: u64) -> Held {
        self.now[part as usize] += bytes;
        self.small += self.kept(bytes);
        self.most_small = self.most_small.max(self.small);
        let mut bytes_now = self.now;
        bytes_now[Part::Kept as usize] = self.most_small - self.small;
        let all = bytes_now.iter().sum::<u64>();
        for peak in [&mut self.peak, &mut self.own_peak].into_iter().filter(|peak| all > peak.total()) {
            *peak = Peak { bytes: bytes_now, place: self.place };
        }
        Held(part, bytes)
    }

    pub fn free(&mut self, held: Held) {
        self.now[held.0 as usize] -= held.1;
        self.small -= self.kept(held.1);
    }

    /// What of a piece the allocator keeps when it is freed.
    fn kept(&self, bytes: u64) -> u64 {
        if bytes < self.machine.kept_below { bytes } else { 0 }
    }

    /// What the allocator has kept is given back.
    pub fn give_back(&mut self) {
        self.most_small = self.small;
    }

    pub fn free_all(&mut self, held: impl IntoIterator<Item = Held>) {
        held.into_iter().for_each(|held| self.free(held));
    }

    /// Something that is gone at once.
    pub fn brief(&mut self, part: Part, bytes: u64) {
        let held = self.hold(part, bytes);
        self.free(held);
    }

    /// The same memory for another purpose.
    pub fn recast(&mut self, held: Held, part: Part) -> Held {
        self.free(Held(held.0, held.1));
        self.now[part as usize] += held.1;
        self.small += self.kept(held.1);
        Held(part, held.1)
    }

    /// Bytes that are held now.
    pub fn held(&self) -> Bytes {
        self.now
    }

    pub fn product(&mut self, operands: Operands, rows: u64, inner: u64, columns: u64) {
        self.products_of(Product { operands, rows, inner, columns, batch: 1 });
    }

    pub fn products_of(&mut self, product: Product) {
        let operations = product.operations();
        if operations == 0.0 {
            return;
        }
        *self.products.entry(product).or_insert(0) += 1;
        if self.machine.product_bytes > 0 && product.columns > 1 && self.known.insert(product) {
            // for good
            let Held(..) = self.hold(Part::Runtime, self.machine.product_bytes);
        }
        if self.widens() && product.columns > 1 {
            let Product { operands, rows, inner, columns, batch } = product;
            let [left, right, result] = [rows * inner, inner * columns, rows * columns].map(|n| 4 * n * batch);
            // the gradient of a matrix goes into a buffer that is there
            let result = if operands == Operands::Tn && batch == 1 { 0 } else { result };
            let copies = [left, right, result].map(|bytes| self.hold(Part::Workspace, bytes));
            self.free_all(copies);
        }
        self.operations += operations;
        if self.again {
            self.repeated += operations;
        }
        self.seconds.products += self.machine.product(product);
    }

    /// Whether operands are copied to f32 to be multiplied.
    pub fn widens(&self) -> bool {
        self.machine.widens && self.machine.precision == Precision::Bf16
    }

    pub fn pass(&mut self, pass: Pass, amount: u64) {
        let seconds = self.machine.pass(pass, amount as f64);
        match pass {
            Pass::Optimizer => self.seconds.optimizer += seconds,
            _ => self.seconds.passes += seconds,
        }
    }

    /// A collective that everything waits for. `on_host`: control numbers, see [`Call`].
    pub fn call(&mut self, axis: &'static str, op: Op, ranks: usize, bytes: u64, on_host: bool) {
        let flight = self.start(axis, op, ranks, bytes, on_host);
        self.wait(axis, flight);
    }

    /// A collective that is waited for later.
    pub fn start(&mut self, axis: &'static str, op: Op, ranks: usize, bytes: u64, on_host: bool) -> Flight {
        let call = Call { axis, op, ranks, bytes, on_host };
        self.calls.push(call);
        let lasts = self.machine.collective(&call);
        let now = self.seconds.total();
        let starts = if axis == "dp" { now.max(self.free_at) } else { now };
        let ends = starts + lasts;
        if axis == "dp" {
            self.free_at = ends;
        }
        Flight { lasts, ends }
    }

    pub fn wait(&mut self, axis: &'static str, flight: Flight) {
        let now = self.seconds.total();
        // without a network of its own nothing is beside anything
        let waits = if self.machine.overlaps || axis != "dp" { (flight.ends - now).max(0.0) } else { flight.lasts };
        match axis {
            "dp" => {
                self.seconds.dp += waits;
                self.seconds.hidden += (flight.lasts - waits).max(0.0);
            }
            _ => self.seconds.tp += waits,
        }
    }
}
