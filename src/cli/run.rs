//! The verb `run`: configuration, ranks, threads and logs, then [`crate::run`].

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::arguments::{LogChoice, ProgressChoice, RunOptions};
use super::ending;
use super::launch::Launched;
use crate::abi::host;
use crate::config::{self, Device, Dp};
use crate::dist::{Mesh, Watchdog, World};
use crate::run::{self, Context};
use crate::telemetry::{Console, LogFormat, ProgressMode, start_log};

pub(super) fn run(options: &RunOptions, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    with_ranks(launched, |ranks| run_on(ranks, options, launched, started))
}

/// Starts the ranks and runs `body`. An error ends the whole job here, while MPI is up: finalising it would wait for ranks
/// that are still at work.
pub(super) fn with_ranks(launched: &Launched, body: impl FnOnce(&Ranks) -> anyhow::Result<()>) -> anyhow::Result<()> {
    host::keep_freed_memory();
    ending::on_panic_end_the_job(launched.rank);
    let ranks = Ranks::start(launched)?;
    if let Err(error) = body(&ranks) {
        ending::end_job(launched.rank, &format!("{error:#}"));
    }
    Ok(())
}

fn run_on(ranks: &Ranks, options: &RunOptions, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    let path = options.config.as_ref().context("--config is missing")?;
    let config = config::from_file(path, &options.set)?;
    if config.run.device == Device::Cuda {
        bail!("run.device: \"cuda\" is not built in this version; write \"cpu\" or \"auto\"");
    }
    let dp = match config.parallel.dp {
        Dp::Auto => None,
        Dp::Ranks(n) => Some(n),
    };
    let world = ranks.world(config.parallel.tp, dp, Duration::from_secs(config.run.timeout), launched)?;
    set_threads(config.run.threads, &world)?;
    let console = Console::new(progress_mode(options.progress, launched.rank));
    let format = match options.log_format {
        LogChoice::Text => LogFormat::Text,
        LogChoice::Json => LogFormat::Json,
    };
    let log = start_log(world.mesh.rank, world.mesh.world(), format, &console);
    let (overwrite, fault, mpi_version) = (options.overwrite, options.fault, ranks.version());
    let context = Context { world, console, log, started, overwrite, mpi_version, fault };
    let summary = tch::no_grad(|| run::run(&config, context));
    summary.map(drop).map_err(Into::into)
}

/// The ranks of the job, for as long as it runs.
pub(super) enum Ranks {
    Solo,
    #[cfg(feature = "mpi")]
    Mpi(crate::abi::mpi::Environment),
}

impl Ranks {
    pub(super) fn start(launched: &Launched) -> anyhow::Result<Self> {
        if !launched.by_mpi && launched.world > 1 {
            bail!(
                "srun started {} tasks that know nothing of each other; use `srun --mpi=pmix` or mpirun inside the job",
                launched.world
            );
        }
        if !launched.by_mpi {
            return Ok(Self::Solo);
        }
        ending::with_the_launcher(launched.rank);
        #[cfg(feature = "mpi")]
        return Ok(Self::Mpi(crate::abi::mpi::initialise().context("MPI was initialised before")?));
        #[cfg(not(feature = "mpi"))]
        if launched.world == 1 {
            Ok(Self::Solo)
        } else {
            bail!("this dunlearn was built without MPI (--no-default-features) and runs one rank only")
        }
    }

    /// The groups of the job, watched by a thread that ends the process when a collective outlasts `timeout`.
    pub(super) fn world(
        &self,
        tp: usize,
        dp: Option<usize>,
        timeout: Duration,
        launched: &Launched,
    ) -> anyhow::Result<World> {
        match self {
            Self::Solo => {
                Mesh::new(0, 1, tp, dp)?;
                Ok(World::solo())
            }
            #[cfg(feature = "mpi")]
            Self::Mpi(environment) => {
                let watchdog = Watchdog::new(timeout);
                let rank = launched.rank;
                watchdog.start(move |message| ending::on_timeout(rank, message));
                Ok(crate::dist::mpi_world(environment, tp, dp, watchdog)?)
            }
        }
    }

    fn version(&self) -> Option<String> {
        match self {
            Self::Solo => None,
            #[cfg(feature = "mpi")]
            Self::Mpi(_) => Some(crate::abi::mpi::library_version()),
        }
    }
}

fn progress_mode(choice: ProgressChoice, rank: usize) -> ProgressMode {
    match choice {
        _ if rank > 0 => ProgressMode::Silent,
        ProgressChoice::Auto if host::stderr_is_terminal() => ProgressMode::Bar,
        ProgressChoice::Bar => ProgressMode::Bar,
        ProgressChoice::Auto | ProgressChoice::Plain => ProgressMode::Plain,
        ProgressChoice::None => ProgressMode::Silent,
    }
}

/// Threads of this rank; 0: an even share of the host's cores.
pub(super) fn set_threads(threads: usize, world: &World) -> anyhow::Result<()> {
    let threads = if threads == 0 { (num_cores() / world.local_size).max(1) } else { threads };
    tch::set_num_threads(i32::try_from(threads)?);
    Ok(())
}

fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
