//! The verb `weights`: arithmetic on models and task matrices on disk.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::arguments::{ProgressChoice, RunOptions, size, word};
use super::launch::Launched;
use super::run::{Ranks, context, set_threads, with_ranks};
use crate::checkpoint::Folder;
use crate::config::{self, Config, ExportDtype, Mode, Side};
use crate::dist::World;
use crate::run::{Calibrated, Calibration, Mixture, calibrate};
use crate::telemetry::table;
use crate::weights::{self, Discrimination, MatrixReport, Output, Start, SubspaceOptions};

/// Deadline of a wait for ranks that read, compute and write.
const TIMEOUT: Duration = Duration::from_secs(4 * 3600);

#[derive(Debug, Subcommand)]
pub(super) enum WeightsVerb {
    /// Write what training has moved, TUNED - START, as task matrices: f32 tensors by Hugging Face name
    Difference {
        tuned: PathBuf,
        start: PathBuf,
        /// Tensors by name, `*` standing for anything; may be given several times
        #[arg(long, value_name = "PATTERN", default_value = "*_proj.weight")]
        tensors: Vec<String>,
        #[command(flatten)]
        to: To,
    },
    /// Write task matrices without what they share with those of similar tasks (UNLEARN's discrimination)
    Discriminate(DiscriminateOptions),
    /// Write MODEL + STRENGTH x TASK: a strength below 0 unlearns a task, one above 0 learns it
    Add {
        model: PathBuf,
        task: PathBuf,
        #[arg(long, allow_negative_numbers = true)]
        strength: f64,
        #[command(flatten)]
        to: ToModel,
    },
    /// Mix the models of runs with the one before until each has kept enough of a set (UWC): what have they forgotten at the same price?
    Calibrate(CalibrateOptions),
    /// Write the model between MODEL (share 0) and OTHER (share 1)
    Mix {
        model: PathBuf,
        other: PathBuf,
        #[arg(long)]
        share: f64,
        /// Tensors that are mixed; the others are MODEL's
        #[arg(long, value_name = "PATTERN", default_value = "*")]
        tensors: Vec<String>,
        #[command(flatten)]
        to: ToModel,
    },
}

/// Where a result goes.
#[derive(Debug, Args)]
pub(super) struct To {
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Largest weight file, such as 5GB or 500MiB
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "5GB")]
    max_shard_size: usize,
}

#[derive(Debug, Args)]
pub(super) struct ToModel {
    #[command(flatten)]
    to: To,
    /// As export.dtype: same, bf16, f16 or f32
    #[arg(long, default_value = "same", value_parser = word::<ExportDtype>)]
    dtype: ExportDtype,
}

#[derive(Debug, Args)]
pub(super) struct DiscriminateOptions {
    /// Folder of task matrices
    task: PathBuf,
    /// Those of a similar task; may be given several times
    #[arg(long, value_name = "DIR")]
    similar: Vec<PathBuf>,
    /// What counts as shared: projection, the part in the similar tasks' leading subspace; frobenius, that along their whole matrices
    #[arg(long, default_value = "projection", value_parser = word::<Mode>)]
    mode: Mode,
    /// Whose subspace a projection takes: input, of the rows; output, of the columns; or both
    #[arg(long, default_value = "input", value_parser = word::<Side>)]
    side: Side,
    /// Least share of the similar tasks' squared singular values that the subspace holds
    #[arg(long, default_value_t = 0.9)]
    energy: f64,
    /// Most directions of the subspace; trained matrices have full rank, and without a limit nothing would be left
    #[arg(long, default_value_t = 32)]
    max_rank: usize,
    /// Matrices whose smaller side is at most this are decomposed exactly, larger ones by a randomised method
    #[arg(long, default_value_t = 1024)]
    exact_limit: usize,
    /// Directions that the randomised method computes besides
    #[arg(long, default_value_t = 8)]
    oversampling: usize,
    /// Power iterations of the randomised method
    #[arg(long, default_value_t = 2)]
    power_iterations: usize,
    /// Of the randomised method
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    to: To,
}

