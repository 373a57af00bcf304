//! UNLEARN and LEARN (arXiv 2408.04140) as one run: the matrices of the target task and of each similar one are learnt stage by stage,
//! told apart, and subtracted from the model or added to it.
//!
//! A stage is an ordinary training of some layers' matrices on top of a model that is otherwise at rest. What it leaves is on disk
//! before the next one begins, under a digest of all that it depends on: a run that was stopped goes on with the stage that it was in, and
//! one with another strength or discrimination trains nothing again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tch::{Device, Tensor};

use super::evaluation::Evaluator;
use super::files::RunFolder;
use super::inputs::{Inputs, Loaded, computing_kind, layout_of};
use super::journal::{Journal, comm_seconds};
use super::saving::Saver;
use super::summary::{Evaluations, Summary, Timing};
use super::trained::Trained;
use super::{
    Context, FILES_DEADLINE, Injector, Occasion, Outcome, RunError, Stages, export_kind, gradient_options,
    max_shard_bytes, one_micro_batch_a_step, trainer_options,
};
use crate::abi::{host, signals};
use crate::checkpoint::{Folder, export_tensors};
use crate::config::{self, Config, Objective, StageOrder, StartFrom, Subspace};
use crate::data::{Dataset, Order};
use crate::dist::{Phase, World};
use crate::model::init;
use crate::model::sharding::{ParamId, Piece, Table};
use crate::scope::{self, layer_of};
use crate::telemetry::{Metrics, RunState, table};
use crate::train::{Batches, Cuts, GradientBuffers, Optimizer, Parameters, Schedule, Trainer};
use crate::unlearn;
use crate::weights::{self, Discrimination, MatrixReport, Output, Start};

/// Longest wait for a rank that decomposes its matrices.
const ARITHMETIC_DEADLINE: Duration = Duration::from_secs(4 * 3600);

/// Runs from loaded data to the written model. All ranks call it.
pub(super) fn run(
    config: &Config,
    mut inputs: Inputs,
    folder: &RunFolder,
    metrics: &mut Metrics,
    context: &Context,
    phases: &Stages,
    faults: &Injector,
) -> Result<Outcome, RunError> {
    let Context { world, console, .. } = context;
    // other models come and go before this one takes its memory
    let evaluator = Evaluator::new(config, &inputs.encoder, &inputs.sets(), context)?;
    phases.enter(Phase::Load, inputs.model_bytes());
    faults.at(Occasion::Load)?;
    let loaded = inputs.load_still(config, world, context.device, console)?;
    let mut identifier = Identifier::new(config, &inputs, loaded, folder, (context, phases, faults))?;
    let identity = identifier.identity.clone();
    let mut evaluations = Evaluations::default();
    if config.eval.before {
        phases.enter(Phase::Evaluate(0), 0);
        faults.at(Occasion::Eval)?;
        evaluations.before = evaluator.step(0, &identifier.trainer, &inputs, Some(&identity), context, metrics)?;
    }

    let training = Instant::now();
    let tasks: Vec<(&str, &Dataset)> = std::iter::once(("target", &inputs.anchors))
        .chain(inputs.similar.iter().map(|(name, set)| (name.as_str(), set)))
        .collect();
    let stages = identifier.stages.len();
    let total: usize = tasks.iter().map(|(_, set)| steps(config, set) * stages).sum();
    context.board.update(|status| status.steps = total);
    let mut journal = Journal {
        metrics,
        progress: console.progress("training", total as u64, "steps"),
        per_epoch: 1,
        tokens: 0,
        comm_seconds: comm_seconds(world),
        cpu_seconds: host::cpu_seconds(),
        told: Instant::now(),
        seconds_to_first_step: 0.0,
        stage: Value::Null,
    };
    let mut found = Vec::new();
    for (name, set) in &tasks {
        match identifier.identify(name, set, &mut journal)? {
            Some(path) => found.push(path),
            None => {
                folder.leave(RunState::Stopped, context);
                return Ok(Outcome::Stopped);
            }
        }
    }
    let (tokens, seconds_to_first_step) = (journal.tokens, journal.seconds_to_first_step);
    drop(journal.progress);
    let training_seconds = training.elapsed().as_secs_f64();

    identifier.saver.finish(world)?;
    faults.at(Occasion::Export)?;
    world.watchdog.enter(Phase::Export, ARITHMETIC_DEADLINE);
    let model = apply(config, folder, &found, world)?;
    phases.enter(Phase::Load, inputs.model_bytes());
    if config.eval.after {
        // of what was written
        identifier.load(&Folder::open(&model)?, None)?;
        let step = identifier.step;
        phases.enter(Phase::Evaluate(step), 0);
        faults.at(Occasion::Eval)?;
        evaluations.after = evaluator.step(step, &identifier.trainer, &inputs, None, context, metrics)?;
    }
    let timing =
        Timing { steps: identifier.step, tokens, training_seconds, reference_seconds: 0.0, seconds_to_first_step };
    faults.at(Occasion::End)?;
    let summary = Summary::new(config, &inputs, context, &identity, evaluations, timing);
    folder.write_summary(&summary, world)?;
    evaluator.print(identifier.step, context)?;
    summary.print(&folder.path, console);
    phases.enter(Phase::End, 0);
    folder.leave(RunState::Finished, context);
    Ok(Outcome::Finished(Box::new(summary)))
}

