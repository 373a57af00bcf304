//! The verb `attack`: tries to bring back what the model of a run has forgotten.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use clap::Args;

use super::arguments::{ProgressChoice, RunOptions};
use super::launch::Launched;
use super::run::{context, with_ranks};
use crate::config;
use crate::eval::compare::side_by_side;
use crate::eval::{Evaluation, record};
use crate::run::attack::{self, AttackOptions};

/// Needs a run that exported its model, or --model. Under a launcher the ranks share the work as in training.
#[derive(Debug, Args)]
pub(super) struct AttackArguments {
    /// The run's configuration, with a table [eval.attack]
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,
    /// Override a key, e.g. --set eval.attack.in_context=4; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Model to attack; by default run.dir/model
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Show metrics whose names hold this instead of the usual few; may be given several times
    #[arg(long, value_name = "TEXT")]
    metric: Vec<String>,
    /// As of a run: bars, plain lines, or nothing
    #[arg(long, value_enum, default_value_t = ProgressChoice::Auto)]
    progress: ProgressChoice,
}

pub(super) fn attack(options: &AttackArguments, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    with_ranks(launched, |ranks| {
        let config = config::evaluation_from_file(&options.config, &options.set)?;
        if config.eval.attack.is_none() {
            bail!("{}: no table [eval.attack]; write one, it may be empty", options.config.display());
        }
        let context = context(ranks, &config, &RunOptions::of_a_verb(options.progress), launched, started)?;
        let how = AttackOptions { model: options.model.clone() };
        let out = tch::no_grad(|| attack::attack(&config, &how, &context))?;
        if context.world.is_first() {
            print!("{}", beside(&out, &options.metric));
            let file = config.run.dir.join(record::FOLDER).join(format!("{}.json", out.label));
            println!("numbers and curves: {}", file.display());
        }
        context.world.world.barrier();
        Ok(())
    })
}

/// What a reader looks at first.
const USUAL: [&str; 5] =
    [".forget.probability", ".forget.extraction_strength", ".forget.token_accuracy", ".retain.probability", ".score"];

/// A line an attack and metric, a column a model.
fn beside(out: &Evaluation, metrics: &[String]) -> String {
    let mut columns = BTreeMap::<usize, (String, Evaluation)>::new();
    for (name, metric) in &out.metrics {
        let mut parts: Vec<&str> = name.splitn(4, '.').collect();
        let place = match parts.get(2) {
            Some(&"original") => 1,
            Some(&"retrained") => 2,
            _ => 0,
        };
        if place > 0 {
            parts.remove(2);
        }
        let title = ["unlearned", "original", "retrained"][place].to_owned();
        let empty = || (title, Evaluation { metrics: BTreeMap::new(), ..out.clone() });
        let (_, column) = columns.entry(place).or_insert_with(empty);
        column.metrics.insert(parts.join("."), metric.clone());
    }
    let columns: Vec<(String, &Evaluation)> = columns.values().map(|(name, one)| (name.clone(), one)).collect();
    side_by_side(&columns, |name| match metrics {
        [] => USUAL.iter().any(|usual| name.ends_with(usual)),
        wanted => wanted.iter().any(|text| name.contains(text.as_str())),
    })
}
