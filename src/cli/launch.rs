//! The verb `launch`: ranks by the site's engine, under supervision, or as a batch job.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Parser, ValueEnum};

use super::arguments::{Arguments, RunOptions, Verb};
use crate::abi::host;
use crate::config::{self, Config, Dp, Resume};
pub(super) use crate::launch::Launched;
use crate::launch::{
    Allocation, Batch, Dialect, Engine, Flavour, Host, Job, Outlet, Plan, Policy, Stream, parse_hostfile, parse_hosts,
    quote, script, supervise,
};
use crate::model::families;
use crate::model::sharding::Table;

/// Ranks over the machines that are named, or over the Slurm job that this is called in, or on this machine.
#[derive(Debug, Args)]
pub(super) struct LaunchOptions {
    /// Number of ranks; by default all slots of the hosts, or what parallel.dp fixes
    #[arg(long, value_name = "N")]
    np: Option<usize>,
    /// Hosts and their slots, such as a:4,b:4 or node[01-04]:8
    #[arg(long, value_name = "LIST")]
    hosts: Option<String>,
    /// File with a host a line, `name slots=4` or `name:4`
    #[arg(long, value_name = "FILE", conflicts_with = "hosts")]
    hostfile: Option<PathBuf>,
    /// What starts the ranks; auto: mpirun, and srun where only that is there
    #[arg(long, value_enum, default_value_t = EngineWord::Auto)]
    engine: EngineWord,
    /// Program of the engine; by default MPIRUN, or the mpirun of the MPI library that dunlearn is linked to
    #[arg(long, value_name = "PATH")]
    program: Option<String>,
    /// A further argument for the engine; may be given several times
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    engine_arg: Vec<String>,
    /// A further variable for the ranks, NAME or NAME=VALUE; may be given several times
    #[arg(long, value_name = "VARIABLE")]
    env: Vec<String>,
    /// What the ranks say: as it is, or each line with its rank
    #[arg(long, value_enum, default_value_t = OutputWord::Plain)]
    output: OutputWord,
    /// Start again so often after failures that a retry can cure
    #[arg(long, value_name = "K", default_value_t = 0)]
    max_restarts: usize,
    /// Seconds before the first restart; doubled each time, 300 at most
    #[arg(long, value_name = "S", default_value_t = 10.0)]
    backoff: f64,
    /// Go on without hosts that are lost, down to so many
    #[arg(long, value_name = "N")]
    min_nodes: Option<usize>,
    /// Quiet seconds after which Open MPI's daemons ask whether the others are there; a lost host is noticed after 1.6 times that
    #[arg(long, value_name = "S", default_value_t = 10)]
    keepalive: u64,
    /// Seconds that the engine may go on after a rank has ended with an error
    #[arg(long, value_name = "S", default_value_t = 3.0, hide = true)]
    grace: f64,
    /// Write a batch script into the run folder and hand it to sbatch
    #[arg(long, requires = "nodes")]
    slurm: bool,
    /// Nodes of the batch job; --np ranks are spread over them
    #[arg(long, value_name = "N", requires = "slurm")]
    nodes: Option<usize>,
    /// Time limit of the batch job, as sbatch takes it
    #[arg(long, value_name = "TIME", requires = "slurm")]
    time: Option<String>,
    /// A further option of the batch job, such as --sbatch=--partition=gpu; may be given several times
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true, requires = "slurm")]
    sbatch: Vec<String>,
    /// Print what would be started, and start nothing
    #[arg(long)]
    dry_run: bool,
    /// What every rank gets: --config FILE and whatever else `dunlearn run` takes
    #[arg(last = true, required = true, value_name = "RUN")]
    run: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EngineWord {
    Auto,
    Mpirun,
    Srun,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OutputWord {
    Plain,
    Ranks,
}

/// Variables that ranks on other hosts get when they are set here; MPICH and srun hand over everything anyway.
const HANDED_ON: [&str; 7] = ["DUNLEARN_", "NCCL_", "UCX_", "FI_", "OMP_", "PYTORCH_", "RUST_LOG"];

pub(super) fn launch(options: &LaunchOptions) -> anyhow::Result<ExitCode> {
    let run = run_options(&options.run)?;
    let config = config::from_file(run.config.as_ref().context("--config is missing")?, &run.set)?;
    fits_the_model(&config)?;
    let allocation = Allocation::from_lookup(|name| std::env::var(name).ok())?;
    if options.slurm {
        return batch(options, &config);
    }
    let plan = plan(options, &config, allocation)?;
    if options.dry_run {
        println!("{}", plan.command(&plan.job, &config.run.dir.join("launch/START"), &plan.run));
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::from(supervise(&plan, &outlet(&config.run.dir)?)?))
}

/// The ranks' arguments as `dunlearn run` reads them.
fn run_options(words: &[String]) -> anyhow::Result<RunOptions> {
    let parsed = Arguments::try_parse_from(std::iter::once("dunlearn").chain(words.iter().map(String::as_str)));
    match parsed.map_err(|error| anyhow::anyhow!("behind `--`: {}", error.to_string().trim()))? {
        Arguments { verb: Some(Verb::Run(run)), .. } | Arguments { verb: None, run } => Ok(run),
        _ => bail!(
            "behind `--` stands what `dunlearn run` takes, such as --config FILE; other verbs run under mpirun itself"
        ),
    }
}

/// Refuses a tensor-parallel size that does not divide the model, before anything starts.
fn fits_the_model(config: &Config) -> anyhow::Result<()> {
    // a folder that is not there is the run's to tell of
    if config.model.path.join("config.json").exists() {
        let arch = families::read(&config.model.path)?;
        Table::new(&arch, config.parallel.tp, 0, config.parallel.sequence_parallel)?;
    }
    Ok(())
}

fn fixed_dp(config: &Config) -> Option<usize> {
    match config.parallel.dp {
        Dp::Auto => None,
        Dp::Ranks(dp) => Some(dp),
    }
}

fn plan(options: &LaunchOptions, config: &Config, allocation: Option<Allocation>) -> anyhow::Result<Plan> {
    let named = match (&options.hosts, &options.hostfile) {
        (Some(list), _) => Some(parse_hosts(list).map_err(|why| anyhow::anyhow!("--hosts: {why}"))?),
        (_, Some(path)) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("--hostfile {}", path.display()))?;
            Some(parse_hostfile(&text).map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))?)
        }
        _ => None,
    };
    let (job_id, requeued) =
        allocation.as_ref().map_or((None, false), |allocation| (Some(allocation.job.clone()), allocation.restarts > 0));
    let (hosts, allocated): (Vec<Host>, bool) = match (named, allocation) {
        (Some(hosts), _) => (hosts, false),
        (None, Some(allocation)) => (allocation.hosts, true),
        (None, None) => (Vec::new(), false),
    };
    let job = Job::new(options.np, hosts, config.parallel.tp, fixed_dp(config))?;
    if options.min_nodes.is_some_and(|least| least > job.hosts.len().max(1)) {
        bail!("--min-nodes is more than the {} hosts of this job", job.hosts.len().max(1));
    }
    let engine = engine(options, allocated, job.hosts.is_empty())?;
    Ok(Plan {
        engine,
        job,
        run: std::iter::once(this_program()?).chain(options.run.iter().cloned()).collect(),
        environment: environment(&options.env)?,
        folder: config.run.dir.clone(),
        resumes: config.checkpoint.resume != Resume::Never,
        slurm_job: job_id,
        requeued,
        policy: Policy {
            max_restarts: options.max_restarts,
            backoff: Duration::try_from_secs_f64(options.backoff).context("--backoff")?,
            min_nodes: options.min_nodes,
            grace: Duration::try_from_secs_f64(options.grace).context("--grace")?,
        },
    })
}

