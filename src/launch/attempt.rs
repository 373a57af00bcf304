//! One start of the ranks, from the engine's first to its last word: copies what it says, passes requests on, and ends it where it
//! does not end by itself.

use std::future::poll_fn;
use std::path::Path;
use std::pin::pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::engine::Command;
use super::notes::{Ending, Notes};
use super::supervisor::{Outlet, Stream};
use crate::abi::signals;

/// How long the engine may take to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it may take once the run has written its mark.
const AFTER_THE_MARK: Duration = Duration::from_secs(60);
/// How long the last output may be on its way.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// A second signal that follows so soon is the first one's echo.
const ECHO: Duration = Duration::from_millis(1500);
const TICK: Duration = Duration::from_millis(200);

/// Signals that came to the supervisor.
pub(super) struct Requests {
    sources: [(&'static str, Signal); 4],
    /// The first one: save and stop.
    pub(super) first: Option<&'static str>,
    since: Option<Instant>,
    /// Another one that means "now".
    pub(super) at_once: bool,
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub(super) struct Ended {
    /// The engine's exit code.
    pub(super) code: Option<i32>,
    /// The signal that ended the engine.
    pub(super) signal: Option<i32>,
    /// Ranks that left words before anything was ended from here.
    pub(super) endings: Vec<Ending>,
    /// All ranks were up.
    pub(super) ready: bool,
    /// The engine went on after its ranks had ended, and was ended from here.
    pub(super) hung: bool,
    /// The run has written its mark.
    pub(super) marked: bool,
    /// The end of what the engine said.
    pub(super) tail: String,
}

impl Requests {
    pub(super) fn listen() -> std::io::Result<Self> {
        let on = |name, kind| Ok::<_, std::io::Error>((name, signal(kind)?));
        let sources = [
            on("SIGINT", SignalKind::interrupt())?,
            on("SIGTERM", SignalKind::terminate())?,
            on("SIGUSR1", SignalKind::user_defined1())?,
            on("SIGHUP", SignalKind::hangup())?,
        ];
        Ok(Self { sources, first: None, since: None, at_once: false })
    }

    /// Waits for the first request, and after it for one that means "now".
    pub(super) async fn next(&mut self) -> &'static str {
        loop {
            let came = |context: &mut Context<'_>| {
                let mut sources = self.sources.iter_mut();
                let came = sources.find_map(|(name, source)| source.poll_recv(context).is_ready().then_some(*name));
                came.map_or(Poll::Pending, Poll::Ready)
            };
            let name = poll_fn(came).await;
            match self.since {
                None => {
                    (self.first, self.since) = (Some(name), Some(Instant::now()));
                    return name;
                }
                // Slurm signals every process of a job, and the batch script hands its own signal on; SIGUSR1 only ever asks to save
                Some(since) if since.elapsed() < ECHO || name == "SIGUSR1" => {}
                Some(_) => {
                    self.at_once = true;
                    return name;
                }
            }
        }
    }
}

/// The output of whichever of two futures ends first; the first one has precedence.
pub(super) async fn either<A, B>(first: impl Future<Output = A>, second: impl Future<Output = B>) -> Either<A, B> {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|context| match first.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Either::First(output)),
        Poll::Pending => second.as_mut().poll(context).map(Either::Second),
    })
    .await
}

pub(super) enum Either<A, B> {
    First(A),
    Second(B),
}

