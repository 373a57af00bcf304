//! Attacks that train: relearning on a part of the forget data, on benign data, and RTT. Each is a run of its own in
//! `attacks/NAME_MODEL/`, with the data that it trains on and is measured on beside it as JSON lines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{FOLDER, Gathered, Target, alone};
use crate::config::{self, Attack, Config, Every, Init, Method, Objective, Retain, Source, Training};
use crate::data::rows;
use crate::eval::{Better, Curve, Evaluation, Metric};
use crate::model::init::Stream;
use crate::run::{Context, Outcome, RunError, run};

/// How one run trains.
struct Recipe {
    /// Name of its folder.
    name: String,
    train: Source,
    /// What is measured as `forget`.
    held_out: Source,
    batch: usize,
    lr: f64,
    steps: Option<usize>,
    epochs: Option<usize>,
    every: usize,
}

/// Runs what is asked for on one model.
pub(super) fn train(
    config: &Config,
    settings: &Attack,
    target: &Target,
    context: &Context,
    all: &mut Gathered,
) -> Result<(), RunError> {
    let forget = config.data.forget.as_ref().expect("invariant: the configuration was validated");
    let recipe = |name: &str, train, held_out, training: &Training| Recipe {
        name: format!("{name}_{}", target.name),
        train,
        held_out,
        batch: training.batch,
        lr: training.lr,
        steps: Some(training.steps),
        epochs: None,
        every: training.every,
    };
    if let Some(relearn) = &settings.relearn {
        let lines = lines(forget)?;
        let chosen = chosen(lines.len(), relearn.fraction, config.run.seed);
        let (train, rest): (Vec<usize>, Vec<usize>) = (0..lines.len()).partition(|at| chosen.contains(at));
        let folder = config.run.dir.join(FOLDER).join(format!("relearn_{}_data", target.name));
        let write = |name, at: &[usize]| write(&folder.join(name), forget, &lines, at, context);
        let train = write("train.jsonl", &train)?;
        let held_out = if rest.is_empty() { train.clone() } else { write("held_out.jsonl", &rest)? };
        let results = train_one(config, target, recipe("relearn", train, held_out, &relearn.training), context)?;
        over_steps(all, target, "relearn", &results);
    }
    if let Some(benign) = &settings.benign {
        let recipe = recipe("benign", benign.source.clone(), forget.clone(), &benign.training);
        let results = train_one(config, target, recipe, context)?;
        over_steps(all, target, "benign", &results);
    }
    if let Some(rtt) = &settings.rtt {
        let lines = lines(forget)?;
        if lines.len() < rtt.folds {
            return Err(RunError::Refused(format!(
                "eval.attack.rtt.folds is {}, data.forget has {} samples",
                rtt.folds,
                lines.len()
            )));
        }
        let order = order(lines.len(), config.run.seed);
        let mut folds = Vec::new();
        for fold in 0..rtt.folds {
            let held_out: Vec<usize> = order.iter().copied().skip(fold).step_by(rtt.folds).collect();
            let rest: Vec<usize> = (0..lines.len()).filter(|at| !held_out.contains(at)).collect();
            let name = format!("rtt{fold}_{}", target.name);
            let folder = config.run.dir.join(FOLDER).join(format!("{name}_data"));
            let recipe = Recipe {
                name,
                train: write(&folder.join("train.jsonl"), forget, &lines, &rest, context)?,
                held_out: write(&folder.join("held_out.jsonl"), forget, &lines, &held_out, context)?,
                batch: rtt.batch,
                lr: rtt.lr,
                steps: None,
                epochs: Some(rtt.epochs),
                every: 0,
            };
            folds.push(train_one(config, target, recipe, context)?);
        }
        over_folds(all, target, &folds);
    }
    Ok(())
}

/// Trains one model and gives its evaluations, in the order of their steps. All ranks call it.
fn train_one(config: &Config, target: &Target, recipe: Recipe, context: &Context) -> Result<Vec<Evaluation>, RunError> {
    tracing::info!("attack {} on {}", recipe.name, target.folder.display());
    let mut made = config.clone();
    made.run.dir = config.run.dir.join(FOLDER).join(&recipe.name);
    made.model.path.clone_from(&target.folder);
    made.model.init = Init::Pretrained;
    made.method = Method::new(Objective::Finetune, Retain::None);
    made.data.train = Some(recipe.train);
    made.data.forget = Some(recipe.held_out);
    made.data.refusals = None;
    made.scope = Default::default();
    made.before = Default::default();
    made.train.steps = recipe.steps;
    made.train.epochs = recipe.epochs;
    made.train.global_batch = recipe.batch;
    made.optimizer = optimizer(recipe.lr);
    made.schedule = toml::from_str("name = 'constant'").expect("invariant: a constant rate is a schedule");
    made.checkpoint = config::Checkpoint { every: 0, resume: config::Resume::Never, ..Default::default() };
    made.eval = alone(&config.eval);
    (made.eval.before, made.eval.after, made.eval.every) = (true, true, Every::Steps(recipe.every));
    made.export = config::Export { model: false, ..Default::default() };
    // the same checks and defaults as for a file
    let made = config::from_str(&config::to_toml(&made), &format!("attack {}", recipe.name), &[])
        .map_err(|error| RunError::Refused(error.to_string()))?;
    let again = Context { overwrite: true, force_resume: false, ..context.clone() };
    match run(&made, again)? {
        Outcome::Stopped => Err(RunError::Refused(format!("attack {} was asked to stop", recipe.name))),
        Outcome::Finished(_) => {
            context.world.world.barrier();
            let files = Evaluation::files(&made.run.dir);
            let read = |path: &PathBuf| Evaluation::read(path).map_err(RunError::from);
            files.iter().map(read).collect()
        }
    }
}

