//! A run under supervision: started, judged by its mark, started again where that can help.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::attempt::{Requests, attempt};
use super::codes::{Code, Verdict};
use super::engine::{Command, Engine};
use super::hosts::Host;
use super::journal::{self, Journal};
use super::judge::judge;
use super::notes::Notes;
use super::sites::{Job, LaunchError, fewer};
use crate::checkpoint::Store;

/// Everything about a launch.
#[derive(Clone, Debug)]
pub struct Plan {
    pub engine: Engine,
    pub job: Job,
    /// The program and its arguments on every rank.
    pub run: Vec<String>,
    /// For the ranks.
    pub environment: Vec<(String, String)>,
    /// Run folder.
    pub folder: PathBuf,
    /// The run goes on from checkpoints.
    pub resumes: bool,
    /// The Slurm job that this is part of.
    pub slurm_job: Option<String>,
    /// Slurm has put it back into the queue before.
    pub requeued: bool,
    pub policy: Policy,
}

/// When and how it is started again.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub max_restarts: usize,
    /// Before the first restart; doubled each time, five minutes at most.
    pub backoff: Duration,
    /// Go on with fewer hosts, down to so many.
    pub min_nodes: Option<usize>,
    /// How long the engine may go on after a rank has said that it ends.
    pub grace: Duration,
}

/// Where the engine's output and the supervisor's own words go.
#[derive(Clone)]
pub struct Outlet(Arc<dyn Fn(Stream, &[u8]) + Send + Sync>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Out,
    Err,
    /// Words of the supervisor.
    Own,
}

impl Outlet {
    pub fn new(write: impl Fn(Stream, &[u8]) + Send + Sync + 'static) -> Self {
        Self(Arc::new(write))
    }

    pub(super) fn copy(&self, stream: Stream, bytes: &[u8]) {
        (self.0)(stream, bytes);
    }

    pub(super) fn say(&self, words: &str) {
        (self.0)(Stream::Own, words.as_bytes());
    }
}

const MOST_BACKOFF: Duration = Duration::from_secs(300);
/// How long a host may take to answer the engine.
const PROBE: Duration = Duration::from_secs(20);
/// Of the ranks' environment: the folder for their notes.
pub const NOTES: &str = "DUNLEARN_LAUNCH";

impl Plan {
    /// The command of a start whose notes are in `notes`.
    pub fn command(&self, job: &Job, notes: &Path, run: &[String]) -> Command {
        let mut environment = self.environment.clone();
        environment.push((NOTES.to_owned(), notes.display().to_string()));
        self.engine.command(job, &environment, run, job.hosts.len() == self.job.hosts.len())
    }
}