/// Runs `command` to its end. `grace`: how long the engine may go on after a rank has said that it ends.
///
/// # Errors
/// Where the program cannot be started.
pub(super) async fn attempt(
    command: &Command,
    notes: &Notes,
    run: &Path,
    grace: Duration,
    requests: &mut Requests,
    outlet: &Outlet,
) -> std::io::Result<Ended> {
    let mut ended = Ended::default();
    let mut builder = std::process::Command::new(&command.program);
    builder.args(&command.arguments).envs(command.environment.iter().map(|(name, value)| (name, value)));
    builder.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    signals::end_with_us(&mut builder);
    let mut child = tokio::process::Command::from(builder).spawn()?;
    let id = child.id().expect("invariant: nobody has waited for it");
    let tail = Arc::new(Mutex::new(Vec::new()));
    let out = child.stdout.take().expect("invariant: piped");
    let err = child.stderr.take().expect("invariant: piped");
    let copies = [
        tokio::spawn(copy(out, Stream::Out, outlet.clone(), Arc::clone(&tail))),
        tokio::spawn(copy(err, Stream::Err, outlet.clone(), Arc::clone(&tail))),
    ];
    let stop = run.join("STOP");
    let (mut owed, mut first_end, mut mark_since) = (requests.first.is_some(), None::<Instant>, None::<Instant>);
    if owed {
        let _ = std::fs::write(&stop, "");
    }
    // when SIGTERM was sent to the engine
    let mut told: Option<Instant> = None;
    let status = loop {
        let next = tokio::time::timeout(TICK, requests.next());
        let event = either(child.wait(), next).await;
        match event {
            Either::First(status) => break status?,
            Either::Second(Ok(name)) if requests.at_once => {
                outlet.say(&format!("{name}: ending the job at once"));
            }
            Either::Second(Ok(name)) => {
                outlet.say(&format!("{name}: the run saves and stops; a second Ctrl-C or SIGTERM ends it at once"));
                // a rank that is not up yet would die of a signal; it will find the file
                let _ = std::fs::write(&stop, "");
                owed = true;
            }
            Either::Second(Err(_)) => {}
        }
        ended.ready = ended.ready || notes.is_ready();
        if owed && ended.ready {
            signals::send(id, false, "SIGUSR1");
            owed = false;
        }
        if told.is_none() {
            ended.endings = notes.endings();
            if !ended.endings.is_empty() {
                first_end.get_or_insert_with(Instant::now);
            }
            if has_mark(run, &notes.id()) {
                mark_since.get_or_insert_with(Instant::now);
            }
        }
        let too_long = |since: Option<Instant>, limit| since.is_some_and(|since: Instant| since.elapsed() > limit);
        ended.hung |= told.is_none() && (too_long(first_end, grace) || too_long(mark_since, AFTER_THE_MARK));
        match told {
            None if ended.hung || requests.at_once => {
                if !requests.at_once {
                    outlet.say("the ranks have ended and the engine has not: ending it");
                }
                signals::send(id, false, "SIGTERM");
                told = Some(Instant::now());
            }
            Some(since) if since.elapsed() > PATIENCE => signals::send(id, true, "SIGKILL"),
            _ => {}
        }
    };
    if told.is_none() {
        // words may come a moment after the engine's end, where the file system is slow
        ended.endings = notes.endings();
    }
    ended.ready = ended.ready || notes.is_ready();
    use std::os::unix::process::ExitStatusExt;
    (ended.code, ended.signal) = (status.code(), status.signal());
    // what the engine has started may hold its pipes open
    let copied = async {
        for copy in copies {
            let _ = copy.await;
        }
    };
    let _ = tokio::time::timeout(LAST_WORDS, copied).await;
    ended.marked = has_mark(run, &notes.id());
    let _ = std::fs::remove_file(&stop);
    ended.tail = String::from_utf8_lossy(&tail.lock().unwrap_or_else(PoisonError::into_inner)).into_owned();
    Ok(ended)
}

/// Whether the run has come to its end in the start that is named `id`.
fn has_mark(run: &Path, id: &str) -> bool {
    let text = std::fs::read_to_string(run.join("summary.json")).unwrap_or_default();
    text.contains(id) && serde_json::from_str::<serde_json::Value>(&text).is_ok_and(|summary| summary["launch"] == id)
}

/// Bytes of the engine's output that are kept to tell why it ended.
const TAIL: usize = 4096;

async fn copy(mut pipe: impl AsyncRead + Unpin, stream: Stream, outlet: Outlet, tail: Arc<Mutex<Vec<u8>>>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        outlet.copy(stream, &buffer[..count]);
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(&buffer[..count]);
        let surplus = tail.len().saturating_sub(TAIL);
        tail.drain(..surplus);
    }
}
