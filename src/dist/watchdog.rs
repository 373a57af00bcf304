//! Ends the process when it waits for others longer than agreed: a hang becomes a message.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What this rank is doing, for whoever has to say why nothing moves. Clones share the same state.
#[derive(Clone)]
pub struct Watchdog {
    state: Arc<State>,
}

struct State {
    waiting: Mutex<Option<Wait>>,
    deadline: Mutex<Duration>,
}

#[derive(Clone)]
struct Wait {
    what: String,
    since: Instant,
}

impl Watchdog {
    /// A watchdog that only remembers.
    pub fn new(deadline: Duration) -> Self {
        let state = State { waiting: Mutex::new(None), deadline: Mutex::new(deadline) };
        Self { state: Arc::new(state) }
    }

    /// Starts a thread that calls `on_timeout` with a message once a collective outlasts the deadline.
    ///
    /// The thread touches no device and no communicator. It ends when the last clone of the watchdog is dropped.
    pub fn start(&self, on_timeout: impl Fn(&str) + Send + 'static) {
        let state = Arc::downgrade(&self.state);
        std::thread::spawn(move || {
            while let Some(state) = state.upgrade() {
                let waiting = lock(&state.waiting).clone();
                let deadline = *lock(&state.deadline);
                if let Some(wait) = waiting.filter(|wait| wait.since.elapsed() > deadline) {
                    on_timeout(&format!(
                        "no answer to {} for {} s (run.timeout); another rank has stopped or is far behind",
                        wait.what,
                        wait.since.elapsed().as_secs()
                    ));
                    return;
                }
                drop(state);
                std::thread::sleep(Duration::from_millis(250));
            }
        });
    }

    /// Changes the deadline from here on, for phases that legitimately take longer.
    pub fn set_deadline(&self, deadline: Duration) {
        *lock(&self.state.deadline) = deadline;
    }

    /// Runs a wait for what the device has to do until the end of a step.
    pub fn watch_device<T>(&self, step: usize, wait: impl FnOnce() -> T) -> T {
        self.watch(|| format!("the device's work up to step {step}"), wait)
    }

    /// Runs a wait under observation.
    pub(super) fn watch<T>(&self, what: impl FnOnce() -> String, wait: impl FnOnce() -> T) -> T {
        *lock(&self.state.waiting) = Some(Wait { what: what(), since: Instant::now() });
        let result = wait();
        *lock(&self.state.waiting) = None;
        result
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_wait_past_the_deadline_is_reported_with_its_name() {
        let (send, receive) = mpsc::channel();
        let watchdog = Watchdog::new(Duration::from_millis(50));
        watchdog.start(move |message| send.send(message.to_owned()).unwrap());
        watchdog.watch(
            || "all_reduce on tp".into(),
            || {
                let message = receive.recv_timeout(Duration::from_secs(10)).unwrap();
                assert!(message.starts_with("no answer to all_reduce on tp for 0 s"), "{message}");
            },
        );
    }
}
