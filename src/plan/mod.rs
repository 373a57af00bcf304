//! What a run will need before it runs: bytes by purpose, operations, bytes on the wire and seconds of every rank.
//!
//! A step is walked as the engine walks it, statement by statement, with numbers in the place of tensors. What is cut where comes from
//! the engine's own tables: the sharding table, the layout of buckets, the order and packing of samples, the method's needs. Nothing
//! here computes anything of the model.

mod advice;
mod base;
mod buckets;
mod core;
mod head;
mod layers;
mod machine;
mod measure;
mod rank;
mod samples;
mod step;
mod tally;
mod text;

pub use advice::{Suggestion, advice};
pub use base::base;
pub use head::Pool;
pub use machine::{Base, Machine, Measured, names};
pub use measure::measure;
pub use rank::{Engine, Rank};
pub use samples::{Assumed, assumed};
pub use step::Walker;
pub use tally::{Bytes, Operands, PARTS, Part, Pass, Peak, Product, Seconds, Tally};
pub use text::gib;

use std::collections::BTreeMap;

use tch::Kind;
use thiserror::Error;

use crate::config::{Config, Mask, Precision};
use crate::data::{Dataset, Item, MicroBatch, RowsOf, Stream, pack, share};
use crate::dist::Mesh;
use crate::dist::wire::{Call, Traffic, summarise};
use crate::model::sharding::Table;
use crate::model::{Architecture, ModelError};
use crate::scope::{self, ScopeError};
use crate::train::{Batches, Layout, Method, Optimizer, Parameters};
use crate::unlearn;
use buckets::Buckets;
use tally::{Held, Phase};

/// What is planned.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub config: &'a Config,
    pub arch: &'a Architecture,
    /// Samples to forget, or to train on.
    pub anchors: &'a Dataset,
    pub retain: Option<&'a Dataset>,
    /// Any rank of the mesh.
    pub mesh: Mesh,
    pub engine: Engine,
    pub machine: &'a Machine,
    /// Devices of a node.
    pub per_node: usize,
}

/// Why nothing can be planned.
#[derive(Debug, Error)]
pub enum PlanError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Scope(#[from] ScopeError),
    #[error("{0}")]
    Refused(String),
}

/// One run.
pub struct Plan {
    pub mesh: Mesh,
    pub machine: Machine,
    pub per_node: usize,
    pub parameters: i64,
    pub trained: usize,
    /// Of the rank that needs most.
    pub peak: Peak,
    /// What is held over the steps.
    pub state: Bytes,
    /// Of the slowest rank, mean over the steps that were looked at.
    pub seconds: Seconds,
    /// Of one rank, mean over these steps.
    pub operations: f64,
    pub repeated: f64,
    pub tokens: f64,
    pub traffic: Vec<Traffic>,
    pub micro_batches: usize,
    pub steps: usize,
    /// Steps that were looked at.
    pub seen: usize,
    pub scoring_seconds: f64,
    pub saves: usize,
    /// Bytes of one rank's file and of all, and of the exported model.
    pub checkpoint: (u64, u64),
    /// Bytes of host memory that a rank keeps for copies of its state, from which saves are written.
    pub snapshot: u64,
    pub export: u64,
    pub legal_tp: Vec<usize>,
}

/// One rank's first steps in order: for those who compare with what happens.
pub struct Walked {
    pub calls: Vec<Call>,
    pub seconds: Seconds,
    /// Until the end of the step, and of the step alone.
    pub peak: Peak,
    pub own_peak: Peak,
    /// Held before and after the step.
    pub before: Bytes,
    pub held: Bytes,
    pub products: BTreeMap<Product, u64>,
}

/// Most steps of all data-parallel ranks that a plan looks at.
const MOST: usize = 256;

impl<'a> Job<'a> {
    /// The rank at `mesh` and its method.
    fn with_rank<T>(&self, mesh: Mesh, body: impl FnOnce(&Rank, &Batches) -> T) -> Result<T, PlanError> {
        let config = self.config;
        let mut table = Table::new(self.arch, mesh.tp, mesh.tp_rank(), config.parallel.sequence_parallel)?;
        let names = scope::narrow(&mut table, config)?;
        let method = self.method();
        let layout = Layout::of(&table, &config.parallel, mesh);
        let fraction = config.scope.mask.as_ref().map(|mask| mask.fraction.unwrap_or(Mask::FRACTION));
        let chosen = fraction.or_else(|| scope::is_partial(&table, &names).then(|| share_of(&table, &names)));
        let batches = Batches::of(config, &method, self.anchors, self.retain);
        let rank = Rank { config, arch: self.arch, table, layout, mesh, method: &method, engine: self.engine, chosen };
        Ok(body(&rank, &batches))
    }

