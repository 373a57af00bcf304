//! One run, from a checked configuration to an exported model: [`run`] reads top to bottom.

pub mod attack;
mod calibrate;
mod error;
mod evaluation;
mod fault;
mod files;
mod frozen;
mod inputs;
mod journal;
mod memory;
mod planned;
mod process;
mod reference;
mod resume;
mod saving;
mod stages;
mod subspace;
mod summary;
mod trained;

pub use calibrate::{Calibrated, Calibration, Mixture, calibrate};
pub use error::RunError;
pub use evaluation::{EvaluateOptions, evaluate};
pub use fault::{Fault, Occasion};
pub use inputs::{Inputs, Loaded, Sets, model_digest, sets};
pub use memory::{Memory, MemoryWords};
pub use summary::{Evaluations, Summary};

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use tch::{Device, Kind};

use crate::abi::{host, signals};
use crate::checkpoint::{CheckpointError, ExportOptions, Folder, Saved, Store, export, export_adapter};
use crate::config::{self, Config};
use crate::data::{RowsOf, Stream};
use crate::dist::{Phase, World};
use crate::eval::ForwardOptions;
use crate::model::Keep;
use crate::model::sharding::{ADAPTER_PREFIX, Table};
use crate::scope;
use crate::telemetry::{Board, Console, LogFile, RunState};
use crate::train;
use crate::train::{
    Batches, GradientBuffers, GradientOptions, Optimizer, Reference, ReferenceNeeds, Schedule, Trainer, TrainerOptions,
};
use crate::unlearn;
use evaluation::Evaluator;
use fault::Injector;
use files::RunFolder;
use journal::{Journal, comm_seconds};
use planned::Planned;
use reference::{Identity, Kept, ReferenceCache, ReferenceOptions};
use resume::Start;
use saving::{Next, Saver};
use stages::Stages;
use trained::Trained;

/// What a run is given besides its configuration.
#[derive(Clone)]
pub struct Context {
    pub world: World,
    /// What this rank computes on.
    pub device: Device,
    /// The same in words, or why not on a GPU.
    pub about_device: String,
    pub console: Console,
    pub log: LogFile,
    /// Start of the process, for the time to the first step.
    pub started: Instant,
    /// Replace a finished run in the same folder.
    pub overwrite: bool,
    /// Go on from a checkpoint that was made with other settings.
    pub force_resume: bool,
    /// MPI library, where there is one.
    pub mpi_version: Option<String>,
    /// Name of the supervised start, written into the summary: the sign that this start came to its end.
    pub launch: Option<String>,
    /// A fault to put in.
    pub fault: Option<Fault>,
    /// Where the run leaves what is to be said when memory runs out.
    pub memory_words: MemoryWords,
    /// Where the run tells how far it is; rank 0's is written.
    pub board: Board,
}

/// Longest wait for a rank that reads or writes files.
const FILES_DEADLINE: Duration = Duration::from_secs(3600);

