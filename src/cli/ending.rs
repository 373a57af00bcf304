//! How a process ends when something is wrong: one message with its rank, and the whole job with it.

use std::io::Write;
use std::os::unix::process::parent_id;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use crate::abi::host;
use crate::dist::{Alarm, MeetError};
use crate::launch::{Code, Ending, Notes};
use crate::run::MemoryWords;

static CODE: AtomicU8 = AtomicU8::new(0);

/// Lets the process end with the code that says "run me again", once MPI is finalised.
pub(super) fn to_be_continued() -> anyhow::Result<()> {
    CODE.store(Code::Again.number(), Ordering::Relaxed);
    Ok(())
}

/// Lets the process end with a code that answers a question with no.
pub(super) fn answer_no() {
    CODE.store(Code::No.number(), Ordering::Relaxed);
}

/// The exit code where nothing went wrong.
pub(super) fn code() -> ExitCode {
    ExitCode::from(CODE.load(Ordering::Relaxed))
}

/// Longest time for ending the other ranks, or half of that for last words.
const ENDING: Duration = Duration::from_secs(5);

type Hook = Box<dyn Fn(&str) + Send + Sync>;

static HOOK: OnceLock<Hook> = OnceLock::new();
static JSON: AtomicBool = AtomicBool::new(false);
static MEMORY: OnceLock<MemoryWords> = OnceLock::new();
static NOTES: OnceLock<Notes> = OnceLock::new();

/// From here on the last words of this rank are left for its supervisor too.
pub(super) fn leave_notes(notes: &Notes) {
    let _ = NOTES.set(notes.clone());
}

/// From here on a message about a lack of memory says what the memory is for and what to change.
pub(super) fn explain_memory(words: &MemoryWords) {
    let _ = MEMORY.set(words.clone());
}

/// From here on `hook` hears why this process ends before anybody else does, unless it ends as it should.
pub(super) fn tell_first(hook: impl Fn(&str) + Send + Sync + 'static) {
    let _ = HOOK.set(Box::new(hook));
}

fn leave_word(message: &str) {
    if let Some(hook) = HOOK.get() {
        hook(message);
    }
}

/// Runs what waits for other ranks outside of any collective of ours; where it lasts longer than `limit`, the process ends with `words`.
pub(super) fn within<T>(rank: usize, limit: Duration, words: &str, body: impl FnOnce() -> T) -> T {
    let (done, waits) = channel::<()>();
    let words = format!("{words} within {} s", limit.as_secs());
    std::thread::spawn(move || {
        if waits.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            leave_word(&words);
            say_now(rank, &words, Code::Deadline);
            end_alone(Code::Deadline);
        }
    });
    let result = body();
    drop(done);
    result
}

/// From here on the last message is a JSON object as the log lines are.
pub(super) fn speak_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// Ends this process, and with it all ranks, because of an error that all of them, or this one alone, have found.
pub(super) fn end_job(rank: usize, message: &str) -> ! {
    leave_word(message);
    say(rank, message, Code::Refused);
    end_all(Code::Refused)
}

/// Ends this process, and the other ranks through MPI where it is up.
fn end_all(code: Code) -> ! {
    abort_job(i32::from(code.number()));
    std::process::exit(i32::from(code.number()))
}

/// Ends this process at once, from any thread, without waiting for anything.
fn end_alone(code: Code) -> ! {
    host::end_now(i32::from(code.number()))
}

/// As [`end_job`] where the ranks have not met. Ranks that stayed away may come to another try.
pub(super) fn end_early(rank: usize, error: &anyhow::Error) -> ExitCode {
    let code = match error.downcast_ref() {
        Some(MeetError::Late(_)) => Code::Deadline,
        _ => Code::Refused,
    };
    say(rank, &in_words(error), code);
    ExitCode::from(code.number())
}

/// Makes a panic on any thread end the whole job with its message.
///
/// Unwinding would drop MPI's environment, whose finalisation waits for the other ranks for ever.
pub(super) fn on_panic_end_the_job(rank: usize) {
    std::panic::set_hook(Box::new(move |info| {
        let payload = info.payload();
        let text =
            payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("panic");
        // libtorch's messages carry pages of C++ backtrace
        let first = text.split("Exception raised from").next().unwrap_or(text).trim();
        let place = info.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
        tracing::debug!("panic: {text}");
        if first.contains("out of memory") {
            let words = out_of_memory(first, &MEMORY.get().map(MemoryWords::get).unwrap_or_default());
            leave_word(&words);
            say_now(rank, &words, Code::Memory);
            end_all(Code::Memory);
        }
        let words = format!("{first}{place}");
        leave_word(&words);
        say_now(rank, &words, Code::Panic);
        end_all(Code::Panic);
    }));
}

