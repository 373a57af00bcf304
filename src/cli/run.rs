//! The verb `run`: configuration, ranks, threads and logs, then [`crate::run`].

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::arguments::{LogChoice, ProgressChoice, RunOptions};
use super::device;
use super::ending;
use super::launch::Launched;
use super::report;
use crate::abi::{host, signals};
use crate::config::{self, Config, Dp};
use crate::dist::{Mesh, Peers, Watchdog, World, tcp_world};
use crate::launch::{NOTES, Notes, binding};
use crate::run::{self, Context, MemoryWords, Outcome};
use crate::telemetry::{Board, Console, LogFormat, ProgressMode, RunState, serve, start_log};

pub(super) fn run(options: &RunOptions, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    // before anything else: a signal that comes early is a request too
    signals::note_requests();
    with_ranks(launched, |ranks| run_on(ranks, options, launched, started))
}

/// Where a supervisor wants to hear of its ranks.
fn notes() -> Option<Notes> {
    std::env::var_os(NOTES).map(|folder| Notes::new(Path::new(&folder)))
}

/// Starts the ranks and runs `body`. An error ends the whole job here, while MPI is up: finalising it would wait for ranks
/// that are still at work.
pub(super) fn with_ranks(launched: &Launched, body: impl FnOnce(&Ranks) -> anyhow::Result<()>) -> anyhow::Result<()> {
    host::keep_freed_memory();
    ending::on_panic_end_the_job(launched.rank);
    if let Some(notes) = notes() {
        ending::leave_notes(&notes);
    }
    let ranks = Ranks::start(launched)?;
    if let Err(error) = body(&ranks) {
        ending::end_job(launched.rank, &ending::in_words(&error));
    }
    ending::within(launched.rank, PARTING, "all is done, but the other ranks did not end", || drop(ranks));
    Ok(())
}

fn run_on(ranks: &Ranks, options: &RunOptions, launched: &Launched, started: Instant) -> anyhow::Result<()> {
    let path = options.config.as_ref().context("--config is missing")?;
    let config = config::from_file(path, &options.set)?;
    let context = context(ranks, &config, options, launched, started)?;
    let is_first = context.world.is_first();
    if let Some(notes) = notes().filter(|_| launched.rank == 0) {
        // all ranks have met in `context`: each of them takes signals by now
        notes.say_ready();
    }
    signals::note_record_requests();
    match tch::no_grad(|| run::run(&config, context))? {
        Outcome::Finished(_) => {
            if is_first {
                report::after_run(&config.run.dir);
            }
            Ok(())
        }
        Outcome::Stopped => ending::to_be_continued(),
    }
}

/// The ranks' groups, device, threads and log for a configuration. All ranks call it.
pub(super) fn context(
    ranks: &Ranks,
    config: &Config,
    options: &RunOptions,
    launched: &Launched,
    started: Instant,
) -> anyhow::Result<Context> {
    let dp = match config.parallel.dp {
        Dp::Auto => None,
        Dp::Ranks(n) => Some(n),
    };
    let timeout = Duration::from_secs(config.run.timeout);
    let world = ranks.world(config.parallel.tp, dp, timeout, launched)?;
    set_threads(config.run.threads, &world)?;
    let chosen = device::choose(config.run.device, config.run.allow_shared_gpu, world, timeout)?;
    let format = match options.log_format {
        LogChoice::Text => LogFormat::Text,
        LogChoice::Json => LogFormat::Json,
    };
    let device::Chosen { world, device, about } = chosen;
    let console = Console::new(progress_mode(options.progress, launched.rank, format));
    let log = start_log(world.mesh.rank, world.mesh.world(), format, &console);
    let (overwrite, force_resume) = (options.overwrite, options.force_resume);
    let (fault, mpi_version) = (options.fault, ranks.version());
    let memory_words = MemoryWords::default();
    ending::explain_memory(&memory_words);
    let board = Board::default();
    tell_status(options, config, &board, world.is_first())?;
    let (watchdog, told) = (world.watchdog.clone(), board.clone());
    ending::tell_first(move |why| {
        watchdog.fail(why);
        told.end(RunState::Failed, Some(why));
    });
    Ok(Context {
        memory_words,
        board,
        world,
        device,
        about_device: about,
        console,
        log,
        started,
        overwrite,
        force_resume,
        mpi_version,
        launch: notes().map(|notes| notes.id()),
        fault,
    })
}