fn this_program() -> anyhow::Result<String> {
    Ok(std::env::current_exe().context("where is this program?")?.display().to_string())
}

/// The engine as asked for, or as found.
fn engine(options: &LaunchOptions, allocated: bool, local: bool) -> anyhow::Result<Engine> {
    let (version, prefix) = mpi_library();
    let dialect = Dialect::of_version(&version).unwrap_or(Dialect::OpenMpi5);
    let beside = prefix.as_ref().map(|prefix| prefix.join("bin/mpirun")).filter(|path| path.exists());
    let mpirun = std::env::var("MPIRUN").ok().or(beside.map(|path| path.display().to_string())).or(in_path("mpirun"));
    let srun = in_path("srun").filter(|_| allocated);
    let flavour = match options.engine {
        EngineWord::Auto if mpirun.is_none() && srun.is_some() => Flavour::Srun,
        EngineWord::Auto | EngineWord::Mpirun => Flavour::Mpirun,
        EngineWord::Srun => Flavour::Srun,
    };
    if flavour == Flavour::Srun && local {
        bail!(
            "--engine srun needs a Slurm job, or --hosts; start it inside `salloc` or `sbatch`, or take --slurm --nodes N"
        );
    }
    let found = match flavour {
        Flavour::Mpirun => mpirun,
        Flavour::Srun => srun.or(Some("srun".to_owned())),
    };
    let program = options.program.clone().or(found);
    let program =
        program.context("no mpirun: none beside the MPI library, none in PATH; say --program PATH or set MPIRUN")?;
    Ok(Engine {
        flavour,
        dialect,
        program,
        prefix: prefix.map(|prefix| prefix.display().to_string()),
        keepalive: options.keepalive.max(1),
        label: options.output == OutputWord::Ranks,
        extra: options.engine_arg.clone(),
        allocated,
    })
}

