//! The verb `doctor`: examines before a run, and lays the flight records of one that went wrong beside each other.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};

use super::arguments::{size, word};
use super::device;
use super::ending;
use super::launch::Launched;
use super::run::{Ranks, set_threads, with_ranks};
use crate::abi::nccl;
use crate::config;
use crate::dist::{Dump, Failed, parting, report};
use crate::doctor::{Facts, Options, Verdict, examine};
use crate::telemetry::table;

/// Start it as you would start the run: alone, under mpirun or under srun.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct DoctorOptions {
    #[command(subcommand)]
    verb: Option<DoctorVerb>,
    /// Folder on the file system that runs will use; a configuration's run.dir
    #[arg(default_value = "runs", value_name = "DIR")]
    folder: PathBuf,
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// As run.device: auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = word::<config::Device>)]
    device: config::Device,
    /// Let several ranks share a GPU
    #[arg(long)]
    allow_shared_gpu: bool,
    /// What each rank writes to the folder
    #[arg(long, default_value = "64MiB", value_name = "SIZE", value_parser = size)]
    file_size: usize,
    /// Largest all-reduce
    #[arg(long, default_value = "64MiB", value_name = "SIZE", value_parser = size)]
    link_size: usize,
    /// Deadline of one wait for the other ranks, in seconds
    #[arg(long, default_value_t = 120)]
    timeout: u64,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum DoctorVerb {
    /// Lay the flight records of a run's ranks beside each other: which rank and which collective went wrong
    Flight {
        /// Run folder, or a folder of records
        run: PathBuf,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn doctor(options: &DoctorOptions, launched: &Launched) -> anyhow::Result<()> {
    match &options.verb {
        Some(DoctorVerb::Flight { run, json }) => flight(run, *json),
        None => with_ranks(launched, |ranks| examine_on(ranks, options, launched)),
    }
}

fn examine_on(ranks: &Ranks, options: &DoctorOptions, launched: &Launched) -> anyhow::Result<()> {
    let timeout = Duration::from_secs(options.timeout);
    let world = ranks.world(options.tp, None, timeout, launched)?;
    set_threads(0, &world)?;
    let mut facts = Facts::look(world.mesh.rank, launched.world, std::env::vars());
    facts.mpi = ranks.version();
    let device::Chosen { world, device, about } =
        device::choose(options.device, options.allow_shared_gpu, world, timeout)?;
    if device != tch::Device::Cpu {
        facts.nccl = nccl::Nccl::load().ok().map(nccl::Nccl::version_text);
    }
    let examination = Options {
        folder: options.folder.clone(),
        file_bytes: options.file_size,
        link_bytes: options.link_size,
        device,
        about_device: about,
    };
    let report = tch::no_grad(|| examine(&facts, &examination, &world));
    if world.is_first() {
        if options.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", report.text());
        }
    }
    world.world.barrier();
    if report.verdict == Verdict::Fail {
        bail!("some checks fail; see the table");
    }
    Ok(())
}

fn flight(run: &Path, json: bool) -> anyhow::Result<()> {
    let inside = run.join("flight");
    let folder = if inside.is_dir() { inside } else { run.to_owned() };
    let dumps = Dump::read_all(&folder).map_err(anyhow::Error::msg)?;
    let Some(first) = dumps.first() else {
        bail!(
            "{} holds no flight record; ranks leave them when a job goes wrong, or on SIGUSR2 and a file DUMP in the run folder",
            folder.display()
        );
    };
    let (world, failed) = (first.world, Failed::read(&folder));
    let found = parting(&dumps);
    if json {
        let missing: Vec<usize> = (0..world).filter(|rank| dumps.iter().all(|dump| dump.rank != *rank)).collect();
        let object =
            serde_json::json!({ "ranks": world, "missing": missing, "first_to_fail": failed, "parting": found });
        println!("{}", serde_json::to_string_pretty(&object)?);
    } else {
        print!("{}", report(&dumps, world, failed.as_ref(), table));
    }
    if found.is_some() || dumps.len() < world {
        ending::answer_no();
    }
    Ok(())
}
