//! The verb `plan`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;

use super::launch::Launched;
use super::run::{Ranks, set_threads, with_ranks};
use crate::config::{self, Config, Dp};
use crate::data::{Dataset, Wanted};
use crate::dist::{Mesh, World};
use crate::model::{Architecture, families, published};
use crate::plan::{self, Assumed, Engine, Job, Machine, Plan, assumed};
use crate::run;
use crate::telemetry::table;
use crate::unlearn;

/// Needs no GPU and no weights: a folder with config.json, or a published name such as llama-3.1-70b as model.path, is enough.
#[derive(Debug, Args)]
pub(super) struct PlanOptions {
    /// Configuration file
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,
    /// Override a key, e.g. --set parallel.tp=4; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Device: h100-80g, h200, a100-80g, b200, `measured` (this machine's CPU, timed now), or a TOML file such as --gpu-file prints
    #[arg(long, default_value = "h100-80g", value_name = "NAME|FILE")]
    gpu: String,
    /// Print the numbers that stand for the device, to be changed and given as a file, and end
    #[arg(long)]
    gpu_file: bool,
    /// Nodes; by default as few as hold the ranks
    #[arg(long)]
    nodes: Option<usize>,
    #[arg(long, default_value_t = 8)]
    gpus_per_node: usize,
    /// Ranks, where neither parallel.dp nor --nodes says how many
    #[arg(long)]
    ranks: Option<usize>,
    /// Network of one device to other nodes: ib400, ib200, ib100, roce400, eth100, eth25, or a number of GB/s
    #[arg(long, value_name = "NAME|GB/S")]
    interconnect: Option<String>,
    /// Where data is absent: samples to forget (or to train on), and as many to retain as --retain-samples says
    #[arg(long, default_value_t = 400)]
    samples: usize,
    #[arg(long, default_value_t = 3600)]
    retain_samples: usize,
    /// Where data is absent: mean length of a sample, half of it up or down. Unit: tokens
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Where data is absent: share of a sample that is its answer
    #[arg(long, default_value_t = 0.6)]
    scored: f64,
    /// Table of layouts and recompute policies on as many ranks
    #[arg(long)]
    sweep: bool,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

pub(super) fn plan(options: &PlanOptions, launched: &Launched) -> anyhow::Result<()> {
    let plan = |ranks: &Ranks| tch::no_grad(|| planned(options, ranks, launched));
    // ranks that measure do so together
    if options.gpu == MEASURED { with_ranks(launched, plan) } else { plan(&Ranks::Solo) }
}

/// The machine that is not on a list.
const MEASURED: &str = "measured";

/// Longest that ranks wait for each other.
const TIMEOUT: Duration = Duration::from_secs(600);

fn planned(options: &PlanOptions, ranks: &Ranks, launched: &Launched) -> anyhow::Result<()> {
    let config = config::from_file(&options.config, &options.set)?;
    if config.method.objective.is_weight_space() {
        bail!(
            "{}: method.objective works on matrices, one after the other; plans are of runs that train the whole model",
            options.config.display()
        );
    }
    let arch = architecture(&config.model.path)?;
    let mut assumptions = Vec::new();
    let (anchors, retain) = sets(options, &config, &arch, &mut assumptions)?;
    let mesh = mesh(options, &config)?;
    let host = options.gpu == MEASURED;
    let world = match ranks {
        Ranks::Solo => World::solo(),
        ranks => ranks.world(mesh.tp, Some(mesh.dp), TIMEOUT, launched)?,
    };
    let machine = if host {
        set_threads(config.run.threads, &world)?;
        Machine::host(host_memory() / mesh.world() as f64, plan::base(&config, &arch, &world)?, None)
    } else {
        machine(options)?
    };
    if options.gpu_file {
        print!("{}", toml::to_string(&machine)?);
        return Ok(());
    }
    let engine = if host { Engine::HOST } else { Engine::GPU };
    let retain = retain.as_ref();
    let per_node = if host { mesh.world() } else { options.gpus_per_node };
    let job =
        Job { config: &config, arch: &arch, anchors: &anchors, retain, mesh, engine, machine: &machine, per_node };
    let mut timed = machine.clone();
    if host {
        timed.measured = Some(plan::measure(&job, &world, Duration::from_secs(3))?);
        if !world.is_first() {
            return Ok(());
        }
    }
    let job = Job { machine: &timed, ..job };
    if options.sweep {
        return sweep(&job, options);
    }
    let plan = job.plan()?;
    let suggestions = if plan.fits() { Vec::new() } else { plan::advice(&job) };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&plan.json(&assumptions, &suggestions))?);
    } else {
        print!("{}", plan.text(&assumptions));
    }
    if plan.fits() {
        return Ok(());
    }
    if !options.json {
        println!("\n{}", advised(&plan, &suggestions));
    }
    bail!(
        "the run needs {} on a rank and {} has {}",
        plan::gib(plan.peak.total()),
        machine.name,
        plan::gib(machine.memory_bytes())
    )
}

fn advised(plan: &Plan, suggestions: &[plan::Suggestion]) -> String {
    if suggestions.is_empty() {
        let legal: Vec<String> = plan.legal_tp.iter().map(usize::to_string).collect();
        return format!(
            "no four changes of one key each make it fit; parallel.tp may be {} for this model",
            legal.join(", ")
        );
    }
    let rows: Vec<Vec<String>> = suggestions.iter().map(plan::Suggestion::row).collect();
    table(&["what makes it fit, each line by itself", "peak", "a step", "ranks", "device hours", "price"], &rows)
}