    fn method(&self) -> Method {
        let per_epoch = self.anchors.samples.len().div_ceil(self.config.train.global_batch);
        unlearn::method(&self.config.method, self.config.run.seed, per_epoch)
    }

    /// Steps of the run.
    pub fn steps(&self) -> usize {
        let per_epoch = self.anchors.samples.len().div_ceil(self.config.train.global_batch);
        self.config.train.steps.unwrap_or_else(|| self.config.train.epochs.unwrap_or(0) * per_epoch)
    }

    fn machine(&self) -> Machine {
        self.machine.placed(self.mesh, self.per_node, self.config.train.precision)
    }

    /// The first `steps` steps of one rank, each by itself; what was before the first is in the first one's peak.
    pub fn walk(&self, mesh: Mesh, steps: usize) -> Result<Vec<Walked>, PlanError> {
        self.walk_from(mesh, 0, steps)
    }

    /// As [`Self::walk`] from another step on.
    pub fn walk_from(&self, mesh: Mesh, first: usize, steps: usize) -> Result<Vec<Walked>, PlanError> {
        let machine = self.machine();
        self.with_rank(mesh, |rank, batches| {
            let mut t = Tally::new(&machine);
            let mut walker = self.start(rank, &mut t);
            (first..first + steps)
                .map(|step| {
                    let (work, before) = (batches.step(step, mesh), t.held());
                    rank.step(&work, &mut walker, &mut t);
                    let walked = Walked {
                        calls: std::mem::take(&mut t.calls),
                        seconds: std::mem::take(&mut t.seconds),
                        peak: t.peak.clone(),
                        own_peak: t.own_peak.clone(),
                        before,
                        held: t.held(),
                        products: std::mem::take(&mut t.products),
                    };
                    t.begin();
                    walked
                })
                .collect()
        })
    }

    /// Bytes that forward over sequences of these lengths keeps for backward.
    pub fn kept(&self, lengths: &[usize]) -> Result<u64, PlanError> {
        let machine = self.machine();
        self.with_rank(self.mesh, |rank, _| {
            let mut t = Tally::new(&machine);
            let keep = rank.keep();
            let (x, _) = rank.forward(&rank.shape(lengths), keep, Phase::Forward, &mut t);
            t.free(x);
            t.held()[Part::Activations as usize]
        })
    }

    /// What is there before the first step: model, gradients, optimizer, reference; and the passes without backward.
    fn start(&self, rank: &Rank, t: &mut Tally) -> Walker {
        let kind = if rank.config.train.precision == Precision::Bf16 { Kind::BFloat16 } else { Kind::Float };
        let (weights, masters) = Parameters::planned_bytes(&rank.table, &rank.layout, kind);
        let mut stay: Vec<Held> = vec![t.hold(Part::Runtime, (t.machine().runtime_gib * 1073741824.0) as u64)];
        let groups = [rank.mesh.tp, rank.mesh.dp].iter().filter(|&&ranks| ranks > 1).count();
        let reserve = groups as f64 * t.machine().communicator_gib * 1073741824.0;
        stay.push(t.hold(Part::Communication, reserve as u64));
        stay.push(t.hold(Part::Weights, weights as u64));
        stay.push(t.hold(Part::Masters, masters as u64));
        // a bucket is read as f32, beside the piece that is being read
        let largest = rank.layout.buckets.iter().map(|bucket| bucket.len).max().unwrap_or(0);
        let piece = rank.table.params.iter().map(|param| param.num_elements() as usize).max().unwrap_or(0);
        let wide = if kind == Kind::Float { 0 } else { 4 * largest };
        t.brief(Part::Workspace, (wide + 4 * piece) as u64);
        let buckets = Buckets::new(rank, t);
        let moments = Optimizer::planned_bytes(&rank.config.optimizer, &rank.table, &rank.layout, rank.chosen);
        stay.push(t.hold(Part::Moments, moments as u64));
        if rank.chosen.is_some() {
            let own: usize = rank.layout.buckets.iter().map(|bucket| bucket.own.len()).sum();
            stay.push(t.hold(Part::Moments, own as u64));
        }
        if !rank.method.reference().rows.is_empty() {
            let head = rank.table.params[rank.table.head].num_elements() as u64;
            stay.push(t.hold(Part::Caches, head * rank.element()));
        }
        // it all stays until the end
        stay.into_iter().for_each(drop);
        let mut walker = Walker { buckets, pool: Pool::default() };
        for micro_batch in self.scored(rank.mesh) {
            rank.scoring(&micro_batch, &mut walker.pool, Phase::Scoring, t);
        }
        t.scoring = t.seconds.total();
        t.seconds = Seconds::default();
        t.calls.clear();
        t.products.clear();
        (t.operations, t.repeated) = (0.0, 0.0);
        t.give_back();
        t.begin();
        walker
    }