/// Runs to the end. All ranks call it; the summary is the same on all.
pub fn run(config: &Config, context: Context) -> Result<Outcome, RunError> {
    let Context { world, console, board, .. } = &context;
    let faults = Injector::new(context.fault, world);
    let stages = Stages::new(config, &world.watchdog);
    let start = RunFolder::check(config, context.overwrite, world)?;
    tracing::info!("dunlearn {}: {}", env!("CARGO_PKG_VERSION"), config.run.dir.display());
    let (mesh, threads) = (world.mesh, tch::get_num_threads());
    let ranks = format!("ranks: {} (tp {} x dp {}), CPU threads of each: {threads}", mesh.world(), mesh.tp, mesh.dp);
    tracing::info!("{ranks}");
    tell_devices(&context);
    tracing::debug!("{mesh}");
    let mut inputs = Inputs::read(config, world)?;
    // nothing of an earlier run is touched before the new one's inputs are known to be good, and to be those of what it goes on from
    let forced = match start {
        Start::New => Vec::new(),
        Start::Resume(step) => allowed(&newest(config, step)?, config, &inputs.data_digests(), context.force_resume)?,
    };
    let folder = RunFolder::create(config, &context, start)?;
    folder.watch(&context);
    let (mut metrics, past) = folder.metrics(config, &context, start, &forced)?;
    if config.method.objective.is_weight_space() {
        return subspace::run(config, inputs, &folder, &mut metrics, &context, &stages, &faults);
    }
    // other models come and go before this one takes its memory
    let evaluator = Evaluator::new(config, &inputs.encoder, &inputs.sets(), &context)?;
    let first = match start {
        Start::New => 0,
        Start::Resume(step) => step,
    };
    let mut planned = Some(Planned::new(config, &inputs, &context, first)?);
    if let Some(planned) = &planned {
        planned.memory().prepare(&context.memory_words, config, context.device);
    }
    stages.enter(Phase::Load, inputs.model_bytes());
    faults.at(Occasion::Load)?;
    let Loaded { decoder, parameters, identity, names } = inputs.load(config, world, context.device, console)?;
    let steps = total_steps(config, &inputs);

    let per_epoch = inputs.anchors.samples.len().div_ceil(config.train.global_batch);
    let method = unlearn::method(&config.method, config.run.seed, per_epoch);
    let batches = Batches::of(config, &method, &inputs.anchors, inputs.retain.as_ref());
    one_micro_batch_a_step(config, &batches, steps, world)?;
    let forward = evaluation::forward(config);
    let holding = gradient_options(config, decoder.device);
    // a score needs all gradients at once, in f32; what training needs comes after it
    let scored = GradientOptions::f32(decoder.device);
    let buffers = |trainer: &Trainer, options| {
        GradientBuffers::new(&trainer.decoder.table, &trainer.parameters.layout, &world.tp, &world.dp, options)
    };
    let scores = config.scope.mask.as_ref().is_some_and(|mask| mask.score.is_some()) && start == Start::New;
    let first_options = if scores { scored } else { holding };
    let gradients = GradientBuffers::new(&decoder.table, &parameters.layout, &world.tp, &world.dp, first_options);
    let mut trainer = Trainer {
        schedule: Schedule::new(&config.schedule, config.optimizer.lr, steps, per_epoch),
        method,
        options: trainer_options(config),
        broken: Trainer::whole(decoder.device),
        decoder,
        parameters,
        gradients,
        optimizer: Optimizer::none(),
    };
    board.update(|status| status.steps = steps);
    stages.enter(Phase::Prepare, 0);
    let mask = folder.path.join("mask.safetensors");
    let again = start != Start::New;
    if let Some(selection) = scope::select(&mut trainer, config, &names, inputs.scored(config), &mask, again, world)? {
        trainer.parameters.selection = Some(selection);
    }
    let mut digests = inputs.digests(&identity);
    digests.extend(mask_digest(&trainer, &mask, world)?);
    if scores {
        trainer.gradients = buffers(&trainer, holding);
    }
    if let Some(selection) = &trainer.parameters.selection {
        trainer.gradients.select(selection);
    }
    trainer.optimizer = Optimizer::new(&config.optimizer, &trainer.decoder.table, &trainer.parameters);
    Memory::of(&trainer).print();
    let reference_start = Instant::now();
    let reference = reference(config, &inputs, &trainer, &batches, steps, &identity, forward, &folder, &context)?;
    let reference_seconds = reference_start.elapsed().as_secs_f64();
    let mut saver = Saver::new(config, digests.iter().cloned().collect(), board);
    let mut evaluations = Evaluations { before: past.before, during: past.during, ..Evaluations::default() };
    if let Start::Resume(step) = start {
        // the weights before training have told what they had to: the reference and the evaluation are there
        stages.enter(Phase::Load, 3 * inputs.model_bytes());
        restore(config, &digests, &mut trainer, step, &context)?;
    }
    if config.eval.before && start == Start::New {
        stages.enter(Phase::Evaluate(0), 0);
        faults.at(Occasion::Eval)?;
        evaluations.before = evaluator.step(0, &trainer, &inputs, Some(&identity), &context, &mut metrics)?;
    }

    if start == Start::New {
        // after the reference and the evaluation: those are of the model that was given
        stages.enter(Phase::Prepare, 0);
        intervene(config, &inputs, &mut trainer, &names, world)?;
    }

    let training = Instant::now();
    let known = reference.as_ref().map(|cache| cache as &dyn Reference);
    let mut journal = Journal {
        metrics: &mut metrics,
        progress: console.progress("training", steps as u64, "steps"),
        per_epoch,
        tokens: past.tokens,
        comm_seconds: comm_seconds(world),
        cpu_seconds: host::cpu_seconds(),
        told: Instant::now(),
        seconds_to_first_step: 0.0,
        stage: serde_json::Value::Null,
    };
    // a GPU works while the host prepares the next step: its numbers are read one step late, unless the next step needs them
    let late = usize::from(context.device != Device::Cpu && trainer.method.dual.is_none());
    let every = config.eval.every.steps(per_epoch);
    let mut open = VecDeque::new();
    journal.progress.advance(first as u64, "");
    for step in first..steps {
        stages.step(step + 1);
        faults.at(Occasion::Step)?;
        let work = batches.step(step, world.mesh);
        if let Some(planned) = planned.as_mut().filter(|_| step == first) {
            planned.watch(&context);
        }
        let launched = trainer.launch(step, &work, known, world);
        if let Some(planned) = planned.as_ref().filter(|_| step == first) {
            planned.unwatch(&context);
        }
        open.push_back((step, work, launched));
        let evaluated = every > 0 && (step + 1) % every == 0 && step + 1 < steps;
        let last = step + 1 == steps;
        // nothing is saved of a step whose numbers are not known to be numbers
        let wish = saver.ask(step + 1, steps, world);
        while open.len() > if evaluated || last || wish.save || wish.stop { 0 } else { late } {
            let (step, work, launched) = open.pop_front().expect("invariant: there is one more");
            let report = trainer.read(launched, &work, known, world)?;
            journal.tell(step, &work, &report, &trainer, &context)?;
            if let Some(planned) = planned.take() {
                let found = planned.compare(report.seconds, &context);
                journal.metrics.write(&json!({ "step": step + 1, "plan": found }))?;
                journal.between_steps(world);
            }
        }
        stages.warmed_up();
        if evaluated {
            stages.enter(Phase::Evaluate(step + 1), 0);
            faults.at(Occasion::Eval)?;
            let scores = evaluator.step(step + 1, &trainer, &inputs, None, &context, journal.metrics)?;
            evaluations.during.push((step + 1, scores));
            journal.between_steps(world);
        }
        if wish.save || wish.stop {
            stages.enter(Phase::Save(step + 1), saver.bytes(&trainer, world));
            // what the checkpoint goes on from
            journal.metrics.sync()?;
            faults.at(Occasion::Save)?;
        }
        if saver.act(wish, &trainer, step + 1, world)? == Next::Stop {
            let why = signals::request().map_or_else(|| "asked to stop".to_owned(), |name| format!("{name} came"));
            tracing::info!(
                "{why}: the state after step {} of {steps} is saved; the same command goes on from there",
                step + 1
            );
            folder.leave(RunState::Stopped, &context);
            return Ok(Outcome::Stopped);
        }
    }
    stages.enter(Phase::Save(steps), saver.bytes(&trainer, world));
    saver.finish(world)?;
    let Journal { tokens, seconds_to_first_step, progress, .. } = journal;
    drop(progress);
    let training_seconds = past.seconds + training.elapsed().as_secs_f64();

    trainer.check_weights(steps, world)?;
    if config.eval.after {
        stages.enter(Phase::Evaluate(steps), 0);
        faults.at(Occasion::Eval)?;
        evaluations.after = evaluator.step(steps, &trainer, &inputs, None, &context, &mut metrics)?;
    }
    stages.enter(Phase::Export, inputs.model_bytes());
    if config.export.model || config.scope.lora.is_some() {
        faults.at(Occasion::Export)?;
        export_model(config, &inputs, &trainer, world, console, &folder)?;
    }
    faults.at(Occasion::End)?;
    let summary = Summary::new(
        config,
        &inputs,
        &context,
        &identity,
        evaluations,
        summary::Timing { steps, tokens, training_seconds, reference_seconds, seconds_to_first_step },
    );
    folder.write_summary(&summary, world)?;
    evaluator.print(steps, &context)?;
    summary.print(&folder.path, console);
    stages.enter(Phase::End, 0);
    folder.leave(RunState::Finished, &context);
    Ok(Outcome::Finished(Box::new(summary)))
}

