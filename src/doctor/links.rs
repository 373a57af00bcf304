//! Clocks and links: what the ranks' collectives give, and how fast.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{Line, Verdict};
use crate::dist::{Group, Reduce, World};

/// All-reduces of one size over one group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Link {
    pub axis: &'static str,
    pub ranks: usize,
    pub bytes: usize,
    /// Of the slowest rank, the median of several.
    pub seconds: f64,
    /// Every element was what it should be, on every rank.
    pub right: bool,
}

impl Link {
    /// Bytes that each rank's link carries a second, by the usual ring.
    fn wire_rate(&self) -> f64 {
        2.0 * (self.ranks - 1) as f64 / self.ranks as f64 * self.bytes as f64 / self.seconds
    }

    pub(super) fn row(&self) -> Vec<String> {
        let size = match self.bytes {
            bytes if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
            bytes => format!("{} KiB", bytes >> 10),
        };
        let time = if self.seconds < 1e-3 {
            format!("{:.0} us", self.seconds * 1e6)
        } else {
            format!("{:.2} ms", self.seconds * 1e3)
        };
        let rate = if self.right { format!("{:.2}", self.wire_rate() / 1e9) } else { "WRONG SUMS".to_owned() };
        vec![self.axis.to_owned(), self.ranks.to_string(), size, time, rate]
    }
}

const SIZES: [usize; 5] = [4 << 10, 256 << 10, 4 << 20, 64 << 20, 512 << 20];

/// All-reduces over every group of more than one rank, up to `largest` bytes. All ranks call it.
pub(super) fn measure(device: Device, largest: usize, world: &World) -> Vec<Link> {
    let mut links = Vec::new();
    // all ranks go through the same groups; the worlds' one carries numbers of the host alone
    let groups = [("world", &world.world, Device::Cpu), ("tp", &world.tp, device), ("dp", &world.dp, device)];
    for (axis, group, device) in groups {
        if group.size() == 1 || (axis != "world" && group.size() == world.world.size() && device == Device::Cpu) {
            continue; // the same ranks over the same network
        }
        for bytes in SIZES.into_iter().filter(|&bytes| bytes <= largest) {
            let (seconds, right) = all_reduce(group, bytes, device);
            let mut worst = [seconds, f64::from(u8::from(!right))];
            world.world.all_reduce_f64(&mut worst, Reduce::Max);
            links.push(Link { axis, ranks: group.size(), bytes, seconds: worst[0], right: worst[1] == 0.0 });
        }
    }
    links
}

/// Sums that come out as whole numbers, so that every element can be checked exactly.
fn all_reduce(group: &Group, bytes: usize, device: Device) -> (f64, bool) {
    let count = (bytes / 4) as i64;
    let pattern = Tensor::arange(count, (Kind::Int64, device)).remainder(97).to_kind(Kind::Float);
    let (mine, size) = (group.rank() as f64, group.size() as f64);
    let expected = &pattern * size + size * (size - 1.0) / 2.0;
    let mut right = true;
    let mut times: Vec<f64> = (0..if bytes > 16 << 20 { 3 } else { 5 })
        .map(|_| {
            let mut tensor = &pattern + mine;
            group.barrier();
            let start = Instant::now();
            group.all_reduce(&mut tensor, Reduce::Sum);
            if device != Device::Cpu {
                group.barrier(); // waits for the device
            }
            let seconds = start.elapsed().as_secs_f64();
            right &= tensor.equal(&expected);
            seconds
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], right)
}

pub(super) fn judge(links: &[Link], world: &World) -> Line {
    if world.world.size() == 1 {
        return Line::new("all-reduce", Verdict::Pass, "one rank: nothing to sum", "");
    }
    if let Some(link) = links.iter().find(|link| !link.right) {
        let found = format!("wrong sums over {} at {} bytes", link.axis, link.bytes);
        return Line::new(
            "all-reduce",
            Verdict::Fail,
            found,
            "nothing computed over this link can be trusted; try another NIC, MPI or NCCL",
        );
    }
    let slowest =
        links.iter().filter(|link| link.bytes >= 4 << 20).min_by(|a, b| a.wire_rate().total_cmp(&b.wire_rate()));
    let Some(slowest) = slowest else { return Line::new("all-reduce", Verdict::Pass, "sums are right", "") };
    let rate = slowest.wire_rate() / 1e9;
    let found = format!("sums are right; {rate:.2} GB/s over {}", slowest.axis);
    // slower than a 1 Gbit/s network: something else is in the way
    let verdict = if rate < 0.1 { Verdict::Warn } else { Verdict::Pass };
    Line::new(
        "all-reduce",
        verdict,
        found,
        "slower than 1 Gbit/s: is the right network in use (btl_tcp_if_include, NCCL_SOCKET_IFNAME), are there more ranks than cores?",
    )
}

/// How far the ranks' clocks are apart: each reads its own right after a barrier, and the closest of several rounds counts. All ranks
/// call it.
pub(super) fn clocks(world: &World) -> Line {
    let mut closest: Option<(f64, usize)> = None;
    for _ in 0..10 {
        world.world.barrier();
        let now = std::time::UNIX_EPOCH.elapsed().map_or(0.0, |time| time.as_secs_f64());
        let all = world.world.gather_bytes(&now.to_le_bytes());
        let times: Vec<f64> =
            all.iter().map(|bytes| f64::from_le_bytes(bytes[..].try_into().expect("invariant: 8 bytes"))).collect();
        let furthest = times.iter().map(|time| (time - times[0]).abs()).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
        let Some((rank, apart)) = furthest else { continue };
        if closest.is_none_or(|(least, _)| apart < least) {
            closest = Some((apart, rank));
        }
    }
    let (apart, rank) = closest.unwrap_or_default();
    judge_clocks(apart, rank)
}

fn judge_clocks(apart: f64, rank: usize) -> Line {
    let found = format!("within {:.1} ms of rank 0's", apart * 1e3);
    match apart {
        apart if apart > 1.0 => {
            let found = format!("rank {rank}'s is {apart:.1} s from rank 0's");
            Line::new(
                "clocks",
                Verdict::Warn,
                found,
                "logs and flight records of hosts cannot be laid beside each other; start chrony or ntpd",
            )
        }
        _ => Line::new("clocks", Verdict::Pass, found, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::{Fault, run_threads, run_threads_with};

    #[test]
    fn right_sums_pass_and_wrong_ones_fail() {
        let examine = |world: World| {
            let links = measure(Device::Cpu, 300 << 10, &world);
            let line = judge(&links, &world);
            (line.verdict, line.found, links.len())
        };
        for (verdict, _, links) in run_threads(2, 2, examine) {
            assert_eq!((verdict, links), (Verdict::Pass, 6), "three groups, two sizes");
        }
        for (verdict, found, _) in run_threads_with(Fault::NoSum("dp"), 2, 2, examine) {
            assert_eq!(verdict, Verdict::Fail);
            assert_eq!(found, "wrong sums over dp at 4096 bytes");
        }
        assert_eq!(run_threads(2, 1, examine)[0].2, 2, "one group is enough where another has the same ranks");
    }

    #[test]
    fn clocks_that_are_apart_are_told() {
        assert_eq!(judge_clocks(0.002, 1).found, "within 2.0 ms of rank 0's");
        let line = judge_clocks(7.0, 3);
        assert_eq!((line.verdict, line.found.as_str()), (Verdict::Warn, "rank 3's is 7.0 s from rank 0's"));
        for line in run_threads(1, 3, |world| clocks(&world)) {
            assert_eq!(line.verdict, Verdict::Pass, "{line:?}");
        }
    }
}
