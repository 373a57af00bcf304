//! Ranks as threads of one process, for tests: the same collectives without MPI, summed in rank order.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tch::{Kind, Tensor};

use super::group::{Group, Reduce, Ticket, Transport};
use super::mesh::Mesh;
use super::watchdog::Watchdog;
use super::world::World;
use crate::abi::slices;

/// How long a thread waits for the others before the test fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// A mistake of parallel programs, put in on purpose: tests that compare layouts must notice it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Sums over this axis give each rank its own numbers back.
    NoSum(&'static str),
    /// Sums over this axis are divided by the number of ranks.
    Mean(&'static str),
}

/// Runs `body` on `tp * dp` threads, each with its own [`World`], and gives the results in rank order.
///
/// A panic on one rank wakes the others, ends the run and is raised here with the rank's number.
pub fn run_threads<T: Send>(tp: usize, dp: usize, body: impl Fn(World) -> T + Sync) -> Vec<T> {
    run_threads_with(Fault::None, tp, dp, body)
}

/// As [`run_threads`] with a fault in the collectives.
pub fn run_threads_with<T: Send>(fault: Fault, tp: usize, dp: usize, body: impl Fn(World) -> T + Sync) -> Vec<T> {
    let world = tp * dp;
    let meet = |size| Arc::new(Meeting::new(size));
    let all = meet(world);
    let rows: Vec<_> = (0..dp).map(|_| meet(tp)).collect();
    let columns: Vec<_> = (0..tp).map(|_| meet(dp)).collect();
    let results: Vec<Result<T, String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..world)
            .map(|rank| {
                let mesh = Mesh::new(rank, world, tp, Some(dp)).expect("invariant: world is tp x dp");
                let (row, column) = (&rows[mesh.dp_rank()], &columns[mesh.tp_rank()]);
                let (all, body) = (&all, &body);
                scope.spawn(move || {
                    tch::set_num_threads(1);
                    let dog = Watchdog::new(Duration::MAX);
                    let group = |axis, rank, members: Vec<usize>, meeting: &Arc<Meeting>| {
                        let fault = match fault {
                            Fault::NoSum(on) | Fault::Mean(on) if on != axis => Fault::None,
                            fault => fault,
                        };
                        Group::new(axis, rank, &members, Box::new(Threads::new(meeting, rank, fault)), &dog)
                    };
                    let world = World {
                        mesh,
                        world: Rc::new(group("world", rank, (0..world).collect(), all)),
                        tp: Rc::new(group("tp", mesh.tp_rank(), mesh.row(), row)),
                        dp: Rc::new(group("dp", mesh.dp_rank(), mesh.column(), column)),
                        watchdog: dog.clone(),
                        planned: false,
                    };
                    catch_unwind(AssertUnwindSafe(|| body(world))).map_err(|panic| {
                        for meeting in [all, row, column] {
                            meeting.fail(rank);
                        }
                        let text = panic.downcast_ref::<String>().cloned();
                        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                        format!("rank {rank}: {}", text.unwrap_or_else(|| "panic".into()))
                    })
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("invariant: panics are caught inside")).collect()
    });
    // The rank that failed first is the one whose message is not about another rank.
    let first =
        results.iter().filter_map(|r| r.as_ref().err()).min_by_key(|text| text.contains("left its collectives"));
    if let Some(message) = first {
        panic!("{message}");
    }
    results.into_iter().map(|r| r.unwrap_or_else(|_| unreachable!("checked above"))).collect()
}

/// Where the ranks of one group exchange bytes: round k is complete when every rank has brought its bytes.
struct Meeting {
    size: usize,
    state: Mutex<Rounds>,
    changed: Condvar,
}

#[derive(Default)]
struct Rounds {
    open: HashMap<u64, Round>,
    failed: Option<usize>,
}

struct Round {
    brought: Vec<Option<Arc<Vec<u8>>>>,
    taken: usize,
}

impl Meeting {
    fn new(size: usize) -> Self {
        Self { size, state: Mutex::default(), changed: Condvar::new() }
    }

    fn bring(&self, round: u64, rank: usize, bytes: Vec<u8>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let size = self.size;
        let entry = state.open.entry(round).or_insert_with(|| Round { brought: vec![None; size], taken: 0 });
        entry.brought[rank] = Some(Arc::new(bytes));
        self.changed.notify_all();
    }

    fn take(&self, round: u64) -> Vec<Arc<Vec<u8>>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| {
                let complete = state.open.get(&round).is_some_and(|round| round.brought.iter().all(Option::is_some));
                !complete && state.failed.is_none()
            })
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(rank) = state.failed {
            panic!("rank {rank} left its collectives");
        }
        assert!(!timeout.timed_out(), "no answer from the other threads; collectives out of step");
        let entry = state.open.get_mut(&round).expect("invariant: waited for it");
        let all = entry.brought.iter().map(|bytes| Arc::clone(bytes.as_ref().expect("invariant: complete"))).collect();
        entry.taken += 1;
        if entry.taken == self.size {
            state.open.remove(&round);
        }
        all
    }

    fn fail(&self, rank: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.failed.get_or_insert(rank);
        self.changed.notify_all();
    }
}

struct Threads {
    meeting: Arc<Meeting>,
    rank: usize,
    fault: Fault,
    round: std::cell::Cell<u64>,
}

impl Threads {
    fn new(meeting: &Arc<Meeting>, rank: usize, fault: Fault) -> Self {
        Self { meeting: Arc::clone(meeting), rank, fault, round: std::cell::Cell::new(0) }
    }