/// How a run ended without an error.
pub enum Outcome {
    Finished(Box<Summary>),
    /// It was asked to stop, has saved its state and can be started again.
    Stopped,
}

const MOVE_AWAY: &str = "move the folder away to go on from an older checkpoint, or start anew with --overwrite";

/// The checkpoint that a run goes on from.
fn newest(config: &Config, step: usize) -> Result<Saved, RunError> {
    let store = Store::of_run(&config.run.dir);
    store.open(step).map_err(|error| RunError::Refused(format!("{error}. This is the newest checkpoint; {MOVE_AWAY}")))
}

/// What a run that goes on overrides, in words.
///
/// # Errors
/// Differences that nobody has allowed: the first ones of them.
fn allowed(saved: &Saved, config: &Config, digests: &[(String, String)], force: bool) -> Result<Vec<String>, RunError> {
    const TOLD: usize = 8;
    let differences = resume::differences(saved, config, digests);
    if differences.is_empty() || force {
        return Ok(differences);
    }
    let others = match differences.len().saturating_sub(TOLD) {
        0 => String::new(),
        others => format!("; and {others} more"),
    };
    let (path, told) = (saved.folder.display(), differences[..differences.len().min(TOLD)].join("; "));
    let advice = "undo that, start anew with --overwrite, or go on all the same with --force-resume";
    Err(RunError::Refused(format!("{path}: {told}{others}; {advice}")))
}

