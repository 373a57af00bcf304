//! Attacks on the model of a run: can what was forgotten be brought back? Each is measured as the run itself is, on the model that was
//! unlearned and beside it on the original and on a retrained one, where those are given.
//!
//! What changes weights or questions is measured here ([`Attacked`]); what trains is a run of its own under `attacks/`
//! ([`training`]).

mod probes;
mod prompts;
mod training;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::evaluation::Evaluator;
use super::evaluation::forward;
use super::frozen::{Frozen, facts, model_folder};
use super::{Context, FILES_DEADLINE, RunError};
use crate::config::{Attack, Config, Eval, QuantisationName, Template, TemplateName};
use crate::data::{Dataset, Encoder};
use crate::eval::attack::{Quantisation, latent, put_latent, quantise};
use crate::eval::{Asked, Evaluation, Metric};
use crate::model::Weights;
use crate::train::Adversary;

/// What `dunlearn attack` is told besides the configuration.
#[derive(Clone, Debug, Default)]
pub struct AttackOptions {
    /// Model to attack; that of the run where there is none.
    pub model: Option<PathBuf>,
}

/// A model under attack.
struct Target {
    /// `unlearned`, `original` or `retrained`.
    name: &'static str,
    folder: PathBuf,
}

/// Name of the results: `eval/attack.json`.
pub const LABEL: &str = "attack";
/// Folder of the training runs in a run's folder.
const FOLDER: &str = "attacks";

/// Runs every attack of `[eval.attack]` and writes `eval/attack.json`: metrics `attack.NAME.METRIC` of the model that was unlearned,
/// `attack.NAME.original.METRIC` and `attack.NAME.retrained.METRIC`, with `none` for no attack, and curves `attack.NAME`. All ranks
/// call it and get the same.
///
/// # Errors
/// What does not fit together, before anything is computed; models or data that cannot be read.
pub fn attack(config: &Config, options: &AttackOptions, context: &Context) -> Result<Evaluation, RunError> {
    let settings = config.eval.attack.clone().unwrap_or_default();
    context.world.watchdog.set_deadline(Duration::from_secs(config.run.timeout).max(FILES_DEADLINE));
    let targets = targets(config, options)?;
    probes::check(&settings, &targets)?;
    let started = Instant::now();
    let mut all = Gathered { out: None };
    for target in &targets {
        tracing::info!("attacks on the {} model, {}", target.name, target.folder.display());
        still(config, &settings, target, context, &mut all)?;
        training::train(config, &settings, target, context, &mut all)?;
    }
    probes::probe(config, &settings, &targets, context, &mut all)?;
    let mut out = all.out.expect("invariant: there is a model under attack");
    out.seconds.insert(LABEL.to_owned(), started.elapsed().as_secs_f64());
    if context.world.is_first() {
        out.write(&config.run.dir)?;
    }
    Ok(out)
}

/// The models: the one under attack, and those beside it that are models and not only results.
fn targets(config: &Config, options: &AttackOptions) -> Result<Vec<Target>, RunError> {
    let own = options.model.clone().unwrap_or_else(|| config.run.dir.join("model"));
    let own = model_folder("--model", &own)?;
    let original = config.eval.original.clone().unwrap_or_else(|| config.model.path.clone());
    let mut targets = vec![Target { name: "unlearned", folder: own }];
    for (name, path) in [("original", Some(original)), ("retrained", config.eval.retrained.clone())] {
        let Some(path) = path else { continue };
        match model_folder(name, &path) {
            Ok(folder) if folder != targets[0].folder && has_weights(&folder) => targets.push(Target { name, folder }),
            Ok(_) => {}
            Err(_) => tracing::warn!("{} holds no model: nothing of the {name} model is attacked", path.display()),
        }
    }
    Ok(targets)
}

fn has_weights(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.path().extension().is_some_and(|end| end == "safetensors"))
}

/// The configuration of an evaluation that stands for itself.
fn alone(eval: &Eval) -> Eval {
    Eval { retrained: None, original: None, reference: None, cache: None, attack: None, ..eval.clone() }
}