/// Tells the target task from the similar ones and writes the model without it, or with it. `tasks`: folders, the target's first. All
/// ranks call it.
fn apply(config: &Config, folder: &RunFolder, tasks: &[PathBuf], world: &World) -> Result<PathBuf, RunError> {
    let subspace = table_of(config);
    let (target, unique) = (folder.model(), folder.tasks().join("unique"));
    remove(&unique, world)?;
    let open = |path: &PathBuf| Folder::open(path);
    let opened: Vec<Folder> = tasks.iter().map(open).collect::<Result<_, _>>()?;
    let similar: Vec<&Folder> = opened[1..].iter().collect();
    let how = Discrimination::of(subspace, config.run.seed);
    let output = Output { target: &unique, kind: None, max_shard_bytes: max_shard_bytes(config) };
    let reports = weights::discriminate(&opened[0], &similar, &how, &output, world, || ())?;
    if world.is_first() {
        let path = folder.tasks().join("unique.json");
        let text = serde_json::to_string_pretty(&reports).expect("invariant: reports are JSON");
        std::fs::write(&path, text + "\n").map_err(|source| RunError::Write { path, source })?;
    }
    if !similar.is_empty() {
        tracing::info!("what the target does not share with {} similar tasks:\n{}", similar.len(), by_layer(&reports));
    }
    let sign = if config.method.objective == Objective::Unlearn { -1.0 } else { 1.0 };
    let output = Output { target: &target, kind: export_kind(config), max_shard_bytes: max_shard_bytes(config) };
    let (model, task) = (Folder::open(&config.model.path)?, Folder::open(&unique)?);
    weights::add(&model, &task, sign * subspace.strength, &output, world, || ())?;
    Ok(target)
}

/// A line a layer: norms before and after, and the worst of its matrices' decompositions.
fn by_layer(reports: &[MatrixReport]) -> String {
    let mut layers: Vec<usize> = reports.iter().filter_map(|report| layer_of(&report.name)).collect();
    layers.sort_unstable();
    layers.dedup();
    let row = |layer: &usize| {
        let mine = || reports.iter().filter(|report| layer_of(&report.name) == Some(*layer));
        let norm = |of: fn(&MatrixReport) -> f64| mine().map(|report| of(report).powi(2)).sum::<f64>().sqrt();
        let (before, after) = (norm(|report| report.norm), norm(|report| report.kept));
        let rank = mine().map(|report| report.input_rank.max(report.output_rank)).max().unwrap_or(0);
        let energy = mine().map(|report| report.energy).fold(1.0, f64::min);
        let error = mine().map(|report| report.error).fold(0.0, f64::max);
        vec![
            layer.to_string(),
            format!("{before:.3e}"),
            format!("{:.1} %", 100.0 * after / before.max(1e-300)),
            rank.to_string(),
            format!("{energy:.3}"),
            format!("{error:.0e}"),
        ]
    };
    table(&["layer", "norm", "kept", "directions", "energy", "error"], &layers.iter().map(row).collect::<Vec<_>>())
}

/// Learns tasks on top of one model.
struct Identifier<'a> {
    config: &'a Config,
    inputs: &'a Inputs,
    folder: &'a RunFolder,
    context: &'a Context,
    phases: &'a Stages<'a>,
    faults: &'a Injector<'a>,
    /// Nothing is trained, between stages.
    trainer: Trainer,
    /// This rank's shards with everything trained, and with nothing.
    whole: Table,
    still: Table,
    model: Folder,
    identity: String,
    /// Tensors that make up a task.
    names: Vec<String>,
    /// Layers that are trained together.
    stages: Vec<Vec<usize>>,
    saver: Saver,
    /// Steps so far, of all stages.
    step: usize,
}