/// Takes the state of the checkpoint after `step`. All ranks call it.
///
/// # Errors
/// On all ranks: files that were damaged, or a checkpoint of something else, with the first difference.
fn restore(
    config: &Config,
    digests: &[(String, String)],
    trainer: &mut Trainer,
    step: usize,
    context: &Context,
) -> Result<(), RunError> {
    let world = &context.world;
    let saved = newest(config, step)?;
    let path = saved.folder.display();
    for difference in allowed(&saved, config, digests, context.force_resume)? {
        tracing::warn!("--force-resume: {path}: {difference}");
    }
    let mine =
        saved.verify(world.mesh.rank, world.mesh.world()).map_or_else(|error| error.to_string(), |()| String::new());
    let all = world.world.gather_bytes(mine.as_bytes());
    if let Some(words) = all.iter().find(|words| !words.is_empty()) {
        let words = String::from_utf8_lossy(words);
        return Err(RunError::Refused(format!("{words}. This is the newest checkpoint, {path}; {MOVE_AWAY}")));
    }
    let files = saved.state()?;
    files.check_coverage()?;
    if !trainer.restore(&files, saved.manifest.optimizer_steps, world)? {
        let lacks = match files.whats().len() {
            0 | 1 => "holds no state of the optimizer",
            _ => "does not hold what this optimizer remembers",
        };
        tracing::warn!("{path} {lacks}: its moments and their count start anew");
    }
    trainer.method.restore(&saved.manifest.method).map_err(RunError::Refused)?;
    tracing::info!("going on after step {step}, from {}", saved.folder.display());
    Ok(())
}

/// Which weights a run may change is a part of what its checkpoints belong to. All ranks call it.
fn mask_digest(trainer: &Trainer, path: &Path, world: &World) -> Result<Option<(String, String)>, RunError> {
    if trainer.parameters.selection.is_none() {
        return Ok(None);
    }
    let bytes = if world.is_first() { std::fs::read(path) } else { Ok(Vec::new()) };
    let bytes = bytes.map_err(|source| CheckpointError::Read { path: path.to_owned(), source })?;
    let digest = world.world.broadcast_bytes(blake3::hash(&bytes).to_hex().as_bytes(), 0);
    Ok(Some(("scope.mask".to_owned(), String::from_utf8_lossy(&digest).into_owned())))
}