    fn bring(&self, tensor: &Tensor) -> u64 {
        let round = self.round.get();
        self.round.set(round + 1);
        self.meeting.bring(round, self.rank, slices::bytes(tensor).to_vec());
        round
    }

    fn exchange(&self, tensor: &Tensor) -> Vec<Arc<Vec<u8>>> {
        self.meeting.take(self.bring(tensor))
    }
}

impl Transport for Threads {
    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) {
        let all = self.exchange(tensor);
        let range = 0..slices::bytes(tensor).len();
        let result = combine(&all, range, tensor, op, (self.fault, self.rank));
        tensor.copy_(&result);
    }

    fn reduce_scatter(&self, input: Tensor, output: Tensor) -> Box<dyn Ticket> {
        let round = self.bring(&input);
        let fault = (self.fault, self.rank);
        Box::new(Brought { meeting: Arc::clone(&self.meeting), round, fault, output })
    }

    fn all_gather(&self, input: &Tensor, output: &mut Tensor) {
        let all: Vec<u8> = self.exchange(&input.contiguous()).iter().flat_map(|bytes| bytes.iter().copied()).collect();
        slices::bytes_mut(output).copy_from_slice(&all);
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) {
        let all = self.exchange(tensor);
        slices::bytes_mut(tensor).copy_from_slice(&all[root]);
    }

    fn barrier(&self) {
        self.exchange(&Tensor::zeros([0], (Kind::Uint8, tch::Device::Cpu)));
    }

    fn progress(&self) {}
}

struct Brought {
    meeting: Arc<Meeting>,
    round: u64,
    fault: (Fault, usize),
    output: Tensor,
}

impl Ticket for Brought {
    fn wait(self: Box<Self>) -> Tensor {
        let all = self.meeting.take(self.round);
        let size = slices::bytes(&self.output).len();
        let rank = self.fault.1;
        let mut output = self.output;
        output.copy_(&combine(&all, rank * size..(rank + 1) * size, &output, Reduce::Sum, self.fault));
        output
    }
}

/// The reduction over the ranks, in rank order, of the bytes in `range`, seen as elements of `like`.
fn combine(
    all: &[Arc<Vec<u8>>],
    range: std::ops::Range<usize>,
    like: &Tensor,
    op: Reduce,
    (fault, rank): (Fault, usize),
) -> Tensor {
    let read = |bytes: &[u8]| {
        let mut tensor = like.empty_like();
        slices::bytes_mut(&mut tensor).copy_from_slice(&bytes[range.clone()]);
        tensor
    };
    if let Fault::NoSum(_) = fault {
        return read(&all[rank]);
    }
    let mut result = read(&all[0]);
    for bytes in &all[1..] {
        let other = read(bytes);
        result = match op {
            Reduce::Sum => result + other,
            Reduce::Max => result.maximum(&other),
        };
    }
    match (fault, op) {
        (Fault::Mean(_), Reduce::Sum) => result / all.len() as f64,
        _ => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(rank: usize, len: i64) -> Tensor {
        Tensor::arange(len, (Kind::Float, tch::Device::Cpu)) + rank as f64 * 100.0
    }

    #[test]
    fn collectives_along_both_axes() {
        let results = run_threads(2, 3, |world| {
            let rank = world.mesh.rank;
            let mut sum = numbers(rank, 4);
            world.tp.all_reduce(&mut sum, Reduce::Sum);
            let early = world.dp.reduce_scatter(&numbers(rank, 6));
            let gathered = world.dp.all_gather(&numbers(rank, 1));
            let part = early.wait();
            let words = world.world.gather_bytes(format!("r{rank}").repeat(rank).as_bytes());
            let from_two = world.world.broadcast_bytes(format!("I am {rank}").as_bytes(), 2);
            let mut highest = [rank as f64];
            world.world.all_reduce_f64(&mut highest, Reduce::Max);
            (
                Vec::<f32>::try_from(sum).unwrap(),
                Vec::<f32>::try_from(part).unwrap(),
                Vec::<f32>::try_from(gathered).unwrap(),
                words,
                from_two,
                highest[0],
            )
        });
        // rank 3 = dp 1, tp 1; its tp group is {2, 3}, its dp group {1, 3, 5}
        let (sum, part, gathered, words, from_two, highest) = &results[3];
        assert_eq!(sum, &[500.0, 502.0, 504.0, 506.0]);
        assert_eq!(part, &[906.0, 909.0]);
        assert_eq!(gathered, &[100.0, 300.0, 500.0]);
        assert_eq!(words[2], b"r2r2");
        assert_eq!(from_two, b"I am 2");
        assert_eq!(*highest, 5.0);
    }

    #[test]
    fn bf16_is_added_up_in_f32() {
        let results = run_threads(3, 1, |world| {
            // 1 + 2^-8 + 2^-8: in bf16 each addition would round back to 1
            let value = if world.mesh.rank == 0 { 1.0 } else { 1.0 / 256.0 };
            let mut tensor = Tensor::from_slice(&[value as f32]).to_kind(Kind::BFloat16);
            world.tp.all_reduce(&mut tensor, Reduce::Sum);
            tensor.to_kind(Kind::Float).double_value(&[0])
        });
        assert_eq!(results, [1.0 + 1.0 / 128.0; 3]);
    }

    #[test]
    #[should_panic(expected = "rank 1: no")]
    fn a_panic_on_one_rank_ends_all() {
        run_threads(2, 2, |world| {
            assert!(world.mesh.rank != 1, "no");
            world.world.barrier();
        });
    }
}
