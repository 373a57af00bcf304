//! The verb `weights`: arithmetic on models and task matrices on disk.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::{Args, Subcommand};

use super::arguments::{RunOptions, size, word};
use super::launch::Launched;
use super::run::{Ranks, prepare, set_threads, with_ranks};
use crate::checkpoint::Folder;
use crate::config::{self, ExportDtype, Mode, Side};
use crate::dist::World;
use crate::run::{Calibrated, Calibration, calibrate};
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
    /// Mix a run's model with the one before until it has kept enough of a set (UWC), and write that mixture
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
    /// Configuration of the run, such as RUN/config.toml: its model is the one before, its sets are evaluated
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,
    /// Override a key of it, e.g. --set eval.max_samples=100; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The model after; by default what the run has written
    #[arg(long, value_name = "DIR")]
    after: Option<PathBuf>,
    /// What is to be kept: a set by its name in summary.json
    #[arg(long, default_value = "retain")]
    of: String,
    /// Its number by name: probability or token_accuracy
    #[arg(long, default_value = "probability")]
    metric: String,
    /// Share of that number before which is to be kept
    #[arg(long, default_value_t = 0.95)]
    keep: f64,
    /// Models that are evaluated
    #[arg(long, default_value_t = 10)]
    evaluations: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    to: ToModel,
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
        WeightsVerb::Calibrate(options) => &options.to.to,
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

fn calibrated(options: &CalibrateOptions, ranks: &Ranks, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    let CalibrateOptions { of, metric, keep, evaluations, to, .. } = options;
    to.to.is_free()?;
    if !(*keep > 0.0 && *keep <= 1.0) || *evaluations < 3 {
        bail!("expected --keep above 0 and at most 1, and --evaluations of at least 3");
    }
    let config = config::from_file(&options.config, &options.set)?;
    let run = RunOptions::quiet(&options.config);
    let context = prepare(ranks, &run, &config, launched, started)?;
    context.world.watchdog.set_deadline(TIMEOUT);
    let after = options.after.clone().unwrap_or_else(|| config.run.dir.join("model"));
    let wish = Calibration { set: of.clone(), metric: metric.clone(), keep: *keep, evaluations: *evaluations };
    tch::no_grad(|| -> anyhow::Result<()> {
        let found = calibrate(&config, &after, &wish, &context)?;
        let (after, before) = (Folder::open(&after)?, Folder::open(&config.model.path)?);
        weights::mix(&after, &before, found.share, &["*".to_owned()], &to.output(), &context.world, || ())?;
        if context.world.is_first() {
            if options.json {
                println!("{}", serde_json::to_string_pretty(&found)?);
            } else {
                tell(&found, &to.to.out);
            }
        }
        Ok(())
    })
}

fn tell(found: &Calibrated, out: &Path) {
    let sets = &found.found().sets;
    let names: Vec<String> = sets.iter().map(|(name, _)| format!("{name} probability")).collect();
    let head: Vec<&str> =
        std::iter::once("share of the model before").chain(names.iter().map(String::as_str)).collect();
    let mut tried: Vec<_> = found.tried.iter().collect();
    tried.sort_by(|a, b| a.share.total_cmp(&b.share));
    let rows = tried.iter().map(|mixture| {
        let here = if mixture.share == found.share { " *" } else { "" };
        let numbers = mixture.sets.iter().map(|(_, scores)| format!("{:.4}", scores.probability));
        std::iter::once(format!("{:.4}{here}", mixture.share)).chain(numbers).collect()
    });
    print!("{}", table(&head, &rows.collect::<Vec<_>>()));
    let Calibrated { set, metric, before, bar, .. } = found;
    println!("* {set} {metric} at least {bar:.4}, of {before:.4} before: {}", out.display());
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