/// Version and folder of the MPI library that this process has loaded: its own mpirun is the one that fits.
fn mpi_library() -> (String, Option<PathBuf>) {
    #[cfg(feature = "mpi")]
    let version = crate::abi::mpi::library_version();
    #[cfg(not(feature = "mpi"))]
    let version = String::new();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let library =
        maps.lines().filter_map(|line| line.split_once('/')).map(|(_, path)| PathBuf::from(format!("/{path}")));
    let is_mpi = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libmpi.so"));
    let prefix = library.into_iter().find(is_mpi).and_then(|path| Some(path.parent()?.parent()?.to_owned()));
    (version, prefix)
}

fn in_path(program: &str) -> Option<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.is_file())
        .map(|_| program.to_owned())
}

/// Variables for the ranks: those that are named, those that libraries read, and what launch itself sets.
fn environment(named: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    let mut all: Vec<(String, String)> = std::env::vars()
        .filter(|(name, _)| HANDED_ON.iter().any(|prefix| name.starts_with(prefix)) && name != crate::launch::NOTES)
        .collect();
    all.sort();
    let mut put = |name: &str, value: &str| {
        all.retain(|(known, _)| known != name);
        all.push((name.to_owned(), value.to_owned()));
    };
    // threads that wait sleep after some 30 microseconds instead of milliseconds: as fast alone, twice as fast beside others
    put("GOMP_SPINCOUNT", &std::env::var("GOMP_SPINCOUNT").unwrap_or_else(|_| "10000".to_owned()));
    // engines are told to bind nothing: each rank takes its own cores, see docs/launch.md
    put("DUNLEARN_BIND", &std::env::var("DUNLEARN_BIND").unwrap_or_else(|_| "core".to_owned()));
    if host::stderr_is_terminal() {
        put("DUNLEARN_PROGRESS", &std::env::var("DUNLEARN_PROGRESS").unwrap_or_else(|_| "bar".to_owned()));
    }
    for variable in named {
        match variable.split_once('=') {
            Some((name, value)) if !name.is_empty() => put(name, value),
            _ => put(
                variable,
                &std::env::var(variable).with_context(|| format!("--env {variable}: it is not set here"))?,
            ),
        }
    }
    Ok(all)
}