/// Attacks without training: one model is loaded and asked several times.
fn still(
    config: &Config,
    settings: &Attack,
    target: &Target,
    context: &Context,
    all: &mut Gathered,
) -> Result<(), RunError> {
    let world = &context.world;
    let template = config.data.template.clone().unwrap_or(Template::Named(TemplateName::Chat));
    let encoder = Encoder::from_folder(&target.folder, &template, config.data.system.as_deref())?;
    let mut sets = prompts::sets(config, settings, &encoder)?;
    let named: Vec<(&'static str, &Dataset)> = sets.iter().map(|(name, set)| (*name, set)).collect();
    let asking = Config { eval: Eval { before: true, ..alone(&config.eval) }, ..config.clone() };
    let evaluator = Evaluator::new(&asking, &encoder, &named, context)?;
    let facts = facts(&target.folder, config, world)?;
    let model = Frozen::load(facts, config, world, context.device, &context.console)?;
    let measure = |weights: &Weights, label: &str| {
        let asked = Asked { weights, ..model.asked(world, forward(config)) };
        evaluator.measure(asked, &encoder, label, &model.facts, context)
    };
    let label = |attack: &str| match target.name {
        "unlearned" => format!("{LABEL}_{attack}"),
        name => format!("{LABEL}_{attack}_{name}"),
    };
    let mut plain = measure(&model.weights, &label("none"))?;
    if let Some(how) = &settings.latent {
        if how.layer >= model.decoder.arch.num_layers {
            return Err(RunError::Refused(format!(
                "eval.attack.latent.layer is {}, the model's layers are 0 to {}",
                how.layer,
                model.decoder.arch.num_layers - 1
            )));
        }
        let at =
            sets.iter().position(|(name, _)| *name == "forget").expect("invariant: the configuration was validated");
        let set = sets.swap_remove(at).1;
        let count = match config.eval.max_samples {
            0 => set.samples.len(),
            most => set.samples.len().min(most),
        };
        let adversary = Adversary { edge: how.layer, radius: how.radius, steps: how.steps };
        let mut bar = context.console.progress("latent attack", count.div_ceil(world.mesh.dp) as u64, "samples");
        let asked = model.asked(world, forward(config));
        let scores = latent(asked, &set.samples[..count], adversary, config.run.seed, |n| bar.advance(n as u64, ""));
        drop(bar);
        put_latent(&mut plain, &scores);
    }
    keep(&plain, config, context)?;
    for (prefix, attack) in [("paraphrase.", "paraphrase"), ("in_context.", "in_context"), ("latent.", "latent")] {
        all.take(&plain, target, attack, |name| name.strip_prefix(prefix).map(|rest| format!("forget.{rest}")));
    }
    let extra = |name: &str| ["paraphrase.", "in_context.", "latent."].iter().any(|prefix| name.starts_with(prefix));
    all.take(&plain, target, "none", |name| (!extra(name)).then(|| name.to_owned()));
    for how in &settings.quantise {
        let (name, how) = match how {
            QuantisationName::Int8 => ("int8", Quantisation::INT8),
            QuantisationName::Int4 => ("int4", Quantisation::INT4),
            QuantisationName::Nf4 => ("nf4", Quantisation::NF4),
        };
        let weights = quantise(&model.decoder, &model.weights, how);
        let out = measure(&weights, &label(name))?;
        keep(&out, config, context)?;
        all.take(&out, target, name, |name| (!extra(name)).then(|| name.to_owned()));
    }
    Ok(())
}

/// Writes the results of one attack on one model, with its items.
fn keep(out: &Evaluation, config: &Config, context: &Context) -> Result<(), RunError> {
    if context.world.is_first() {
        out.write(&config.run.dir)?;
    }
    Ok(())
}

/// What all attacks give.
struct Gathered {
    out: Option<Evaluation>,
}

impl Gathered {
    /// The results, begun with what is known of the model under attack.
    fn out(&mut self, like: &Evaluation) -> &mut Evaluation {
        self.out.get_or_insert_with(|| Evaluation {
            label: LABEL.to_owned(),
            step: None,
            metrics: Default::default(),
            curves: Default::default(),
            warnings: Vec::new(),
            seconds: Default::default(),
            items: Default::default(),
            ..like.clone()
        })
    }

    /// Takes the metrics of one evaluation of an attacked model under the names that `rename` gives them.
    fn take(&mut self, from: &Evaluation, target: &Target, attack: &str, rename: impl Fn(&str) -> Option<String>) {
        let stem = stem(attack, target);
        let out = self.out(from);
        for (name, metric) in &from.metrics {
            if let Some(name) = rename(name) {
                out.metrics.insert(format!("{stem}.{name}"), metric.clone());
            }
        }
        for warning in &from.warnings {
            out.warn(format!("{stem}: {warning}"));
        }
    }

    /// Adds one metric.
    fn put(&mut self, like: &Evaluation, target: &Target, attack: &str, name: &str, metric: Metric) {
        self.out(like).put(&format!("{}.{name}", stem(attack, target)), None, metric);
    }
}

/// How the numbers of an attack on a model begin.
fn stem(attack: &str, target: &Target) -> String {
    match target.name {
        "unlearned" => format!("{LABEL}.{attack}"),
        name => format!("{LABEL}.{attack}.{name}"),
    }
}