/// What is done to the weights before the first step. All ranks call it.
fn intervene(
    config: &Config,
    inputs: &Inputs,
    trainer: &mut Trainer,
    names: &[String],
    world: &World,
) -> Result<(), RunError> {
    scope::intervene(trainer, config, world)?;
    if config.scope.lora.as_ref().is_some_and(|lora| lora.init == config::LoraInit::Fila) {
        let (whole, sets) = (inputs.table(config, world)?, inputs.scored(config));
        scope::fila(trainer, config, names, whole, |table| inputs::layout_of(table, config, world), sets, world)?;
    }
    Ok(())
}

/// `adapter_config.json` as PEFT reads it.
fn adapter_settings(config: &Config, table: &Table) -> serde_json::Value {
    let lora = config.scope.lora.as_ref().expect("invariant: there are adapters");
    let names = table.params[table.own..].iter().map(|param| param.pieces[0].name.as_str());
    let modules = names.filter_map(|name| {
        let module = name.strip_prefix(ADAPTER_PREFIX)?.split(".lora_").next()?;
        Some(module.to_owned())
    });
    let mut modules: Vec<String> = modules.collect();
    modules.dedup();
    // full names: a choice of layers is not lost
    json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": true,
        "base_model_name_or_path": config.model.path, "r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": false, "init_lora_weights": true, "target_modules": modules,
    })
}

/// One line for each kind of thing that the ranks say of their devices. All ranks call it.
fn tell_devices(context: &Context) {
    let all = context.world.world.gather_bytes(context.about_device.as_bytes());
    let mut told = Vec::new();
    for line in all {
        if !told.contains(&line) {
            tracing::info!("{}", String::from_utf8_lossy(&line));
            told.push(line);
        }
    }
}

/// bf16 holds a sum of several micro-batches badly: such steps are refused before anything is computed.
fn one_micro_batch_a_step(config: &Config, batches: &Batches, steps: usize, world: &World) -> Result<(), RunError> {
    if config.train.grad_dtype == config::Float::F32 {
        return Ok(());
    }
    for step in 0..steps.min(batches.order.steps_per_epoch()) {
        let count = batches.step(step, world.mesh).micro_batches.len();
        if count > 1 {
            return Err(RunError::Refused(format!(
                "train.grad_dtype = \"bf16\" holds one micro-batch a step, step {} has {count} on rank {}: raise \
                 train.micro_batch_tokens (now {}), lower train.global_batch (now {}) or write grad_dtype = \"f32\"",
                step + 1,
                world.mesh.rank,
                config.train.micro_batch_tokens,
                config.train.global_batch
            )));
        }
    }
    Ok(())
}

fn gradient_options(config: &Config, device: Device) -> GradientOptions {
    GradientOptions {
        kind: train::kind(config.train.grad_dtype),
        reduce: train::kind(config.parallel.reduce_dtype),
        release: config.optimizer.in_backward,
        device,
    }
}

fn trainer_options(config: &Config) -> TrainerOptions {
    TrainerOptions {
        in_backward: config.optimizer.in_backward,
        keep: match config.train.recompute {
            config::Recompute::None => Keep::Everything,
            config::Recompute::HalfBlock => Keep::Inputs,
        },
        logits_bytes: evaluation::forward(config).logits_bytes,
        max_grad_norm: config.optimizer.max_grad_norm,
    }
}

/// The kind of the written weights; None for that of the weights that were read.
fn export_kind(config: &Config) -> Option<Kind> {
    match config.export.dtype {
        config::ExportDtype::Same => None,
        config::ExportDtype::Bf16 => Some(Kind::BFloat16),
        config::ExportDtype::F16 => Some(Kind::Half),
        config::ExportDtype::F32 => Some(Kind::Float),
    }
}

fn max_shard_bytes(config: &Config) -> usize {
    (config.export.max_shard_mib * 1048576.0) as usize
}

fn total_steps(config: &Config, inputs: &Inputs) -> usize {
    let per_epoch = inputs.anchors.samples.len().div_ceil(config.train.global_batch);
    config.train.steps.unwrap_or_else(|| config.train.epochs.unwrap_or(0) * per_epoch)
}