/// Runs to the end and returns the exit code.
///
/// # Errors
/// Where the run folder cannot be written, or the engine is no program.
pub fn supervise(plan: &Plan, outlet: &Outlet) -> Result<u8, LaunchError> {
    let said = |what: &str, error: std::io::Error| LaunchError::Said(format!("{what}: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| said("cannot wait for processes", error))?;
    let journal = Journal::open(&plan.folder).map_err(|error| said(&plan.folder.display().to_string(), error))?;
    runtime.block_on(Supervisor { plan, outlet, journal }.run())
}

struct Supervisor<'a> {
    plan: &'a Plan,
    outlet: &'a Outlet,
    journal: Journal,
}

impl Supervisor<'_> {
    async fn run(mut self) -> Result<u8, LaunchError> {
        let Plan { folder, policy, .. } = self.plan;
        let said = |error: std::io::Error| LaunchError::Said(error.to_string());
        let mut requests = Requests::listen().map_err(said)?;
        let _ = std::fs::remove_file(folder.join("STOP"));
        // what stands in the folder and is not ours
        let before = match self.plan.slurm_job.as_deref().filter(|_| self.plan.requeued) {
            Some(job) => journal::first_start(folder, job),
            None => None,
        };
        let mut again = before.is_some();
        let before = before.unwrap_or_else(|| Before::look(folder));
        let (mut job, mut restarts, mut last) = (self.plan.job.clone(), 0, None::<(String, Option<(usize, String)>)>);
        let launch = format!("{:x}-{}", (journal::unix_seconds() * 1e3) as u64, std::process::id());
        loop {
            let notes = folder.join("launch").join(format!("{launch}-{restarts}"));
            std::fs::create_dir_all(&notes).map_err(said)?;
            let arguments = self.arguments(again, &before);
            let command = self.plan.command(&job, &notes, &arguments);
            let notes = Notes::new(&notes);
            self.journal.write(
                "start",
                &json!({ "launch": notes.id(), "ranks": job.ranks, "hosts": job.host_list(), "command": command.to_string(),
                         "slurm_job": self.plan.slurm_job, "before": before }),
            );
            let start = Instant::now();
            let ended = attempt(&command, &notes, folder, policy.grace, &mut requests, self.outlet).await;
            let ended =
                ended.map_err(|error| LaunchError::Said(format!("cannot start {}: {error}", command.program)))?;
            notes.clear();
            let _ = std::fs::remove_dir(folder.join("launch"));
            let mut failure = judge(&ended, restarts > 0, requests.at_once);
            let place = Before::look(folder).checkpoint;
            let same = last.as_ref().is_some_and(|(words, at)| *words == failure.words && *at == place);
            if failure.verdict == Verdict::Retry && failure.same_again_is_hopeless && same {
                failure.verdict = Verdict::Hopeless;
                failure.words = format!("the same as the last time: {}", failure.words);
            }
            self.journal.write(
                "end",
                &json!({ "launch": notes.id(), "engine_code": ended.code, "engine_signal": ended.signal, "code": failure.code,
                         "verdict": failure.verdict.word(), "message": failure.words, "ranks_that_spoke": ended.endings,
                         "engine_ended_by_us": ended.hung, "asked": requests.first,
                         "last_output": (failure.code != 0).then_some(ended.tail),
                         "seconds": start.elapsed().as_secs_f64() }),
            );
            if failure.verdict == Verdict::Retry && failure.host_may_be_lost {
                let lost = self.lost_hosts(&job).await;
                if !lost.is_empty() {
                    self.journal.write("lost", &json!({ "hosts": lost }));
                    failure.words = format!("lost {}: {}", lost.join(", "), failure.words);
                }
            }
            match failure.verdict {
                Verdict::Finished => return Ok(failure.code),
                Verdict::Stopped => {
                    self.outlet.say(&failure.words);
                    return Ok(failure.code);
                }
                Verdict::Hopeless => {
                    self.outlet.say(&format!("{}; starting again would change nothing", failure.words));
                    return Ok(failure.code);
                }
                Verdict::Retry => {}
            }
            if requests.first.is_some() {
                self.outlet.say(&format!("{}; not started again, as it was asked to stop", failure.words));
                return Ok(failure.code);
            }
            if restarts >= policy.max_restarts {
                let often = if restarts == 0 { String::new() } else { format!(" after {restarts} restarts") };
                self.outlet
                    .say(&format!("{}; giving up{often} (--max-restarts {})", failure.words, policy.max_restarts));
                return Ok(failure.code);
            }
            let wait = policy.backoff.saturating_mul(1 << restarts.min(16)).min(MOST_BACKOFF);
            restarts += 1;
            self.outlet.say(&format!(
                "{}; starting again in {:.0} s, restart {restarts} of {}",
                failure.words,
                wait.as_secs_f64(),
                policy.max_restarts
            ));
            if let Ok(name) = tokio::time::timeout(wait, requests.next()).await {
                self.outlet.say(&format!("{name}: not started again; the same command goes on"));
                return Ok(Code::Again.number());
            }
            (again, last) = (true, Some((failure.words, place)));
            job = self.next_job(&job).await;
        }
    }

    /// The run's arguments: a restart goes on from the checkpoint that this launch has made, or, without one, starts anew over what this
    /// launch itself has written, never over anything older.
    fn arguments(&self, again: bool, before: &Before) -> Vec<String> {
        let asked = self.plan.run.iter().any(|word| word == "--overwrite");
        if !again {
            return self.plan.run.clone();
        }
        let now = Before::look(&self.plan.folder);
        let ours = now.checkpoint.is_some() && now.checkpoint != before.checkpoint;
        let goes_on = self.plan.resumes && now.checkpoint.is_some() && (ours || !asked);
        let mut words: Vec<String> = self.plan.run.iter().filter(|word| *word != "--overwrite").cloned().collect();
        if !goes_on && (asked || before.empty) {
            words.retain(|word| word != "--force-resume");
            words.push("--overwrite".to_owned());
        }
        words
    }

    /// Where to start again: everywhere, or on the hosts that answer if that is allowed and the layout divides.
    async fn next_job(&self, job: &Job) -> Job {
        let Some(min_nodes) = self.plan.policy.min_nodes else { return job.clone() };
        // a host that came back is welcome again
        let lost = self.lost_hosts(&self.plan.job).await;
        if lost.is_empty() {
            return self.plan.job.clone();
        }
        let left: Vec<Host> = self.plan.job.hosts.iter().filter(|host| !lost.contains(&host.name)).cloned().collect();
        match fewer(&self.plan.job, left, min_nodes) {
            Some(next) => {
                self.outlet.say(&format!("without {}: {} ranks on {}", lost.join(", "), next.ranks, next.host_list()));
                next
            }
            None => {
                self.outlet.say(&format!(
                    "without {} too few hosts are left, or parallel.tp = {} and dp fit no number of ranks there; trying all again",
                    lost.join(", "),
                    job.tp
                ));
                self.plan.job.clone()
            }
        }
    }

    /// Hosts that the engine does not reach.
    async fn lost_hosts(&self, job: &Job) -> Vec<String> {
        if job.hosts.len() < 2 {
            return Vec::new();
        }
        let mut open = Vec::new();
        for host in &job.hosts {
            let probe = self.plan.engine.probe(&host.name);
            let mut command = tokio::process::Command::new(&probe.program);
            command.args(&probe.arguments).envs(probe.environment).kill_on_drop(true);
            command.stdin(std::process::Stdio::null());
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
            open.push((
                host.name.clone(),
                tokio::spawn(async move {
                    let Ok(mut child) = command.spawn() else { return false };
                    matches!(tokio::time::timeout(PROBE, child.wait()).await, Ok(Ok(status)) if status.success())
                }),
            ));
        }
        let mut lost = Vec::new();
        for (name, probe) in open {
            if !probe.await.unwrap_or(false) {
                lost.push(name);
            }
        }
        lost
    }
}

/// What the run folder held before this launch.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Before {
    /// No run has written there.
    empty: bool,
    /// The newest checkpoint: its step and the digest that completes it.
    checkpoint: Option<(usize, String)>,
}

impl Before {
    fn look(run: &Path) -> Self {
        let store = Store::of_run(run);
        let newest = store.steps().ok().and_then(|steps| steps.last().copied());
        let checkpoint = newest.and_then(|step| {
            let digest = std::fs::read_to_string(store.folder().join(format!("step_{step:06}/COMPLETE"))).ok()?;
            Some((step, digest.trim().to_owned()))
        });
        Self { empty: !run.join("config.toml").exists(), checkpoint }
    }
}