impl<'a> Identifier<'a> {
    fn new(
        config: &'a Config,
        inputs: &'a Inputs,
        loaded: Loaded,
        folder: &'a RunFolder,
        (context, phases, faults): (&'a Context, &'a Stages<'a>, &'a Injector<'a>),
    ) -> Result<Self, RunError> {
        let world = &context.world;
        let Loaded { decoder, parameters, identity, names } = loaded;
        let mut layers: Vec<usize> = names.iter().filter_map(|name| layer_of(name)).collect();
        layers.sort_unstable();
        layers.dedup();
        let stages = match table_of(config).order {
            StageOrder::Layers => layers.into_iter().map(|layer| vec![layer]).collect(),
            StageOrder::Together => vec![layers],
        };
        let gradients = gradient_options(config, decoder.device);
        let trainer = Trainer {
            schedule: Schedule::new(&config.schedule, config.optimizer.lr, 1, 1),
            method: unlearn::method(&config.method, config.run.seed, 1),
            options: trainer_options(config),
            broken: Trainer::whole(decoder.device),
            gradients: GradientBuffers::new(&decoder.table, &parameters.layout, &world.tp, &world.dp, gradients),
            optimizer: Optimizer::none(),
            decoder,
            parameters,
        };
        Ok(Self {
            whole: inputs.table(config, world)?,
            still: trainer.decoder.table.clone(),
            model: Folder::open(&config.model.path)?,
            saver: Saver::new(config, inputs.digests(&identity).into_iter().collect(), &context.board),
            config,
            inputs,
            folder,
            context,
            phases,
            faults,
            trainer,
            identity,
            names,
            stages,
            step: 0,
        })
    }

    /// Learns a task and writes its matrices, f32, to `DIR/tasks/NAME`, unless they are there; None where the run was asked to stop.
    /// All ranks call it.
    fn identify(&mut self, name: &str, set: &Dataset, journal: &mut Journal) -> Result<Option<PathBuf>, RunError> {
        let world = &self.context.world;
        let target = self.folder.tasks().join(name);
        let note = target.with_extension("json");
        let origin = self.origin(set);
        let known = || target.is_dir() && std::fs::read_to_string(&note).is_ok_and(|text| text == origin.text);
        if agreed(world, known) {
            tracing::info!("task {name}: taken from {}", target.display());
            let steps = steps(self.config, set) * self.stages.len();
            journal.progress.advance(steps as u64, "");
            self.step += steps;
            return Ok(Some(target));
        }
        let parts = self.folder.cache(world)?.join(format!("task_{}", origin.key));
        if world.is_first() {
            make(&parts)?;
            make(&self.folder.tasks())?;
        }
        world.world.barrier();
        self.phases.enter(Phase::Load, self.inputs.model_bytes());
        self.rewind()?;
        for stage in 0..self.stages.len() {
            let part = parts.join(format!("stage_{stage:04}.safetensors"));
            if agreed(world, || part.exists()) {
                tracing::info!(
                    "task {name}, stage {} of {}: taken from {}",
                    stage + 1,
                    self.stages.len(),
                    part.display()
                );
                let steps = steps(self.config, set);
                journal.progress.advance(steps as u64, "");
                self.step += steps;
            } else if !self.train(name, set, stage, &part, journal)? {
                return Ok(None);
            }
            // the layers above learn on top of what was learnt here
            self.load(&Folder::open(&parts)?, Some(&self.stages[stage]))?;
        }
        if world.is_first() {
            remove_file(&note)?;
        }
        remove(&target, world)?;
        let start = match table_of(self.config).start {
            StartFrom::Pretrained => Start::Folder(&self.model),
            StartFrom::Random => Start::Random { seed: self.config.run.seed, std: self.inputs.arch.initializer_range },
        };
        let output = Output { target: &target, kind: None, max_shard_bytes: max_shard_bytes(self.config) };
        world.watchdog.enter(Phase::Export, FILES_DEADLINE);
        weights::difference(&Folder::open(&parts)?, &start, &["*".to_owned()], &output, world, || ())?;
        if world.is_first() {
            std::fs::write(&note, &origin.text).map_err(|source| RunError::Write { path: note, source })?;
        }
        remove(&parts, world)?;
        Ok(Some(target))
    }

    /// Trains the matrices of one stage's layers and writes them, f32, to `part`; false where the run was asked to stop. All ranks call
    /// it.
    fn train(
        &mut self,
        name: &str,
        set: &Dataset,
        stage: usize,
        part: &Path,
        journal: &mut Journal,
    ) -> Result<bool, RunError> {
        let (world, layers) = (&self.context.world, self.stages[stage].clone());
        let mut config = self.config.clone();
        config.scope.layers = Some(layers.clone());
        let mut table = self.whole.clone();
        let names = scope::narrow(&mut table, &config)?;
        let (steps, per_epoch) = (steps(&config, set), per_epoch(&config, set));
        let batches = Batches {
            order: Order::new(config.run.seed, config.data.shuffle, set.samples.len(), 0, config.train.global_batch),
            anchors: set,
            retain: None,
            cuts: Cuts::of(&self.trainer.method, false),
            budget: config.train.micro_batch_tokens,
        };
        one_micro_batch_a_step(&config, &batches, steps, world)?;
        let base = self.begin(&config, table, &names, (steps, per_epoch))?;
        for step in 0..steps {
            self.phases.step(self.step + 1);
            self.faults.at(Occasion::Step)?;
            let work = batches.step(step, world.mesh);
            let report = self.trainer.step(step, &work, None, world)?;
            let epoch = (step + 1) as f64 / per_epoch as f64;
            journal.stage = json!({ "task": name, "layers": layers, "stage_step": step + 1, "epoch": epoch });
            journal.tell(self.step, &work, &report, &self.trainer, self.context)?;
            self.step += 1;
            self.phases.warmed_up();
            if self.saver.ask(step + 1, usize::MAX, world).stop {
                let why = signals::request().map_or_else(|| "asked to stop".to_owned(), |name| format!("{name} came"));
                tracing::info!(
                    "{why}: {stage} of {} stages of task {name} are on disk; the same command goes on with the next one",
                    self.stages.len()
                );
                if world.is_first() {
                    remove_file(&self.config.run.dir.join("STOP"))?;
                }
                return Ok(false);
            }
        }
        self.trainer.check_weights(steps, world)?;
        world.watchdog.enter(Phase::Save(self.step), FILES_DEADLINE);
        self.faults.at(Occasion::Save)?;
        let tables = self.inputs.tables(&config, world)?;
        let mut trained = Trained::new(&self.trainer, world);
        export_tensors(part, &names, &tables, world, |id| {
            if self.trainer.parameters.layout.places[id].is_some() {
                return Ok(trained.own(id));
            }
            let param = &self.whole.params[id];
            let values = Tensor::empty(&param.shape, (tch::Kind::Float, Device::Cpu));
            for piece in &param.pieces {
                values.narrow(0, piece.row, piece.size[0]).copy_(&self.start(id, piece)?);
            }
            trained.merge(id, &values);
            Ok::<_, RunError>(values)
        })?;
        self.rest(base);
        Ok(true)
    }

    /// Makes the trainer one of what `table` trains, from the start values; gives the model at rest.
    fn begin(
        &mut self,
        config: &Config,
        table: Table,
        names: &[String],
        (steps, per_epoch): (usize, usize),
    ) -> Result<Parameters, RunError> {
        let (world, device) = (&self.context.world, self.trainer.decoder.device);
        let (layout, own) = (layout_of(&table, config, world), table.own);
        let base = &self.trainer.parameters.weights;
        let parameters =
            Parameters::over(base, &table, layout, computing_kind(config), device, |id, piece: &Piece| {
                match id < own {
                    true => self.start(id, piece),
                    false => Ok(init::adapter(piece, config.run.seed)),
                }
            })?;
        let partial = scope::is_partial(&table, names);
        let trainer = &mut self.trainer;
        trainer.decoder.table = table;
        let base = std::mem::replace(&mut trainer.parameters, parameters);
        let (options, layout) = (gradient_options(config, device), &trainer.parameters.layout);
        trainer.gradients = GradientBuffers::new(&trainer.decoder.table, layout, &world.tp, &world.dp, options);
        if partial {
            // of what is held as one parameter a part is not the task's
            let mask = self.folder.cache(world)?.join("task_mask.safetensors");
            let sets = self.inputs.scored(config);
            trainer.parameters.selection = scope::select(trainer, config, names, sets, &mask, false, world)?;
            let selection = trainer.parameters.selection.as_ref().expect("invariant: names say what may change");
            trainer.gradients.select(selection);
        }
        trainer.optimizer = Optimizer::new(&config.optimizer, &trainer.decoder.table, &trainer.parameters);
        trainer.schedule = Schedule::new(&config.schedule, config.optimizer.lr, steps, per_epoch);
        Ok(base)
    }

    /// Nothing is trained any more.
    fn rest(&mut self, base: Parameters) {
        let (world, trainer) = (&self.context.world, &mut self.trainer);
        trainer.optimizer = Optimizer::none();
        trainer.parameters = base;
        trainer.decoder.table = self.still.clone();
        let options = gradient_options(self.config, trainer.decoder.device);
        trainer.gradients =
            GradientBuffers::new(&self.still, &trainer.parameters.layout, &world.tp, &world.dp, options);
    }

    /// Puts the start values into the model at rest.
    fn rewind(&self) -> Result<(), RunError> {
        self.put(None, |id, piece| Some(self.start(id, piece)))
    }

    /// Puts what the folder has of some layers, or of all, into the model at rest; of a parameter of which it has a part, the rest is that
    /// of the start.
    fn load(&self, folder: &Folder, layers: Option<&[usize]>) -> Result<(), RunError> {
        self.put(layers, |_, piece| folder.find(&piece.name).map(|_| Ok(folder.slice(piece)?)))
    }

    fn put(
        &self,
        layers: Option<&[usize]>,
        source: impl Fn(ParamId, &Piece) -> Option<Result<Tensor, RunError>>,
    ) -> Result<(), RunError> {
        let asked = |name: &str| {
            let layer = || layer_of(name).expect("invariant: a task is of layers");
            layers.is_none_or(|layers| layers.contains(&layer()))
        };
        for (id, param) in self.whole.params[..self.whole.own].iter().enumerate() {
            let of_the_task = param.pieces.iter().any(|piece| self.names.contains(&piece.name) && asked(&piece.name));
            if of_the_task && param.pieces.iter().any(|piece| source(id, piece).is_some()) {
                let value = |piece: &Piece| source(id, piece).unwrap_or_else(|| self.start(id, piece));
                self.trainer.parameters.put(&self.still, id, value)?;
            }
        }
        Ok(())
    }

    /// What training starts from.
    fn start(&self, id: ParamId, piece: &Piece) -> Result<Tensor, RunError> {
        let random = table_of(self.config).start == StartFrom::Random && self.names.contains(&piece.name);
        if random {
            let (seed, std) = (self.config.run.seed, self.inputs.arch.initializer_range);
            return Ok(init::initial(&self.whole.params[id], piece, seed, std));
        }
        Ok(self.model.slice(piece)?)
    }

    /// What decides on a task's matrices.
    fn origin(&self, set: &Dataset) -> Origin {
        let mut config = config::to_json(self.config);
        if let Some(train) = config["train"].as_object_mut() {
            // how the work is cut decides nothing
            for key in ["micro_batch_tokens", "recompute", "logits_mib"] {
                train.remove(key);
            }
        }
        let subspace = table_of(self.config);
        let all = json!({
            "model": self.identity,
            "data": set.digest,
            "seed": self.config.run.seed,
            "shuffle": self.config.data.shuffle,
            "order": subspace.order,
            "start": subspace.start,
            "scope": config["scope"],
            "train": config["train"],
            "optimizer": config["optimizer"],
            "schedule": config["schedule"],
        });
        let text = serde_json::to_string_pretty(&all).expect("invariant: JSON") + "\n";
        Origin { key: blake3::hash(text.as_bytes()).to_hex()[..16].to_owned(), text }
    }
}

struct Origin {
    text: String,
    key: String,
}

fn table_of(config: &Config) -> &Subspace {
    config.subspace.as_ref().expect("invariant: filled in")
}

fn per_epoch(config: &Config, set: &Dataset) -> usize {
    set.samples.len().div_ceil(config.train.global_batch)
}

/// Of one stage.
fn steps(config: &Config, set: &Dataset) -> usize {
    config.train.steps.unwrap_or_else(|| config.train.epochs.unwrap_or(0) * per_epoch(config, set))
}

/// What the first rank sees: on a network file system others may not yet. All ranks call it.
fn agreed(world: &World, look: impl Fn() -> bool) -> bool {
    let mine = if world.is_first() && look() { "yes" } else { "" };
    !world.world.broadcast_bytes(mine.as_bytes(), 0).is_empty()
}

/// Removes a folder, if it is there. All ranks call it.
fn remove(path: &Path, world: &World) -> Result<(), RunError> {
    if world.is_first() && path.exists() {
        std::fs::remove_dir_all(path).map_err(|source| RunError::Write { path: path.to_owned(), source })?;
    }
    world.world.barrier();
    Ok(())
}

fn remove_file(path: &Path) -> Result<(), RunError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(RunError::Write { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn make(path: &Path) -> Result<(), RunError> {
    std::fs::create_dir_all(path).map_err(|source| RunError::Write { path: path.to_owned(), source })
}
