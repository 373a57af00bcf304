//! Signals that ask a run to stop: noted, and looked at where it may stop.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

static ASKED: AtomicI32 = AtomicI32::new(0);
static RECORD: AtomicBool = AtomicBool::new(false);

/// From here on SIGTERM, SIGUSR1 and the first SIGINT only leave a note; a second SIGINT ends the process as ever.
pub fn note_requests() {
    for signal in [libc::SIGTERM, libc::SIGUSR1, libc::SIGINT] {
        // SAFETY: the handler only touches an atomic and resets a disposition, which signal handlers may do.
        unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
    }
}

/// From here on a reader that has seen enough ends the process without a word, as it ends every tool: `dunlearn methods | head`. Not for
/// ranks, whose connections must not end them.
pub fn end_with_the_reader() {
    // SAFETY: the default disposition of a signal; no handler is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// From here on SIGUSR2 leaves a note that asks for this rank's flight record.
pub fn note_record_requests() {
    // SAFETY: the handler only touches an atomic.
    unsafe { libc::signal(libc::SIGUSR2, note_record as *const () as libc::sighandler_t) };
}

/// Whether the flight record was asked for since the last call.
pub fn take_record_request() -> bool {
    RECORD.swap(false, Ordering::Relaxed)
}

extern "C" fn note_record(_: c_int) {
    RECORD.store(true, Ordering::Relaxed);
}

/// A signal that a process sends itself, for faults put in on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// Ends it at once.
    Kill,
    /// Stops it until somebody lets it go on.
    Stop,
}

/// Sends this process a signal that it cannot catch.
pub fn strike(blow: Blow) {
    let signal = match blow {
        Blow::Kill => libc::SIGKILL,
        Blow::Stop => libc::SIGSTOP,
    };
    // SAFETY: no memory is involved.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// The signal that asked to stop, by its name.
pub fn request() -> Option<&'static str> {
    match ASKED.load(Ordering::Relaxed) {
        libc::SIGTERM => Some("SIGTERM"),
        libc::SIGUSR1 => Some("SIGUSR1"),
        libc::SIGINT => Some("SIGINT"),
        _ => None,
    }
}

extern "C" fn note(signal: c_int) {
    ASKED.store(signal, Ordering::Relaxed);
    if signal == libc::SIGINT {
        // SAFETY: restores the default for the next one.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
    }
}

/// Free bytes for this user on the file system of a path; None where the system does not say.
pub fn free_bytes(path: &std::path::Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: plain old data that the call fills; a path that ends in zero.
    unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut stat) == 0).then(|| stat.f_bavail as u64 * stat.f_frsize as u64)
    }
}

/// Sends a signal to a process, or to its whole group; one that is gone is none's loss.
pub fn send(process: u32, group: bool, signal: &str) {
    let number = match signal {
        "SIGUSR1" => libc::SIGUSR1,
        "SIGTERM" => libc::SIGTERM,
        _ => libc::SIGKILL,
    };
    let process = process as libc::pid_t;
    // SAFETY: no memory is involved.
    unsafe { libc::kill(if group { -process } else { process }, number) };
}

/// Lets a process that will be started end with the thread that starts it, by SIGTERM, and puts it into a group of its own.
pub fn end_with_us(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    #[cfg(target_os = "linux")]
    // SAFETY: between fork and exec only one system call is made.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        });
    }
}