/// The engine's output goes on as it comes, and into `launch.log`; the supervisor's own words to standard error.
fn outlet(run: &Path) -> anyhow::Result<Outlet> {
    std::fs::create_dir_all(run).with_context(|| run.display().to_string())?;
    let path = run.join("launch.log");
    let log = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    let log = log.with_context(|| path.display().to_string())?;
    Ok(Outlet::new(move |stream, bytes| {
        let mut log = &log;
        let (words, rest);
        let bytes = match stream {
            Stream::Own => {
                words = format!("launch: {}\n", String::from_utf8_lossy(bytes));
                words.as_bytes()
            }
            // mpirun ends some of its messages with a zero
            _ if bytes.contains(&0) => {
                rest = bytes.iter().copied().filter(|&byte| byte != 0).collect::<Vec<u8>>();
                &rest
            }
            _ => bytes,
        };
        let _ = log.write_all(bytes);
        // a reader that is gone must not end the job
        let _ = match stream {
            Stream::Out => std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush()),
            Stream::Err | Stream::Own => std::io::stderr().write_all(bytes),
        };
    }))
}

/// Writes the batch script and submits it.
fn batch(options: &LaunchOptions, config: &Config) -> anyhow::Result<ExitCode> {
    if options.hosts.is_some() || options.hostfile.is_some() {
        bail!("--slurm chooses the hosts itself; leave --hosts and --hostfile out");
    }
    let nodes = options.nodes.filter(|&nodes| nodes > 0).context("--nodes is at least 1")?;
    let job = Job::new(options.np, Vec::new(), config.parallel.tp, fixed_dp(config))?;
    if !job.ranks.is_multiple_of(nodes) {
        bail!(
            "--np {} ranks are not the same number on each of {nodes} nodes; take --np {}",
            job.ranks,
            job.ranks.div_ceil(nodes) * nodes
        );
    }
    let folder = &config.run.dir;
    let name = folder.file_name().map_or_else(|| "dunlearn".to_owned(), |name| name.to_string_lossy().into_owned());
    let text = script(&Batch {
        name,
        nodes,
        ranks_per_node: job.ranks / nodes,
        time: options.time.clone(),
        output: folder.join("slurm-%j.out").display().to_string(),
        options: options.sbatch.clone(),
        command: std::iter::once(this_program()?).chain(inside_the_job(options)).collect(),
    });
    let path = folder.join("launch.sbatch");
    if options.dry_run {
        println!("# {}\n{text}\nsbatch {}", path.display(), quote(&path.display().to_string()));
        return Ok(ExitCode::SUCCESS);
    }
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    let status = std::process::Command::new("sbatch").arg(&path).stdin(Stdio::null()).status();
    let status = status.context("sbatch cannot be started; is this a machine of a Slurm cluster?")?;
    if !status.success() {
        bail!("sbatch has refused {} ({status})", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The arguments of `launch` inside the batch job.
fn inside_the_job(options: &LaunchOptions) -> Vec<String> {
    let mut words = Vec::new();
    let mut put = |name: &str, value: String| words.extend([name.to_owned(), value]);
    if let Some(np) = options.np {
        put("--np", np.to_string());
    }
    let engine = options.engine.to_possible_value().expect("invariant: every engine has a word");
    if options.engine != EngineWord::Auto {
        put("--engine", engine.get_name().to_owned());
    }
    if let Some(program) = &options.program {
        put("--program", program.clone());
    }
    if options.output == OutputWord::Ranks {
        put("--output", "ranks".to_owned());
    }
    put("--max-restarts", options.max_restarts.to_string());
    put("--backoff", options.backoff.to_string());
    put("--keepalive", options.keepalive.to_string());
    if let Some(least) = options.min_nodes {
        put("--min-nodes", least.to_string());
    }
    words.extend(options.engine_arg.iter().map(|word| format!("--engine-arg={word}")));
    words.extend(options.env.iter().map(|word| format!("--env={word}")));
    words.push("--".to_owned());
    words.extend(options.run.iter().cloned());
    words
}