/// How long ranks wait for each other at the start.
const GATHERING: Duration = Duration::from_secs(300);
/// How long ranks wait for each other when all is done.
const PARTING: Duration = Duration::from_secs(60);

/// Tells the status over HTTP, on the first rank, where that is asked for.
fn tell_status(options: &RunOptions, config: &Config, board: &Board, first: bool) -> anyhow::Result<()> {
    let address = options.status_addr.as_ref().or(config.run.status_addr.as_ref());
    if let Some(address) = address.filter(|_| first) {
        let address = serve(address, board).map_err(anyhow::Error::msg)?;
        tracing::info!("status: http://{address}/status.json, http://{address}/metrics");
        board.update(|status| status.address = Some(address.to_string()));
    }
    Ok(())
}

/// The ranks of the job, for as long as it runs.
pub(super) enum Ranks {
    Solo,
    Tcp(Rc<Peers>),
    #[cfg(feature = "mpi")]
    Mpi(crate::abi::mpi::Environment),
}

impl Ranks {
    pub(super) fn start(launched: &Launched) -> anyhow::Result<Self> {
        if let Some(meeting) = &launched.meeting {
            ending::with_the_launcher(launched.rank);
            let rank = launched.rank;
            let on_loss = move |peer| ending::on_loss(rank, peer);
            return Peers::connect(meeting, GATHERING, on_loss).map(Self::Tcp).map_err(Into::into);
        }
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
        {
            let start = || crate::abi::mpi::initialise().context("MPI was initialised before");
            let environment =
                ending::within(launched.rank, GATHERING, "MPI has not brought the ranks together", start)?;
            let size = environment.size();
            if size != launched.world && launched.world > 1 {
                bail!(
                    "the launcher started {} processes, but in {} {size} of them know of each other: start dunlearn with that library's own \
                     mpirun, with `srun --mpi=pmix`, or build it with the launcher's MPICC",
                    launched.world,
                    crate::abi::mpi::library_version()
                );
            }
            Ok(Self::Mpi(environment))
        }
        #[cfg(not(feature = "mpi"))]
        if launched.world == 1 {
            Ok(Self::Solo)
        } else {
            bail!("this dunlearn was built without MPI (--no-default-features) and runs one rank only")
        }
    }

    /// The groups of the job, watched by a thread that ends the process when a wait outlasts `timeout`.
    pub(super) fn world(
        &self,
        tp: usize,
        dp: Option<usize>,
        timeout: Duration,
        launched: &Launched,
    ) -> anyhow::Result<World> {
        let watchdog = || {
            let watchdog = Watchdog::new(timeout);
            let rank = launched.rank;
            watchdog.start(move |alarm| ending::on_alarm(rank, &alarm));
            watchdog
        };
        match self {
            Self::Solo => {
                Mesh::new(0, 1, tp, dp)?;
                Ok(World { watchdog: watchdog(), ..World::solo() })
            }
            Self::Tcp(peers) => Ok(tcp_world(peers, tp, dp, watchdog())?),
            #[cfg(feature = "mpi")]
            Self::Mpi(environment) => Ok(crate::dist::mpi_world(environment, tp, dp, watchdog())?),
        }
    }

    /// Of the MPI library, where there is one.
    pub(super) fn version(&self) -> Option<String> {
        match self {
            Self::Solo | Self::Tcp(_) => None,
            #[cfg(feature = "mpi")]
            Self::Mpi(_) => Some(crate::abi::mpi::library_version()),
        }
    }
}