#[derive(Debug, Args)]
pub(super) struct CalibrateOptions {
    /// Run folders: of each the model before is that of its config.toml, and its sets are evaluated
    #[arg(value_name = "RUN", required_unless_present = "config", conflicts_with = "config")]
    runs: Vec<PathBuf>,
    /// Configuration of one run, instead of its folder
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override a key of it, e.g. --set eval.max_samples=100; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The model after; by default what the run has written
    #[arg(long, value_name = "DIR", conflicts_with = "runs")]
    after: Option<PathBuf>,
    /// What is to be kept: a set by its name in summary.json
    #[arg(long, default_value = "retain")]
    of: String,
    /// Its number by name: probability, token_accuracy, extraction_strength (the paper's), ...
    #[arg(long, default_value = "probability")]
    metric: String,
    /// Share of that number before which is to be kept
    #[arg(long, default_value_t = 0.95)]
    keep: f64,
    /// Models that are evaluated, of each run
    #[arg(long, default_value_t = 10)]
    evaluations: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Folder to write the mixture to; of several runs none is written
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Largest weight file, such as 5GB or 500MiB
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "5GB", requires = "out")]
    max_shard_size: usize,
    /// As export.dtype: same, bf16, f16 or f32
    #[arg(long, default_value = "same", value_parser = word::<ExportDtype>, requires = "out")]
    dtype: ExportDtype,
}

pub(super) fn weights(verb: &WeightsVerb, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    with_ranks(launched, |ranks| {
        if let WeightsVerb::Calibrate(options) = verb {
            return calibrated(options, ranks, launched, started);
        }
        let world = ranks.world(1, None, TIMEOUT, launched)?;
        set_threads(0, &world)?;
        tch::no_grad(|| work(verb, &world))
    })
}

fn work(verb: &WeightsVerb, world: &World) -> anyhow::Result<()> {
    let target = match verb {
        WeightsVerb::Difference { to, .. } => to,
        WeightsVerb::Discriminate(options) => &options.to,
        WeightsVerb::Add { to, .. } | WeightsVerb::Mix { to, .. } => &to.to,
        WeightsVerb::Calibrate(_) => unreachable!("invariant: it has its own ranks"),
    };
    target.is_free()?;
    match verb {
        WeightsVerb::Difference { tuned, start, tensors, to } => {
            let (tuned, start) = (Folder::open(tuned)?, Folder::open(start)?);
            weights::difference(&tuned, &Start::Folder(&start), tensors, &to.output(None), world, || ())?;
        }
        WeightsVerb::Discriminate(options) => discriminate(options, world)?,
        WeightsVerb::Add { model, task, strength, to } => {
            if !strength.is_finite() {
                bail!("--strength is {strength}; expected a finite number");
            }
            weights::add(&Folder::open(model)?, &Folder::open(task)?, *strength, &to.output(), world, || ())?;
        }
        WeightsVerb::Calibrate(_) => unreachable!("invariant: it has its own ranks"),
        WeightsVerb::Mix { model, other, share, tensors, to } => {
            if !(0.0..=1.0).contains(share) {
                bail!("--share is {share}; expected a number from 0 to 1");
            }
            weights::mix(&Folder::open(model)?, &Folder::open(other)?, *share, tensors, &to.output(), world, || ())?;
        }
    }
    if world.is_first() {
        println!("{}", target.out.display());
    }
    Ok(())
}

/// A run and what was found of it.
#[derive(Serialize)]
struct CalibratedRun {
    run: PathBuf,
    #[serde(flatten)]
    found: Calibrated,
}

