//! Evaluation in a run and by itself: the suites, the models that they compare with, and the files of results.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::frozen::{Frozen, facts, model_folder};
use super::resume::Scores;
use super::{Context, FILES_DEADLINE, Inputs, RunError};
use crate::config::Config;
use crate::data::{Dataset, Encoder};
use crate::eval::suites::{Others, Suites};
use crate::eval::{self, Asked, Evaluation, ForwardOptions, ModelFacts, likelihood};
use crate::telemetry::Metrics;
use crate::train::Trainer;

/// What a run measures of its model at a step.
pub(super) struct Evaluator {
    /// None where a run does not evaluate.
    suites: Option<Suites>,
    others: Others,
    sets: Vec<String>,
    /// Of what is not comparable; they belong into every file of results.
    warnings: Vec<String>,
    folder: PathBuf,
    timeout: Duration,
    forward: ForwardOptions,
}

/// What an evaluation by itself is called.
#[derive(Clone, Debug)]
pub struct EvaluateOptions {
    /// Name of the results; the name of the model's folder where there is none.
    pub label: Option<String>,
}

/// Evaluates a model folder or the model of a run, and writes the results into `run.dir`. All ranks call it and get the same.
///
/// # Errors
/// What does not fit together, before anything is computed; files that cannot be read or written.
pub fn evaluate(
    config: &Config,
    options: &EvaluateOptions,
    context: &Context,
) -> Result<(Evaluation, Others), RunError> {
    let world = &context.world;
    world.watchdog.set_deadline(Duration::from_secs(config.run.timeout).max(FILES_DEADLINE));
    let folder = model_folder("model.path", &config.model.path)?;
    let template =
        config.data.template.clone().unwrap_or(crate::config::Template::Named(crate::config::TemplateName::Chat));
    let encoder = Encoder::from_folder(&folder, &template, config.data.system.as_deref())?;
    let load = |(key, source): (&'static str, _)| -> Result<(&'static str, Dataset), RunError> {
        let set = Dataset::load(key, source, &encoder, config.data.max_length)?;
        Ok((key.trim_start_matches("data."), set))
    };
    let sets: Vec<(&'static str, Dataset)> = config.data.sources().map(load).collect::<Result<_, _>>()?;
    let named: Vec<(&str, &Dataset)> = sets.iter().map(|(name, set)| (*name, set)).collect();
    for warning in named.iter().flat_map(|(_, set)| set.warnings()).filter(|_| world.is_first()) {
        tracing::warn!("{warning}");
    }
    let evaluator = Evaluator::new(config, &encoder, &named, context)?;
    let facts = facts(&folder, config, world)?;
    let label = options.label.clone().unwrap_or_else(|| name_of(&folder));
    let frozen = Frozen::load(facts, config, world, context.device, &context.console)?;
    let asked = frozen.asked(world, evaluator.forward);
    let out = evaluator.measure(asked, &encoder, &label, &frozen.facts, context)?;
    evaluator.write(&out, context)?;
    Ok((out, evaluator.others))
}

/// How texts are cut for a forward pass.
pub(super) fn forward(config: &Config) -> ForwardOptions {
    ForwardOptions { budget: config.train.micro_batch_tokens, logits_bytes: config.train.logits_mib * 1048576.0 }
}

fn asked<'a>(trainer: &'a Trainer, forward: ForwardOptions, context: &'a Context) -> Asked<'a> {
    Asked { decoder: &trainer.decoder, weights: &trainer.parameters.weights, world: &context.world, forward }
}

/// The last part of a folder's name that says anything: that of the run where the folder is its `model`.
fn name_of(folder: &Path) -> String {
    let parts = folder.components().rev().filter_map(|part| part.as_os_str().to_str());
    parts.into_iter().find(|part| !matches!(*part, "model" | "." | ".." | "/")).unwrap_or("model").to_owned()
}

impl Evaluator {
    /// Reads the suites' data and evaluates the models that they compare with, unless a cache has their results. All ranks call it.
    ///
    /// # Errors
    /// Data or results that do not fit, on all ranks.
    pub(super) fn new(
        config: &Config,
        encoder: &Encoder,
        sets: &[(&str, &Dataset)],
        context: &Context,
    ) -> Result<Self, RunError> {
        let timeout = Duration::from_secs(config.run.timeout);
        let (folder, forward) = (config.run.dir.clone(), forward(config));
        let mut evaluator =
            Self { suites: None, others: Others::default(), sets: vec![], warnings: vec![], folder, timeout, forward };
        if !config.eval.happens() {
            return Ok(evaluator);
        }
        let suites = Suites::read(config, encoder, sets)?;
        evaluator.sets = sets.iter().map(|(name, _)| (*name).to_owned()).collect();
        let eval = &config.eval;
        let cache = eval.cache.clone().unwrap_or_else(|| config.run.dir.join("cache/eval"));
        let others = &mut evaluator.others;
        for (name, path, slot) in [
            ("retrained", &eval.retrained, &mut others.retrained),
            ("original", &eval.original, &mut others.original),
            ("reference", &eval.reference, &mut others.reference),
        ] {
            let Some(path) = path else { continue };
            let other = other(name, path, &suites, encoder, &cache, config, forward, context)?;
            for warning in suites.comparable(name, &other)? {
                warn(context, &warning);
                evaluator.warnings.push(warning);
            }
            *slot = Some(other);
        }
        evaluator.suites = Some(suites);
        Ok(evaluator)
    }

    /// Measures the model in training after `step`, writes the results and tells the metrics. All ranks call it.
    pub(super) fn step(
        &self,
        step: usize,
        trainer: &Trainer,
        inputs: &Inputs,
        identity: Option<&str>,
        context: &Context,
        metrics: &mut Metrics,
    ) -> Result<Scores, RunError> {
        let mut out = self.of(trainer, inputs, &Evaluation::label_of(step), identity, context)?;
        out.step = Some(step);
        self.write(&out, context)?;
        let scores = self.sets.iter().filter_map(|set| Some((set.clone(), likelihood::of_items(out.items.get(set)?))));
        let scores: Scores = scores.collect();
        let values: serde_json::Map<String, serde_json::Value> =
            out.metrics.iter().map(|(name, metric)| (name.clone(), json!(metric.value))).collect();
        metrics.write(&json!({ "step": step, "eval": scores, "metrics": values }))?;
        Ok(scores)
    }

    /// Measures a trainer's model as it is. All ranks call it.
    pub(super) fn of(
        &self,
        trainer: &Trainer,
        inputs: &Inputs,
        label: &str,
        identity: Option<&str>,
        context: &Context,
    ) -> Result<Evaluation, RunError> {
        let facts = ModelFacts {
            path: self.folder.clone(),
            digest: identity.unwrap_or_default().to_owned(),
            family: inputs.arch.family.to_owned(),
            parameters: inputs.arch.num_parameters(),
        };
        self.measure(asked(trainer, self.forward, context), &inputs.encoder, label, &facts, context)
    }

    /// Shows what the suites say before and after, beside the other models. Only the first rank reads and tells.
    pub(super) fn print(&self, steps: usize, context: &Context) -> Result<(), RunError> {
        let silent = context.console.is_for_machines() || !context.world.is_first();
        if silent || !self.suites.as_ref().is_some_and(Suites::has_tables) {
            return Ok(());
        }
        let mut found = Vec::new();
        for (name, step) in [("before", 0), ("after", steps)] {
            let file = self.folder.join(eval::record::FOLDER).join(format!("{}.json", Evaluation::label_of(step)));
            if file.is_file() {
                found.push((name.to_owned(), Evaluation::read(&file)?));
            }
        }
        let others = [("original", &self.others.original), ("retrained", &self.others.retrained)];
        let others = others.into_iter().filter_map(|(name, one)| Some((name.to_owned(), one.as_ref()?)));
        let columns: Vec<(String, &Evaluation)> =
            found.iter().map(|(name, one)| (name.clone(), one)).chain(others).collect();
        let own =
            |name: &str| !self.sets.iter().any(|set| name.strip_prefix(set).is_some_and(|rest| rest.starts_with('.')));
        tracing::info!("\n{}", eval::compare::side_by_side(&columns, own));
        Ok(())
    }

    pub(super) fn measure(
        &self,
        asked: Asked,
        encoder: &Encoder,
        label: &str,
        facts: &ModelFacts,
        context: &Context,
    ) -> Result<Evaluation, RunError> {
        let suites = self.suites.as_ref().expect("invariant: a run that evaluates has suites");
        let watchdog = &context.world.watchdog;
        // ranks write answers of very different lengths
        let before = suites.has_tables().then(|| watchdog.set_deadline(self.timeout.max(FILES_DEADLINE)));
        let started = Instant::now();
        let mut out = suites.run(asked, encoder, label, facts, &self.others, &context.console)?;
        if let Some(before) = before {
            watchdog.set_deadline(before);
        }
        tracing::debug!(label, metrics = out.metrics.len(), seconds = started.elapsed().as_secs_f64(), "evaluated");
        for warning in &out.warnings {
            warn(context, &format!("{label}: {warning}"));
        }
        self.warnings.iter().for_each(|warning| out.warn(warning.clone()));
        Ok(out)
    }

    fn write(&self, out: &Evaluation, context: &Context) -> Result<(), RunError> {
        if context.world.is_first() {
            out.write(&self.folder)?;
        }
        Ok(())
    }
}

fn warn(context: &Context, warning: &str) {
    if context.world.is_first() {
        tracing::warn!("{warning}");
    }
}

/// Results of another model on the same items: a file of results as it is, otherwise its model, evaluated once. All ranks call it.
#[expect(clippy::too_many_arguments, reason = "the parts of one evaluation")]
fn other(
    name: &'static str,
    path: &Path,
    suites: &Suites,
    encoder: &Encoder,
    cache: &Path,
    config: &Config,
    forward: ForwardOptions,
    context: &Context,
) -> Result<Evaluation, RunError> {
    let key = format!("eval.{name}");
    if let Some(file) = results_in(path) {
        return Ok(Evaluation::read(&file)?.with_all_items(&file)?);
    }
    let world = &context.world;
    // reads a whole model, and ranks write answers of very different lengths
    let before = world.watchdog.set_deadline(Duration::from_secs(config.run.timeout).max(FILES_DEADLINE));
    let facts = facts(&model_folder(&key, path)?, config, world)?;
    let home = cache.join(suites.digest(&facts.digest));
    let file = home.join(eval::record::FOLDER).join(format!("{name}.json"));
    // one rank looks, all follow: ranks must not disagree on whether to compute
    let fresh = world.is_first() && file.is_file();
    if world.world.broadcast_bytes(&[u8::from(fresh)], 0) == [1] {
        world.watchdog.set_deadline(before);
        tracing::info!("{name} model: results of {} read from {}", facts.path.display(), file.display());
        return Ok(Evaluation::read(&file)?.with_all_items(&file)?);
    }
    tracing::info!("{name} model: evaluating {}", facts.path.display());
    let frozen = Frozen::load(facts, config, world, context.device, &context.console)?;
    let asked = frozen.asked(world, forward);
    let out = suites.run(asked, encoder, name, &frozen.facts, &Others::default(), &context.console)?;
    if world.is_first() {
        out.write(&home)?;
    }
    world.world.barrier();
    world.watchdog.set_deadline(before);
    Ok(out)
}

/// A file of results, or the last one of a run that has no model.
fn results_in(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path.to_owned());
    }
    let has_model = [path.to_owned(), path.join("model")].iter().any(|folder| folder.join("config.json").is_file());
    if has_model { None } else { Evaluation::files(path).pop() }
}