    /// Whether saves before the end are written from a copy while training goes on.
    fn copies_for_saves(&self) -> bool {
        let checkpoint = &self.config.checkpoint;
        let in_place = self.engine.host && !checkpoint.background;
        checkpoint.every > 0 && checkpoint.every < self.steps() && !in_place
    }

    /// Micro-batches of evaluation and reference before the first step.
    fn scored(&self, mesh: Mesh) -> Vec<MicroBatch> {
        let (config, mut all) = (self.config, Vec::new());
        let most = |set: &Dataset| match config.eval.max_samples {
            0 => set.samples.len(),
            n => n.min(set.samples.len()),
        };
        let mut add = |set: &Dataset, count: usize, stream| {
            let item = |sample: usize| Item { stream, sample, len: set.samples[sample].tokens.len() };
            let items: Vec<Item> = (0..count).map(item).collect();
            let mine = share(&items, mesh.dp).swap_remove(mesh.dp_rank());
            for items in pack(&mine, config.train.micro_batch_tokens) {
                all.push(MicroBatch::new(&items, |item| &set.samples[item.sample], |_| RowsOf::Scored));
            }
        };
        let needs = self.method().reference();
        for _ in &needs.logprobs {
            add(self.anchors, self.anchors.samples.len(), Stream::Forget);
        }
        for stream in needs.rows.iter().chain(needs.hidden.iter().map(|(stream, _)| stream)) {
            let set = if *stream == Stream::Forget { Some(self.anchors) } else { self.retain };
            if let Some(set) = set {
                let visited = self.steps() * config.train.global_batch;
                add(set, visited.min(set.samples.len()), *stream);
            }
        }
        if config.eval.before {
            add(self.anchors, most(self.anchors), Stream::Forget);
            if let Some(set) = self.retain {
                add(set, most(set), Stream::Retain);
            }
        }
        all
    }

    /// Memory of one rank's first steps alone, for those who try many configurations.
    pub fn peak(&self, steps: usize) -> Result<Peak, PlanError> {
        let walked = self.walk(Mesh { rank: 0, ..self.mesh }, steps.clamp(1, self.steps().max(1)))?;
        Ok(walked.into_iter().next_back().expect("invariant: one step at least").peak)
    }

    /// Everything about the run.
    pub fn plan(&self) -> Result<Plan, PlanError> {
        let (mesh, config, machine) = (self.mesh, self.config, self.machine());
        let steps = self.steps();
        if steps == 0 {
            return Err(PlanError::Refused("the run has no steps: train.epochs or train.steps is 0".to_owned()));
        }
        let per_epoch = self.anchors.samples.len().div_ceil(config.train.global_batch);
        let seen = steps.min(per_epoch).min((MOST / mesh.dp).max(4));
        let mut plan: Option<Plan> = None;
        // a rank's bytes of a checkpoint at most, and those of one rank of each copy
        let mut saved = (0, 0);
        let mut slowest = vec![Seconds::default(); seen];
        for dp_rank in 0..mesh.dp {
            let at = Mesh { rank: dp_rank * mesh.tp, ..mesh };
            let (peak, state, scoring, steps_seen, found) = self.with_rank(at, |rank, batches| {
                let mut t = Tally::new(&machine);
                let mut walker = self.start(rank, &mut t);
                let mine = saved_bytes(rank);
                let snapshot = if self.copies_for_saves() { mine } else { 0 };
                let _stays = t.hold(Part::Snapshot, if self.engine.host { snapshot } else { 0 });
                let (state, scoring) = (t.held(), t.scoring);
                let mut seconds = Vec::new();
                let (mut tokens, mut micro_batches) = (0, 0);
                for step in 0..seen {
                    let work = batches.step(step, at);
                    rank.step(&work, &mut walker, &mut t);
                    tokens += work.tokens;
                    micro_batches = micro_batches.max(work.micro_batches.len());
                    seconds.push(std::mem::take(&mut t.seconds));
                    t.begin();
                }
                let trained =
                    rank.table.params.iter().filter(|param| param.class != crate::model::sharding::Class::Frozen);
                let trained: usize = trained.map(|param| param.num_elements() as usize).sum();
                let found = (t.calls, t.operations, t.repeated, tokens, micro_batches, mine, trained);
                (t.peak, state, scoring, seconds, found)
            })?;
            for (slowest, seconds) in slowest.iter_mut().zip(steps_seen) {
                if seconds.total() > slowest.total() {
                    *slowest = seconds;
                }
            }
            let (calls, operations, repeated, tokens, micro_batches, mine, trained) = found;
            saved = (mine.max(saved.0), saved.1 + mine);
            if plan.as_ref().is_none_or(|plan| peak.total() > plan.peak.total()) {
                let each = |x: f64| x / seen as f64;
                let mut traffic = summarise(&calls);
                for kind in &mut traffic {
                    kind.calls /= seen;
                    kind.bytes /= seen as u64;
                    kind.wire_bytes /= seen as f64;
                }
                let stored = match config.export.dtype {
                    crate::config::ExportDtype::F32 => 4,
                    _ => 2,
                };
                let most = plan.as_ref().map_or(0, |plan| plan.micro_batches);
                plan = Some(Plan {
                    mesh,
                    machine: machine.clone(),
                    per_node: self.per_node,
                    parameters: self.arch.num_parameters(),
                    trained,
                    peak,
                    state,
                    seconds: Seconds::default(),
                    operations: each(operations),
                    repeated: each(repeated),
                    tokens: each(tokens as f64),
                    traffic,
                    micro_batches: micro_batches.max(most),
                    steps,
                    seen,
                    scoring_seconds: scoring,
                    saves: (steps - 1).checked_div(config.checkpoint.every).unwrap_or(0),
                    checkpoint: (0, 0),
                    snapshot: 0,
                    export: if config.export.model { self.arch.num_parameters() as u64 * stored } else { 0 },
                    legal_tp: self.arch.legal_tp(),
                });
            }
        }
        let mut plan = plan.expect("invariant: a mesh has a rank");
        plan.checkpoint = (saved.0, saved.1 * mesh.tp as u64);
        plan.snapshot = if self.copies_for_saves() { saved.0 } else { 0 };
        for seconds in &slowest {
            plan.seconds.add(seconds, 1.0 / seen as f64);
        }
        Ok(plan)
    }
}

