//! The verb `eval`: numbers of a model without training, and results side by side.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};

use super::arguments::{ProgressChoice, RunOptions};
use super::launch::Launched;
use super::run::{context, with_ranks};
use crate::config;
use crate::eval::compare::{differences, number, side_by_side};
use crate::eval::suites::Others;
use crate::eval::tradeoff::{Tradeoff, checkpoints};
use crate::eval::{Evaluation, record};
use crate::run::{self, EvaluateOptions};

/// Under a launcher the ranks share the work as in training.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, arg_required_else_help = true)]
pub(super) struct EvalOptions {
    /// Configuration file with [run], [model], [data], [eval] and, where ranks share the work, [parallel]
    #[arg(long, short, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    /// Override a key, e.g. --set model.path=runs/npo; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Name of the results in run.dir/eval; by default that of the model's folder
    #[arg(long)]
    label: Option<String>,
    /// As of a run: bars, plain lines, or nothing
    #[arg(long, value_enum, default_value_t = ProgressChoice::Auto)]
    progress: ProgressChoice,
    #[command(subcommand)]
    verb: Option<EvalVerb>,
}

#[derive(Debug, Subcommand)]
enum EvalVerb {
    /// Show the results of several runs side by side, with AUES and MU95 of their checkpoints
    Compare(CompareOptions),
}

#[derive(Debug, Args)]
struct CompareOptions {
    /// Run folders, or files of results such as RUN/eval/step_000120.json
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Show only metrics whose names hold this; may be given several times
    #[arg(long, value_name = "TEXT")]
    metric: Vec<String>,
    /// Show all evaluations of a run instead of its last
    #[arg(long)]
    all: bool,
}

pub(super) fn eval(options: &EvalOptions, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    match &options.verb {
        Some(EvalVerb::Compare(options)) => compare(options),
        None => with_ranks(launched, |ranks| {
            let path = options.config.as_ref().context("--config is missing")?;
            let config = config::evaluation_from_file(path, &options.set)?;
            let label = options.label.clone();
            if label.as_ref().is_some_and(|label| label.is_empty() || label.contains(['/', '\\'])) {
                bail!("--label names a file: expected a name without slashes");
            }
            let context = context(ranks, &config, &RunOptions::of_a_verb(options.progress), launched, started)?;
            let (evaluation, others) = tch::no_grad(|| run::evaluate(&config, &EvaluateOptions { label }, &context))?;
            if context.world.is_first() {
                print!("{}", beside(&evaluation, &others));
                let file = config.run.dir.join(record::FOLDER).join(format!("{}.json", evaluation.label));
                println!("numbers: {}", file.display());
            }
            Ok(())
        }),
    }
}

/// The evaluation, and the same metrics of the models that it is compared with.
fn beside(evaluation: &Evaluation, others: &Others) -> String {
    let columns = [
        (evaluation.label.as_str(), Some(evaluation)),
        ("original", others.original.as_ref()),
        ("retrained", others.retrained.as_ref()),
        ("reference", others.reference.as_ref()),
    ];
    let there: Vec<(String, &Evaluation)> =
        columns.into_iter().filter_map(|(name, one)| Some((name.to_owned(), one?))).collect();
    side_by_side(&there, |_| true)
}

fn compare(options: &CompareOptions) -> anyhow::Result<()> {
    let mut found: Vec<(String, Evaluation)> = Vec::new();
    for path in &options.runs {
        if path.is_file() {
            found.push((path.display().to_string(), Evaluation::read(path)?));
            continue;
        }
        let files = Evaluation::files(path);
        if files.is_empty() {
            bail!("{}: no results in its folder eval; run `dunlearn eval` or a run with [eval]", path.display());
        }
        let shown = if options.all { &files[..] } else { &files[files.len() - 1..] };
        for file in shown {
            let evaluation = Evaluation::read(file)?;
            found.push((column(path, &evaluation, options), evaluation));
        }
    }
    let columns: Vec<(String, &Evaluation)> = found.iter().map(|(name, one)| (name.clone(), one)).collect();
    let keep = |name: &str| options.metric.is_empty() || options.metric.iter().any(|text| name.contains(text.as_str()));
    print!("{}", side_by_side(&columns, keep));
    for warning in differences(&columns) {
        println!("warning: {warning}");
    }
    for path in options.runs.iter().filter(|path| path.is_dir()) {
        let tradeoff = Tradeoff::of(&checkpoints(path)?);
        if tradeoff.steps.len() < 2 {
            continue;
        }
        let words = |value: &Result<f64, String>| match value {
            Ok(value) => number(*value),
            Err(reason) => format!("not computed ({reason})"),
        };
        let (aues, mu95) = (words(&tradeoff.aues), words(&tradeoff.mu95));
        println!("{}: over {} checkpoints AUES {aues}, MU95 {mu95}", path.display(), tradeoff.steps.len());
    }
    Ok(())
}

fn column(run: &Path, evaluation: &Evaluation, options: &CompareOptions) -> String {
    let name = run.file_name().map_or_else(|| run.display().to_string(), |name| name.to_string_lossy().into_owned());
    if options.all { format!("{name} {}", evaluation.label.trim_start_matches("step_")) } else { name }
}