/// What the method needs to know of the model before training.
#[expect(clippy::too_many_arguments, reason = "the parts of one run")]
fn reference(
    config: &Config,
    inputs: &Inputs,
    trainer: &Trainer,
    batches: &Batches,
    steps: usize,
    model: &str,
    forward: ForwardOptions,
    folder: &RunFolder,
    context: &Context,
) -> Result<Option<ReferenceCache>, RunError> {
    let needs = trainer.method.reference();
    if needs == ReferenceNeeds::default() {
        return Ok(None);
    }
    let (weights, world) = (&trainer.parameters.weights, &context.world);
    let cache_folder = folder.cache(world)?;
    let options = ReferenceOptions { folder: &cache_folder, forward, world, console: &context.console };
    let precision = match config.train.precision {
        config::Precision::Bf16 => "bf16",
        config::Precision::F32 => "f32",
    };
    let mut cache = ReferenceCache::default();
    let identity = |data| Identity { model, data, precision };
    for text in needs.logprobs {
        cache.load_logprobs(
            &trainer.decoder,
            weights,
            &inputs.anchors,
            text,
            &identity(&inputs.anchors.digest),
            &options,
        )?;
    }
    let rows = needs.rows.iter().map(|&stream| (stream, None));
    let hidden = needs.hidden.iter().map(|&(stream, edge)| (stream, Some(edge)));
    for (stream, edge) in rows.chain(hidden) {
        let dataset = match stream {
            Stream::Forget => &inputs.anchors,
            Stream::Retain => inputs.retain.as_ref().expect("invariant: a retain term has retain samples"),
        };
        let samples = batches.visited(stream, steps, world.mesh);
        let what = Kept { stream, edge, rows: edge.map_or(trainer.method.cut(stream).rows, |_| RowsOf::Every) };
        cache.load_rows(&trainer.decoder, weights, dataset, &samples, what, &identity(&dataset.digest), &options)?;
    }
    Ok(Some(cache))
}

fn export_model(
    config: &Config,
    inputs: &Inputs,
    trainer: &Trainer,
    world: &World,
    console: &Console,
    folder: &RunFolder,
) -> Result<(), RunError> {
    let kind = export_kind(config).unwrap_or(inputs.stored_kind);
    let (tp, spread) = (world.mesh.tp, trainer.decoder.sequence_parallel);
    let narrowed = |rank| -> Result<Table, RunError> {
        let mut table = Table::new(&inputs.arch, tp, rank, spread)?;
        scope::narrow(&mut table, config)?;
        Ok(table)
    };
    let tables: Result<Vec<Table>, RunError> = (0..tp).map(narrowed).collect();
    let options = ExportOptions {
        source: &config.model.path,
        target: &folder.model(),
        kind,
        max_shard_bytes: max_shard_bytes(config),
    };
    let tensors = trainer.decoder.table.tensors().len() as u64;
    let mut bar = console.progress("export", tensors, "tensors");
    let parameters = &trainer.parameters;
    let mut trained = Trained::new(trainer, world);
    if parameters.frozen_moved && config.scope.lora.is_some() {
        tracing::info!(
            "no adapter folder: the adapters belong to matrices that were changed before training; the model is whole"
        );
    } else if config.scope.lora.is_some() {
        let settings = adapter_settings(config, &trainer.decoder.table);
        export_adapter(&folder.adapter(), kind, &settings, &tables?, world, |id| trained.own(id))?;
    }
    if !config.export.model {
        return Ok(());
    }
    let tables = inputs.tables(config, world)?;
    // what is not trained leaves as it came, not as it was rounded for computing
    let source = (!parameters.frozen_moved && config.model.init == config::Init::Pretrained)
        .then(|| Folder::open(&config.model.path))
        .transpose()?;
    let whole = inputs.table(config, world)?;
    let parameter = |id: usize| {
        let values = match parameters.layout.places[id] {
            Some(_) => return Ok(trained.own(id)),
            None if parameters.frozen_moved => parameters.weights.get(id).to_kind(Kind::Float).to_device(Device::Cpu),
            None => inputs.original(config, &whole, id, source.as_ref())?,
        };
        trained.merge(id, &values);
        Ok::<_, RunError>(values)
    };
    export(&options, &tables, world, parameter, || bar.advance(1, ""))
}