/// Under mpirun standard error is a pipe, whatever lies behind it: `DUNLEARN_PROGRESS=bar` says that it is a terminal.
pub(super) fn progress_mode(choice: ProgressChoice, rank: usize, format: LogFormat) -> ProgressMode {
    let terminal =
        || host::stderr_is_terminal() || std::env::var("DUNLEARN_PROGRESS").is_ok_and(|choice| choice == "bar");
    match choice {
        _ if rank > 0 => ProgressMode::Silent,
        ProgressChoice::None => ProgressMode::Silent,
        _ if format == LogFormat::Json => ProgressMode::Events,
        ProgressChoice::Bar => ProgressMode::Bar,
        ProgressChoice::Auto if terminal() => ProgressMode::Bar,
        ProgressChoice::Auto | ProgressChoice::Plain => ProgressMode::Plain,
    }
}

/// Threads of this rank; 0: what `OMP_NUM_THREADS` says, or else this rank's fair share of the cores that the launcher left to
/// it. With `DUNLEARN_BIND=core` (of `dunlearn launch`) ranks that nobody has bound share the host's cores out among
/// themselves. All ranks call it.
pub(super) fn set_threads(threads: usize, world: &World) -> anyhow::Result<()> {
    let asked = std::env::var("OMP_NUM_THREADS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let mine = host::allowed_cores();
    let name = sysinfo::System::host_name().unwrap_or_default();
    let words: Vec<String> = mine.iter().map(usize::to_string).collect();
    let all = world.world.gather_bytes(format!("{name}\n{}", words.join(" ")).as_bytes());
    let neighbours = all.iter().enumerate().filter_map(|(rank, bytes)| {
        let (host, cores) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
        (host == name).then(|| (rank, cores.split(' ').filter_map(|core| core.parse().ok()).collect::<Vec<usize>>()))
    });
    let (ranks, neighbours): (Vec<usize>, Vec<Vec<usize>>) = neighbours.unzip();
    let mut fair = share(&mine, &neighbours);
    let may_bind = std::env::var("DUNLEARN_BIND").is_ok_and(|what| what == "core");
    if may_bind && neighbours.iter().all(|cores| *cores == mine) {
        let index = ranks.iter().position(|&rank| rank == world.mesh.rank).unwrap_or(0);
        if let Some((cpus, cores)) = binding::share(&binding::topology(&mine), index, ranks.len())
            && host::bind(&cpus)
        {
            fair = cores;
        }
    }
    let threads = [threads, asked, fair].into_iter().find(|&n| n > 0).unwrap_or(1);
    tch::set_num_threads(i32::try_from(threads)?);
    Ok(())
}

/// Cores of `mine`, each divided by the ranks of the host that may run on it; 1 where nothing is known.
fn share(mine: &[usize], host: &[Vec<usize>]) -> usize {
    let part = |core: &usize| 1.0 / host.iter().filter(|cores| cores.contains(core)).count().max(1) as f64;
    // a sum of thirds may fall short of a whole by a rounding
    ((mine.iter().map(part).sum::<f64>() + 1e-9) as usize).max(1)
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn cores_are_shared_among_the_ranks_that_see_them() {
        let cores = |range: std::ops::Range<usize>| range.collect::<Vec<_>>();
        // unbound: all ranks see all cores
        assert_eq!(share(&cores(0..16), &vec![cores(0..16); 4]), 4);
        assert_eq!(share(&cores(0..2), &vec![cores(0..2); 16]), 1);
        // bound by the launcher: each rank has its own
        let bound: Vec<_> = (0..4).map(|rank| cores(rank * 8..rank * 8 + 8)).collect();
        assert_eq!(share(&bound[1], &bound), 8);
        // two NUMA nodes with two ranks each
        let nodes = [cores(0..6), cores(0..6), cores(6..12), cores(6..12)];
        assert_eq!(share(&nodes[3], &nodes), 3);
        assert_eq!(share(&[], &[]), 1);
    }
}