fn calibrated(options: &CalibrateOptions, ranks: &Ranks, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    let CalibrateOptions { of, metric, keep, evaluations, .. } = options;
    let to = options.out.as_ref().map(|out| {
        let to = To { out: out.clone(), max_shard_size: options.max_shard_size };
        ToModel { to, dtype: options.dtype }
    });
    if let Some(to) = &to {
        to.to.is_free()?;
        if options.runs.len() > 1 {
            bail!("--out: there are {} runs; calibrate the one whose mixture is wanted by itself", options.runs.len());
        }
    }
    if !(*keep > 0.0 && *keep <= 1.0) || *evaluations < 3 {
        bail!("expected --keep above 0 and at most 1, and --evaluations of at least 3");
    }
    let configs = configs(options)?;
    let after = |config: &Config| options.after.clone().unwrap_or_else(|| config.run.dir.join("model"));
    for config in &configs {
        Folder::open(&after(config))?;
    }
    let run = RunOptions::of_a_verb(ProgressChoice::None);
    let context = context(ranks, &configs[0], &run, launched, started)?;
    context.world.watchdog.set_deadline(TIMEOUT);
    let wish = Calibration { set: of.clone(), metric: metric.clone(), keep: *keep, evaluations: *evaluations };
    let mut all = Vec::new();
    for config in &configs {
        let after = after(config);
        tch::no_grad(|| -> anyhow::Result<()> {
            let found = calibrate(config, &after, &wish, &context)?;
            if let Some(to) = &to {
                let (after, before) = (Folder::open(&after)?, Folder::open(&config.model.path)?);
                let everything = ["*".to_owned()];
                weights::mix(&after, &before, found.share, &everything, &to.output(), &context.world, || ())?;
            }
            all.push(CalibratedRun { run: config.run.dir.clone(), found });
            Ok(())
        })?;
    }
    if context.world.is_first() {
        match (options.json, options.runs.is_empty(), all.as_slice()) {
            (true, true, [one]) => println!("{}", serde_json::to_string_pretty(&one.found)?),
            (true, ..) => println!("{}", serde_json::to_string_pretty(&all)?),
            (false, _, [one]) => tell(&one.found, options.out.as_deref()),
            (false, ..) => print!("{}", side_by_side(&all)),
        }
    }
    Ok(())
}

/// Of each run; one that is named by its folder lies there, wherever it was started.
fn configs(options: &CalibrateOptions) -> anyhow::Result<Vec<Config>> {
    if let Some(file) = &options.config {
        return Ok(vec![config::from_file(file, &options.set)?]);
    }
    let of = |run: &PathBuf| -> anyhow::Result<Config> {
        let mut config = config::from_file(&run.join("config.toml"), &options.set)?;
        config.run.dir = run.clone();
        Ok(config)
    };
    options.runs.iter().map(of).collect()
}

/// One run: the numbers of every mixture that was tried.
fn tell(found: &Calibrated, out: Option<&Path>) {
    let names: Vec<&String> =
        found.found().metrics.keys().filter(|name| name.ends_with(&format!(".{}", found.metric))).collect();
    let head: Vec<&str> =
        std::iter::once("share of the model before").chain(names.iter().map(|name| name.as_str())).collect();
    let mut tried: Vec<_> = found.tried.iter().collect();
    tried.sort_by(|a, b| a.share.total_cmp(&b.share));
    let rows = tried.iter().map(|mixture| {
        let here = if mixture.share == found.share { " *" } else { "" };
        let numbers = names.iter().map(|name| value(mixture, name));
        std::iter::once(format!("{:.4}{here}", mixture.share)).chain(numbers).collect()
    });
    print!("{}", table(&head, &rows.collect::<Vec<_>>()));
    let Calibrated { set, metric, before, bar, .. } = found;
    let written = out.map_or_else(String::new, |out| format!(": {}", out.display()));
    println!("* {set} {metric} at least {bar:.4}, of {before:.4} before{written}");
}