fn optimizer(lr: f64) -> config::Optimizer {
    let table = format!("name = 'adamw'\nlr = {lr:?}\nweight_decay = 0.0");
    toml::from_str(&table).expect("invariant: these are an optimizer's keys")
}

/// A curve of all metrics over the steps, and the last values as metrics.
fn over_steps(all: &mut Gathered, target: &Target, attack: &str, results: &[Evaluation]) {
    let Some(last) = results.last() else { return };
    all.take(last, target, attack, |name| Some(name.to_owned()));
    let points = results.iter().map(|one| {
        let values = one.metrics.iter().map(|(name, metric)| (name.clone(), metric.value));
        let step = ("step".to_owned(), one.step.unwrap_or(0) as f64);
        values.chain([step]).collect::<BTreeMap<_, _>>()
    });
    let curve = Curve { x: "step".to_owned(), points: points.collect() };
    all.out(last).curves.insert(super::stem(attack, target), curve);
}

/// Of every metric the mean over the folds, before and after; a fold counts as many times as it has items.
fn over_folds(all: &mut Gathered, target: &Target, folds: &[Vec<Evaluation>]) {
    let ends: Vec<(&Evaluation, &Evaluation)> =
        folds.iter().filter_map(|fold| Some((fold.first()?, fold.last()?))).collect();
    let Some((first, _)) = ends.first() else { return };
    let names: Vec<String> = first.metrics.keys().cloned().collect();
    let mean = |of: &[Option<&Metric>]| -> Option<(f64, usize, Better)> {
        let known: Vec<&Metric> = of.iter().copied().collect::<Option<_>>()?;
        let n: usize = known.iter().map(|metric| metric.n).sum();
        let sum: f64 = known.iter().map(|metric| metric.value * metric.n as f64).sum();
        Some((sum / n as f64, n, known[0].better))
    };
    for name in &names {
        for (when, pick) in [("before.", 0), ("", 1)] {
            let of: Vec<Option<&Metric>> = ends
                .iter()
                .map(|(before, after)| if pick == 0 { before.metrics.get(name) } else { after.metrics.get(name) })
                .collect();
            if let Some((value, n, better)) = mean(&of) {
                all.put(first, target, "rtt", &format!("{when}{name}"), Metric::new(value, n, better));
            }
        }
    }
    let point = |(fold, (before, after)): (usize, &(&Evaluation, &Evaluation))| {
        let one = |when: &'static str, of: &Evaluation| {
            let values = of.metrics.iter().map(move |(name, metric)| (format!("{when}{name}"), metric.value));
            values.collect::<Vec<_>>()
        };
        let values = one("before.", before).into_iter().chain(one("", after));
        values.chain([("fold".to_owned(), fold as f64)]).collect::<BTreeMap<_, _>>()
    };
    let curve = Curve { x: "fold".to_owned(), points: ends.iter().enumerate().map(point).collect() };
    all.out(first).curves.insert(super::stem("rtt", target), curve);
}

/// The rows of a source, as they are.
fn lines(source: &Source) -> Result<Vec<Value>, RunError> {
    let all = rows(&source.path, source.split.as_deref())?.take(source.limit.unwrap_or(usize::MAX));
    Ok(all.map(|row| row.map(|row| row.value)).collect::<Result<_, _>>()?)
}

/// Writes some of the rows; gives the source that reads them. All ranks call it.
fn write(path: &Path, like: &Source, lines: &[Value], chosen: &[usize], context: &Context) -> Result<Source, RunError> {
    let folder = path.parent().expect("invariant: a file is in a folder");
    if context.world.is_first() {
        let text: String = chosen.iter().map(|&at| format!("{}\n", lines[at])).collect();
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(path, text))
            .map_err(|source| RunError::Write { path: path.to_owned(), source })?;
    }
    context.world.world.barrier();
    Ok(Source { path: path.to_owned(), split: None, limit: None, ..like.clone() })
}

/// Samples in an order that the seed gives.
fn order(count: usize, seed: u64) -> Vec<usize> {
    let draw = Stream::new(seed, "attack");
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&at| draw.bits(at as u64));
    order
}

/// The first of that order, at least one.
fn chosen(count: usize, fraction: f64, seed: u64) -> Vec<usize> {
    let most = ((count as f64 * fraction).round() as usize).clamp(1, count.max(1));
    order(count, seed).into_iter().take(most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_data_do_not_depend_on_the_order_of_asking() {
        let tenth = chosen(40, 0.1, 3);
        assert_eq!(tenth.len(), 4);
        assert!(chosen(40, 0.5, 3).starts_with(&tenth), "a larger part holds the smaller one");
        assert_ne!(chosen(40, 0.1, 4), tenth);
        assert_eq!(chosen(40, 1.0, 3).len(), 40);
        assert_eq!(chosen(3, 0.01, 3).len(), 1);
    }
}
