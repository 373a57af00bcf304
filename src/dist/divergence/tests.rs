//! Programs of made-up ranks, run by a simulator of blocking collectives with a fault in one rank: the records must blame it.

use super::*;
use crate::dist::flight::{self, Waiting};

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Op {
    axis: usize,
    op: &'static str,
    kind: &'static str,
    count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Never comes to its next call.
    Stops,
    /// The same, and leaves no record.
    Dies,
    /// Calls something that the others do not.
    Extra,
    /// Brings another count.
    Count,
    /// Another element type.
    Kind,
}

const AXES: [&str; 3] = ["world", "tp", "dp"];

fn members(axis: usize, rank: usize, tp: usize, dp: usize) -> Vec<usize> {
    match axis {
        0 => (0..tp * dp).collect(),
        1 => (0..tp).map(|i| rank / tp * tp + i).collect(),
        _ => (0..dp).map(|i| i * tp + rank % tp).collect(),
    }
}

/// What each rank calls, in order; None: from here on it does nothing.
type Program = Vec<Vec<Option<Op>>>;

/// Runs the programs until nothing moves; the records of that moment. `keep`: calls that a rank remembers; `dead`: leaves none.
fn simulate(programs: &Program, tp: usize, dp: usize, keep: usize, dead: Option<usize>) -> Vec<Dump> {
    struct Rank {
        at: usize,
        begun: [u64; 3],
        calls: Vec<(usize, u64, Op, f64, Option<f64>)>,
    }
    let world = tp * dp;
    let mut ranks: Vec<Rank> = (0..world).map(|_| Rank { at: 0, begun: [0; 3], calls: Vec::new() }).collect();
    let mut now = 0.0;
    loop {
        now += 1.0;
        let mut moved = false;
        for (rank, state) in ranks.iter_mut().enumerate() {
            let open = state.calls.last().is_some_and(|call| call.4.is_none());
            if let (false, Some(Some(op))) = (open, programs[rank].get(state.at)) {
                state.calls.push((op.axis, state.begun[op.axis], *op, now, None));
                state.begun[op.axis] += 1;
                moved = true;
            }
        }
        for rank in 0..world {
            let Some(&(axis, seq, op, _, None)) = ranks[rank].calls.last() else { continue };
            let group = members(axis, rank, tp, dp);
            let there = |&other: &usize| {
                ranks[other]
                    .calls
                    .last()
                    .is_some_and(|call| (call.0, call.1, call.2) == (axis, seq, op) && call.4.is_none())
            };
            if group.iter().all(there) {
                for other in group {
                    let state = &mut ranks[other];
                    state.calls.last_mut().unwrap().4 = Some(now);
                    state.at += 1;
                }
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    let record = |(rank, state): (usize, Rank)| {
        let axes: Vec<usize> = (0..3).filter(|&axis| members(axis, rank, tp, dp).len() > 1).collect();
        let channels: Vec<flight::Channel> = axes
            .iter()
            .map(|&axis| {
                let mut channel = flight::Channel::named(AXES[axis], &members(axis, rank, tp, dp));
                channel.calls = state.begun[axis];
                channel
            })
            .collect();
        let calls = state.calls.iter().map(|&(axis, seq, op, start, end)| Call {
            channel: axes.iter().position(|&a| a == axis).unwrap(),
            seq,
            op: op.op.to_owned(),
            kind: op.kind.to_owned(),
            count: op.count,
            site: "here.rs:1".to_owned(),
            state: if end.is_some() { CallState::Done } else { CallState::Started },
            age: now + 5.0 - start,
            seconds: end.map(|end| end - start),
        });
        let calls: Vec<Call> = calls.collect();
        let calls = calls[calls.len().saturating_sub(keep)..].to_vec();
        let waits = calls.last().filter(|call| call.state == CallState::Started);
        let waiting = waits.map(|call| Waiting {
            what: call.op.clone(),
            seconds: call.age,
            call: Some(calls.len() - 1),
            device: false,
        });
        dump(rank, world, waiting, channels, calls)
    };
    ranks.into_iter().enumerate().filter(|(rank, _)| dead != Some(*rank)).map(record).collect()
}

fn dump(rank: usize, world: usize, waiting: Option<Waiting>, channels: Vec<flight::Channel>, calls: Vec<Call>) -> Dump {
    Dump {
        format: 1,
        rank,
        world,
        host: "host".to_owned(),
        pid: 1,
        version: String::new(),
        reason: String::new(),
        asked: false,
        time: 1e9,
        phase: "step 2".to_owned(),
        phase_seconds: 1.0,
        deadline_seconds: None,
        waiting,
        idle_seconds: 7.0,
        stood_still: 0.0,
        channels,
        calls,
        threads: Vec::new(),
    }
}

/// A program that all ranks share, with a fault in `rank` before its call `at`.
fn programs(random: &mut Random, tp: usize, dp: usize, len: usize, fault: Fault, rank: usize, at: usize) -> Program {
    let axes: Vec<usize> = (0..3).filter(|&axis| members(axis, 0, tp, dp).len() > 1).collect();
    let common: Vec<Op> = (0..len)
        .map(|_| Op {
            axis: axes[random.next(axes.len())],
            op: ["all_reduce", "all_gather", "broadcast"][random.next(3)],
            kind: ["Float", "BFloat16"][random.next(2)],
            count: 1 + random.next(4),
        })
        .collect();
    (0..tp * dp)
        .map(|other| {
            let mut mine: Vec<Option<Op>> = common.iter().copied().map(Some).collect();
            if other == rank {
                let here = mine[at].unwrap();
                match fault {
                    Fault::None => {}
                    Fault::Stops | Fault::Dies => mine.insert(at, None),
                    Fault::Extra => mine.insert(at, Some(Op { op: "barrier", count: 0, ..here })),
                    Fault::Count => mine[at] = Some(Op { count: here.count + 1, ..here }),
                    Fault::Kind => mine[at] = Some(Op { kind: "Int64", ..here }),
                }
            }
            mine
        })
        .collect()
}

#[test]
fn the_rank_with_the_fault_is_blamed() {
    let mut random = Random(7);
    for case in 0..600 {
        let (tp, dp) = [(2, 1), (4, 1), (1, 3), (2, 2), (4, 2), (2, 5)][random.next(6)];
        let fault = [Fault::Stops, Fault::Dies, Fault::Extra, Fault::Count, Fault::Kind][random.next(5)];
        let (len, rank) = (1 + random.next(60), random.next(tp * dp));
        let (at, keep) = (random.next(len), 12 + random.next(60));
        let programs = programs(&mut random, tp, dp, len, fault, rank, at);
        let dead = (fault == Fault::Dies).then_some(rank);
        let dumps = simulate(&programs, tp, dp, keep, dead);
        let about = format!("case {case}: {fault:?} of rank {rank} at call {at} of {len}, tp {tp} x dp {dp}");
        let next = programs[rank][at].or(programs[rank].get(at + 1).copied().flatten()).unwrap();
        let group = members(next.axis, rank, tp, dp);
        let seq = programs[rank][..at].iter().flatten().filter(|op| op.axis == next.axis).count() as u64;
        let found = parting(&dumps).unwrap_or_else(|| panic!("{about}: nothing found"));
        match (&found, fault) {
            (Parting::Behind { axis, members, seq: at, missing, .. }, Fault::Stops | Fault::Dies) => {
                assert_eq!(missing, &[rank], "{about}");
                assert_eq!((axis.as_str(), members, *at), (AXES[next.axis], &group, seq), "{about}: {found:?}");
            }
            (Parting::Unequal { axis, members, seq: at, odd, .. }, Fault::Extra | Fault::Count | Fault::Kind) => {
                assert_eq!((axis.as_str(), members, *at), (AXES[next.axis], &group, seq), "{about}: {found:?}");
                if group.len() > 2 {
                    assert_eq!(odd, &[rank], "{about}");
                } else {
                    assert_eq!(odd, &group, "{about}: of two, either may be the odd one");
                }
            }
            _ => panic!("{about}: {found:?}"),
        }
        let text = verdict(&dumps, tp * dp);
        assert!(text.contains(&format!("rank {rank}")) || group.len() == 2, "{about}: {text}");
        assert!(text.contains(&format!("{seq} of {} ", AXES[next.axis])), "{about}: {text}");
    }
}

#[test]
fn ranks_that_agree_are_not_blamed() {
    let mut random = Random(3);
    for _ in 0..100 {
        let (tp, dp) = [(2, 1), (2, 2), (4, 2)][random.next(3)];
        let programs = programs(&mut random, tp, dp, 40, Fault::None, 0, 0);
        let dumps = simulate(&programs, tp, dp, 30, None);
        assert_eq!(parting(&dumps), None);
        assert_eq!(verdict(&dumps, tp * dp), "the ranks agree: nobody waits in a collective");
    }
}

/// Rank 0 of a row calls over all ranks first, its neighbour over the row.
#[test]
fn orders_over_two_communicators_that_differ_are_a_circle() {
    let (row, all) = (1, 0);
    let op = |axis| Some(Op { axis, op: "all_reduce", kind: "Float", count: 3 });
    let good = vec![op(row), op(all)];
    let programs = vec![vec![op(all), op(row)], good.clone(), good.clone(), good];
    let dumps = simulate(&programs, 2, 2, 100, None);
    let found = parting(&dumps).unwrap();
    assert!(matches!(&found, Parting::Circle { ranks, .. } if ranks == &[0, 1, 2, 3]), "{found:?}");
    let text = verdict(&dumps, 4);
    assert!(text.contains("different orders") && text.contains("rank 1: all_reduce 0 of tp [0, 1]"), "{text}");
}

#[test]
fn a_rank_that_was_stopped_inside_a_collective_is_found() {
    let programs = vec![vec![Some(Op { axis: 0, op: "all_reduce", kind: "Float", count: 3 })]; 2];
    let mut dumps = simulate(&programs, 1, 2, 10, None);
    for dump in &mut dumps {
        dump.calls[0].state = CallState::Started;
        dump.waiting = Some(Waiting { what: "all_reduce 0".to_owned(), seconds: 6.0, call: Some(0), device: false });
    }
    let text = verdict(&dumps, 2);
    assert!(text.starts_with("ranks [0, 1] are all in all_reduce 0 since 6.0 s"), "{text}");
    dumps[1].stood_still = 6.5;
    assert_eq!(parting(&dumps).unwrap().ranks(), [1]);
    let text = verdict(&dumps, 2);
    assert!(
        text.contains("rank 1 on host: step 2, waits for all_reduce 0") && text.contains("stood still for 6 s"),
        "{text}"
    );
}

/// On a device the host runs ahead: who has queued less is behind.
#[test]
fn a_rank_that_has_queued_less_is_behind() {
    let op = Some(Op { axis: 0, op: "all_reduce", kind: "BFloat16", count: 8 });
    let mut dumps = simulate(&vec![vec![op; 3], vec![op; 6]], 1, 2, 10, None);
    for call in &mut dumps[1].calls {
        call.state = CallState::Queued;
    }
    dumps[1].waiting = Some(Waiting { what: "the device".to_owned(), seconds: 9.0, call: None, device: true });
    let found = parting(&dumps).unwrap();
    assert!(matches!(&found, Parting::Behind { seq: 3, missing, .. } if missing == &[0]), "{found:?}");
}

/// Records taken while all is well are some time apart.
#[test]
fn records_that_were_asked_for_blame_nobody_for_a_moment() {
    let op = Some(Op { axis: 0, op: "all_reduce", kind: "Float", count: 8 });
    let mut dumps = simulate(&vec![vec![op; 3], vec![op; 4]], 1, 2, 10, None);
    let (quick, slow) = (0.6, 30.0);
    for (age, blamed) in [(quick, false), (slow, true)] {
        for (dump, time) in dumps.iter_mut().zip([100.0, 100.9]) {
            (dump.asked, dump.time) = (true, time);
        }
        let open = dumps[1].calls.last_mut().unwrap();
        open.age = age;
        dumps[1].waiting.as_mut().unwrap().seconds = age;
        assert_eq!(parting(&dumps).is_some(), blamed, "{age}");
    }
}

#[test]
fn the_report_shows_every_rank() {
    let mut random = Random(1);
    let programs = programs(&mut random, 2, 1, 9, Fault::Dies, 1, 5);
    let dumps = simulate(&programs, 2, 1, 100, Some(1));
    let failed = Failed { rank: 0, message: "no answer\nmore".to_owned(), time: 0.0 };
    let text = report(&dumps, 2, Some(&failed), crate::telemetry::table);
    assert!(text.starts_with("first to fail: rank 0: no answer\n"), "{text}");
    assert!(text.contains("\n  1     no record") && text.contains("rank 1 has left no record"), "{text}");
}