/// libtorch's word for what it tried, and ours for why there was no room.
fn out_of_memory(text: &str, words: &str) -> String {
    // "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
    let from = text.find("CUDA out of memory").unwrap_or(0);
    let tried: Vec<&str> = text[from..].split(". ").take(2).collect();
    let tried = tried.join(". ");
    if words.is_empty() { tried } else { format!("{tried}: {words}") }
}

/// What happens when the watchdog calls; it runs on its own thread and must not call MPI, and nothing may wait for a device.
pub(super) fn on_alarm(rank: usize, alarm: &Alarm) {
    let (code, words) = match alarm {
        Alarm::Deadline(words) | Alarm::DeadlineElsewhere(words) => (Code::Deadline, words),
        Alarm::OtherRank(words) => (Code::Loss, words),
    };
    // a shared disk that does not answer must not keep a rank
    std::thread::spawn(move || {
        std::thread::sleep(2 * ENDING);
        end_alone(code);
    });
    leave_word(words);
    say_now(rank, words, code);
    end_alone(code);
}

/// What a rank without MPI does when another one has broken off: it ends too, once whatever it has to say itself is said.
pub(super) fn on_loss(rank: usize, peer: usize) {
    let words = format!("rank {peer} has broken off");
    leave_word(&words);
    std::thread::sleep(Duration::from_secs(3));
    say_now(rank, &words, Code::Loss);
    end_alone(Code::Loss);
}

/// Ends this process when the launcher that started it is gone.
///
/// A launcher that is killed outright takes no rank with it: each would wait for messages that nobody forwards any more, and
/// keep its cores and its memory.
pub(super) fn with_the_launcher(rank: usize) {
    let launcher = parent_id();
    std::thread::spawn(move || {
        while parent_id() == launcher {
            std::thread::sleep(Duration::from_secs(1));
        }
        let words = format!("the launcher (process {launcher}) is gone");
        leave_word(&words);
        say_now(rank, &words, Code::Orphan);
        end_alone(Code::Orphan);
    });
}

/// An error with its causes; our own messages have the cause in them already.
pub(super) fn in_words(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Rank 0 speaks at once; the others give it time to speak for all, because most errors are found by all ranks alike.
fn say(rank: usize, message: &str, code: Code) {
    if rank > 0 {
        std::thread::sleep(Duration::from_millis(1500));
    }
    say_now(rank, message, code);
}

fn say_now(rank: usize, message: &str, code: Code) {
    if let Some(notes) = NOTES.get() {
        let host = sysinfo::System::host_name().unwrap_or_default();
        let time = std::time::UNIX_EPOCH.elapsed().map_or(0.0, |time| time.as_secs_f64());
        notes.leave(&Ending { rank, host, code: i32::from(code.number()), message: message.to_owned(), time });
    }
    // the rank's log file keeps it too
    tracing::debug!("ended: {message}");
    let line = if JSON.load(Ordering::Relaxed) {
        serde_json::json!({ "level": "ERROR", "rank": rank, "message": message }).to_string()
    } else if rank == 0 {
        format!("error: {message}")
    } else {
        format!("error on rank {rank}: {message}")
    };
    let mut err = std::io::stderr().lock();
    // in one piece: launchers forward pieces of several ranks in any order
    let _ = err.write_all((line + "\n").as_bytes());
    let _ = err.flush();
}

/// Ends the other ranks, once the launcher had time to forward the message: after an abort it throws away what is on its way.
#[cfg(feature = "mpi")]
fn abort_job(code: i32) {
    if crate::abi::mpi::is_active() {
        std::thread::sleep(Duration::from_millis(300));
        // MPI_Abort talks to daemons that may be gone
        std::thread::spawn(move || {
            std::thread::sleep(ENDING);
            host::end_now(code);
        });
        crate::abi::mpi::abort(code);
    }
}

#[cfg(not(feature = "mpi"))]
fn abort_job(_: i32) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_memory_is_told_with_what_helps() {
        let torch = "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a \
                     total capacity of 139.80 GiB of which 1.10 GiB is free. Including non-PyTorch memory";
        let text = out_of_memory(torch, "the device's 139.80 GiB hold weights 16.00 GiB");
        assert_eq!(
            text,
            "CUDA out of memory. Tried to allocate 2.00 GiB: the device's 139.80 GiB hold weights 16.00 GiB"
        );
    }
}