/// Bytes of one rank's file of a checkpoint: copies that hold the same buckets save them in turn.
fn saved_bytes(rank: &Rank) -> u64 {
    let mut layout = rank.layout.clone();
    if layout.buckets.iter().all(|bucket| bucket.own.len() == bucket.len) {
        let (dp, own) = (rank.mesh.dp, rank.mesh.dp_rank());
        layout.buckets = layout.buckets.into_iter().skip(own).step_by(dp).collect();
    }
    let own: usize = layout.buckets.iter().map(|bucket| bucket.own.len()).sum();
    let moments = Optimizer::planned_look(&rank.config.optimizer, &rank.table, &layout, rank.chosen);
    (4 * own + if rank.config.checkpoint.save_optimizer { moments } else { 0 }) as u64
}

/// Of what is trained, the share that `names` say may change.
fn share_of(table: &Table, names: &[String]) -> f64 {
    let trained = table.params[..table.own].iter().filter(|p| p.class != crate::model::sharding::Class::Frozen);
    let (mut named, mut all) = (0, 0);
    for piece in trained.flat_map(|param| &param.pieces) {
        let len: i64 = piece.size.iter().product();
        all += len;
        named += if names.contains(&piece.name) { len } else { 0 };
    }
    named as f64 / all.max(1) as f64
}

impl Plan {
    /// Whether the fullest rank fits, a few percent left for the allocator's holes.
    pub fn fits(&self) -> bool {
        fits(&self.peak, &self.machine)
    }

    /// Seconds of the whole run: steps, passes without backward before and after, copies and files of saves, reading and export.
    pub fn run_seconds(&self) -> f64 {
        self.steps as f64 * self.seconds.total()
            + 2.0 * self.scoring_seconds
            + self.load_seconds()
            + self.save_seconds()
    }

    pub fn load_seconds(&self) -> f64 {
        let ranks = self.mesh.world() as f64;
        2.0 * self.parameters as f64 / ranks / (self.machine.disk_gbs * 1e9) * self.mesh.dp as f64
            + self.export as f64 / ranks / (self.machine.disk_gbs * 1e9)
    }

    /// What saves take from the steps: copies to the host.
    pub fn save_seconds(&self) -> f64 {
        self.saves as f64 * self.checkpoint.0 as f64 / COPY
    }

    /// Seconds until a checkpoint is on disk.
    pub fn write_seconds(&self) -> f64 {
        self.checkpoint.0 as f64 / (self.machine.disk_gbs * 1e9)
    }

    pub fn device_hours(&self) -> f64 {
        self.run_seconds() / 3600.0 * self.mesh.world() as f64
    }
}

/// Of a copy to the host. Unit: bytes a second.
const COPY: f64 = 10e9;

/// Share of the memory that is planned with.
const USABLE: f64 = 0.97;

fn fits(peak: &Peak, machine: &Machine) -> bool {
    peak.total() as f64 <= USABLE * machine.memory_bytes() as f64
}