/// tp x dp x policy on the ranks of the job.
fn sweep(job: &Job, options: &PlanOptions) -> anyhow::Result<()> {
    let base = config::to_toml(job.config);
    let world = job.mesh.world();
    let mut rows = Vec::new();
    let mut all = Vec::new();
    for tp in job.arch.legal_tp().into_iter().filter(|tp| world.is_multiple_of(*tp)) {
        for spread in [false, true].into_iter().filter(|spread| tp > 1 || !spread) {
            for recompute in ["none", "half_block"] {
                let dp = world / tp;
                let changes = [
                    format!("parallel.tp={tp}"),
                    format!("parallel.dp={dp}"),
                    format!("parallel.sequence_parallel={spread}"),
                    format!("train.recompute={recompute}"),
                ];
                let config = config::from_str(&base, "the configuration", &changes)?;
                let plan = Job { config: &config, mesh: Mesh { rank: 0, tp, dp }, ..*job }.plan()?;
                all.push(plan.json(&[], &[]));
                rows.push(vec![
                    format!("tp {tp} x dp {dp}"),
                    if spread { "sequence" } else { "" }.to_owned(),
                    recompute.to_owned(),
                    plan::gib(plan.peak.total()),
                    if plan.fits() { "fits" } else { "too much" }.to_owned(),
                    format!("{:.3}", plan.seconds.total()),
                    format!("{:.0}", plan.tokens / plan.seconds.total()),
                    format!("{:.1}", plan.device_hours()),
                ]);
            }
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let head = ["layout", "parallel", "recompute", "peak", "", "s/step", "tokens/s", "device hours"];
    print!("{}", table(&head, &rows));
    Ok(())
}

/// A folder's architecture, or a published one by the last part of the path.
pub(super) fn architecture(path: &Path) -> anyhow::Result<Architecture> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match published::architecture(&name).filter(|_| !path.join("config.json").exists()) {
        Some(arch) => Ok(arch?),
        None => Ok(families::read(path).with_context(|| {
            format!("model.path may also end in a published name: {}", published::names().join(", "))
        })?),
    }
}

/// The samples, as they are or as they are assumed.
fn sets(
    options: &PlanOptions,
    config: &Config,
    arch: &Architecture,
    assumptions: &mut Vec<String>,
) -> anyhow::Result<(Dataset, Option<Dataset>)> {
    let source = if config.method.objective.learns() { &config.data.train } else { &config.data.forget };
    let paths = source.iter().chain(&config.data.retain).map(|source| &source.path);
    let missing: Vec<String> = paths.filter(|path| !path.exists()).map(|path| path.display().to_string()).collect();
    if missing.is_empty() && config.model.path.join("tokenizer.json").exists() {
        let run::Sets { anchors, retain, .. } = run::sets(config)?;
        return Ok((anchors, retain));
    }
    if !(options.scored > 0.0 && options.scored <= 1.0) {
        bail!("--scored is {}; expected a share above 0 and not above 1", options.scored);
    }
    let PlanOptions { samples, retain_samples, length, scored, .. } = *options;
    let longest = config.data.max_length;
    let missing = if missing.is_empty() { "the tokenizer".to_owned() } else { missing.join(" and ") };
    assumptions.push(format!(
        "{missing} not found: {samples} samples (and {retain_samples} to retain) of {length} tokens on average, half of it up or down, {:.0} % of them answer; see --samples, --retain-samples, --length, --scored",
        100.0 * scored
    ));
    let (wanted, retain_wanted) = unlearn::wanted(&config.method);
    let set =
        |name, samples, wanted: Wanted| assumed(name, Assumed { samples, length, longest, scored }, arch.vocab, wanted);
    let retain = config.data.retain.as_ref().map(|_| set("retain", retain_samples, retain_wanted));
    Ok((set("forget", samples, wanted), retain))
}

fn mesh(options: &PlanOptions, config: &Config) -> anyhow::Result<Mesh> {
    let tp = config.parallel.tp;
    let asked = options.ranks.or(options.nodes.map(|nodes| nodes * options.gpus_per_node));
    let dp = match config.parallel.dp {
        Dp::Auto => None,
        Dp::Ranks(dp) => Some(dp),
    };
    let world = asked.unwrap_or(tp * dp.unwrap_or(1));
    Ok(Mesh::new(0, world, tp, dp)?)
}

fn machine(options: &PlanOptions) -> anyhow::Result<Machine> {
    let mut machine = match Machine::sheet(&options.gpu) {
        Some(machine) => machine,
        None => {
            let text = std::fs::read_to_string(&options.gpu).with_context(|| {
                format!("--gpu {}: neither a file nor one of {}, measured", options.gpu, plan::names().join(", "))
            })?;
            toml::from_str(&text).with_context(|| options.gpu.clone())?
        }
    };
    if let Some(name) = &options.interconnect {
        machine.network_gbs = match name.as_str() {
            "ib400" | "roce400" => 45.0,
            "ib200" => 22.5,
            "ib100" | "eth100" => 11.0,
            "eth25" => 2.8,
            number => number.parse().ok().filter(|&gbs| gbs > 0.0).with_context(|| {
                format!(
                    "--interconnect {number}: expected ib400, ib200, ib100, roce400, eth100, eth25 or a number of GB/s"
                )
            })?,
        };
    }
    Ok(machine)
}

/// Memory of this host, in bytes.
fn host_memory() -> f64 {
    let Ok(mut system) = sysinfo::System::new() else { return 0.0 };
    system.refresh_memory();
    system.total_memory() as f64
}