/// Several runs: how much of the model before each needed, and every set's number before, after and calibrated.
fn side_by_side(all: &[CalibratedRun]) -> String {
    let Some(CalibratedRun { found: first, .. }) = all.first() else { return String::new() };
    let rows = all.iter().flat_map(|CalibratedRun { run, found }| {
        let at = |share: f64| found.tried.iter().find(|mixture| mixture.share == share);
        let mixtures = [at(1.0), at(0.0), Some(found.found())];
        let ending = format!(".{}", first.metric);
        let sets =
            found.found().metrics.keys().filter_map(move |name| Some((name, name.strip_suffix(&ending)?.to_owned())));
        sets.map(move |(name, set)| {
            let numbers =
                mixtures.map(|mixture| mixture.map_or_else(|| "-".to_owned(), |mixture| value(mixture, name)));
            [run.display().to_string(), format!("{:.4}", found.share), set].into_iter().chain(numbers).collect()
        })
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let mut text = table(&["run", "share", "set", "before", "after", "calibrated"], &rows);
    let Calibrated { set, metric, before, bar, .. } = first;
    text += &format!(
        "{metric}; calibrated: with the least share of the model before that brings {set} to at least {bar:.4}\n"
    );
    for CalibratedRun { run, found } in all {
        if (found.before - before).abs() > 1e-6 {
            text += &format!(
                "{}: its {set} {metric} was {:.4} before, not {before:.4}: another model or other data; not the same price\n",
                run.display(),
                found.before
            );
        }
    }
    text
}

fn value(mixture: &Mixture, name: &str) -> String {
    mixture.metrics.get(name).map_or_else(|| "-".to_owned(), |metric| format!("{:.4}", metric.value))
}

fn discriminate(options: &DiscriminateOptions, world: &World) -> anyhow::Result<()> {
    if !(options.energy > 0.0 && options.energy <= 1.0) || options.max_rank == 0 {
        bail!("expected --energy above 0 and at most 1, and --max-rank of at least 1");
    }
    let how = Discrimination {
        mode: options.mode,
        side: options.side,
        basis: SubspaceOptions {
            energy: options.energy,
            max_rank: options.max_rank,
            exact_limit: options.exact_limit,
            oversampling: options.oversampling,
            power_iterations: options.power_iterations,
            seed: options.seed,
        },
    };
    let similar: Vec<Folder> = options.similar.iter().map(|path| Folder::open(path)).collect::<Result<_, _>>()?;
    let similar: Vec<&Folder> = similar.iter().collect();
    let reports =
        weights::discriminate(&Folder::open(&options.task)?, &similar, &how, &options.to.output(None), world, || ())?;
    if world.is_first() {
        let head = ["matrix", "norm", "kept", "input", "output", "energy", "error", ""];
        print!("{}", table(&head, &reports.iter().map(row).collect::<Vec<_>>()));
    }
    Ok(())
}

fn row(report: &MatrixReport) -> Vec<String> {
    let MatrixReport { name, norm, kept, input_rank, output_rank, energy, error, exact } = report;
    let share = 100.0 * kept / norm.max(1e-300);
    vec![
        name.clone(),
        format!("{norm:.3e}"),
        format!("{share:.1} %"),
        input_rank.to_string(),
        output_rank.to_string(),
        format!("{energy:.3}"),
        format!("{error:.0e}"),
        if *exact { "exact" } else { "randomised" }.to_owned(),
    ]
}

impl To {
    fn is_free(&self) -> anyhow::Result<()> {
        if self.out.exists() {
            bail!("{} exists; choose another --out, or move it away", self.out.display());
        }
        Ok(())
    }

    fn output(&self, kind: Option<tch::Kind>) -> Output<'_> {
        Output { target: &self.out, kind, max_shard_bytes: self.max_shard_size }
    }
}

impl ToModel {
    fn output(&self) -> Output<'_> {
        self.to.output(match self.dtype {
            ExportDtype::Same => None,
            ExportDtype::Bf16 => Some(tch::Kind::BFloat16),
            ExportDtype::F16 => Some(tch::Kind::Half),
            ExportDtype::F32 => Some(tch::Kind::Float),
        })
    }
}
