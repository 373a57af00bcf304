//! Where the ranks of a job part: their flight records, laid beside each other.
//!
//! Ranks of a communicator call the same collectives in the same order. So either two of them have called different things under
//! the same number, or some have not come to a number in which others wait. Who does not come may itself wait elsewhere: the
//! one to blame is at the end of that chain.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::flight::{Call, CallState, Dump, Failed, ranks, words};
use super::watchdog::{name_ranks, without_record};

/// Records that somebody asked for are not of one moment: shorter waits than their distance and this say nothing. Unit: seconds.
const NO_WAIT: f64 = 1.0;

/// Where and how the ranks part.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Parting {
    /// Ranks of a communicator have called different things under one number.
    Unequal { axis: String, members: Vec<usize>, seq: u64, odd: Vec<usize>, said: Vec<(usize, String)> },
    /// Ranks have not come to a collective in which others are.
    Behind {
        axis: String,
        members: Vec<usize>,
        seq: u64,
        call: String,
        missing: Vec<usize>,
        waiting: Vec<usize>,
        seconds: f64,
    },
    /// Each waits for another: the order of collectives on different communicators differs.
    Circle { ranks: Vec<usize>, said: Vec<(usize, String)> },
    /// All ranks are in the same collective and it does not end.
    Stuck { ranks: Vec<usize>, call: String, seconds: f64, stood_still: Vec<(usize, f64)> },
}

impl Parting {
    /// The ranks to look at.
    pub fn ranks(&self) -> &[usize] {
        match self {
            Self::Unequal { odd, .. } => odd,
            Self::Behind { missing, .. } => missing,
            Self::Circle { ranks, .. } => ranks,
            Self::Stuck { ranks, .. } => ranks,
        }
    }
}

/// A communicator as its ranks' records show it.
struct Channel<'a> {
    axis: &'a str,
    members: &'a [usize],
    /// What each rank with a record remembers of it.
    seen: BTreeMap<usize, Seen<'a>>,
}

struct Seen<'a> {
    dump: &'a Dump,
    /// Collectives begun, forgotten ones included.
    begun: u64,
    calls: BTreeMap<u64, &'a Call>,
}

/// Finds the first place where the ranks part; None where nothing is wrong.
pub fn parting(dumps: &[Dump]) -> Option<Parting> {
    let channels = channels(dumps);
    unequal(&channels).or_else(|| unmet(&channels, dumps))
}

fn channels(dumps: &[Dump]) -> Vec<Channel<'_>> {
    let mut found: BTreeMap<(&str, &[usize]), Channel> = BTreeMap::new();
    for dump in dumps {
        for (index, channel) in dump.channels.iter().enumerate() {
            let (axis, members) = (channel.axis.as_str(), channel.members.as_slice());
            let calls = dump.calls.iter().filter(|call| call.channel == index).map(|call| (call.seq, call)).collect();
            let entry = found.entry((axis, members));
            let entry = entry.or_insert_with(|| Channel { axis, members, seen: BTreeMap::new() });
            entry.seen.insert(dump.rank, Seen { dump, begun: channel.calls, calls });
        }
    }
    found.into_values().collect()
}

/// The earliest number under which ranks have called different things.
fn unequal(channels: &[Channel]) -> Option<Parting> {
    let mut first: Option<(f64, Parting)> = None;
    for channel in channels {
        let numbers: BTreeSet<u64> = channel.seen.values().flat_map(|seen| seen.calls.keys().copied()).collect();
        let differing = numbers.into_iter().find_map(|seq| {
            let said: Vec<(usize, &Call, f64)> = channel.calls(seq).collect();
            let signature = |call: &Call| (call.op.clone(), call.kind.clone(), call.count);
            let mut votes: BTreeMap<_, Vec<usize>> = BTreeMap::new();
            said.iter().for_each(|(rank, call, _)| votes.entry(signature(call)).or_default().push(*rank));
            (votes.len() > 1).then_some((seq, said, votes))
        });
        let Some((seq, said, votes)) = differing else { continue };
        let start = said.iter().map(|(_, _, start)| *start).fold(f64::INFINITY, f64::min);
        if first.as_ref().is_some_and(|(earlier, _)| *earlier <= start) {
            continue;
        }
        // the few are odd; where there is no majority, all are
        let most = votes.values().map(Vec::len).max().unwrap_or(0);
        let majority = votes.values().filter(|voters| voters.len() == most).count() == 1;
        let odd = votes.values().filter(|voters| !majority || voters.len() < most).flatten().copied();
        let mut odd: Vec<usize> = odd.collect();
        odd.sort_unstable();
        let said = said.into_iter().map(|(rank, call, _)| (rank, channel.words(call))).collect();
        let (axis, members) = (channel.axis.to_owned(), channel.members.to_vec());
        first = Some((start, Parting::Unequal { axis, members, seq, odd, said }));
    }
    first.map(|(_, parting)| parting)
}

impl Channel<'_> {
    /// What each rank called under a number, and when (Unix time).
    fn calls(&self, seq: u64) -> impl Iterator<Item = (usize, &Call, f64)> {
        self.seen.iter().filter_map(move |(&rank, seen)| {
            let call = *seen.calls.get(&seq)?;
            Some((rank, call, seen.dump.time - call.age))
        })
    }

    /// Members that have not begun a number, those without a record included.
    fn missing(&self, seq: u64) -> Vec<usize> {
        let absent = |rank: &&usize| self.seen.get(rank).is_none_or(|seen| seen.begun <= seq);
        self.members.iter().filter(absent).copied().collect()
    }

    fn words(&self, call: &Call) -> String {
        let channel = super::flight::Channel::named(self.axis, self.members);
        words(&call.op, call.seq, &channel, &call.kind, call.count, &call.site)
    }
}

/// A collective that some have entered and others have not.
struct Open<'a> {
    channel: &'a Channel<'a>,
    call: &'a Call,
    missing: Vec<usize>,
    /// Unix time of its first entry.
    start: f64,
    /// Longest wait in it so far.
    seconds: f64,
}

fn unmet(channels: &[Channel], dumps: &[Dump]) -> Option<Parting> {
    // what nobody asked for was written because something went wrong: every wait counts then
    let times = || dumps.iter().map(|dump| dump.time);
    let distance = times().fold(0.0, f64::max) - times().fold(f64::INFINITY, f64::min);
    let least = if dumps.iter().all(|dump| dump.asked) { NO_WAIT + distance } else { 0.0 };
    let mut open: Vec<Open> = Vec::new();
    for channel in channels {
        let numbers: BTreeSet<u64> = channel
            .seen
            .values()
            .flat_map(|seen| seen.calls.values())
            .filter(|call| call.state != CallState::Done && call.age >= least)
            .map(|call| call.seq)
            .collect();
        // later ones on the same communicator wait for the first
        let first = numbers.into_iter().find(|&seq| !channel.missing(seq).is_empty());
        if let Some(seq) = first {
            let calls = || channel.calls(seq).filter(|(_, call, _)| call.state != CallState::Done);
            let start = calls().map(|(_, _, start)| start).fold(f64::INFINITY, f64::min);
            let seconds = calls().map(|(_, call, _)| call.age).fold(0.0, f64::max);
            let call = calls().next().map(|(_, call, _)| call);
            open.extend(call.map(|call| Open { channel, call, missing: channel.missing(seq), start, seconds }));
        }
    }
    let blocked = |rank: usize| {
        let dump = dumps.iter().find(|dump| dump.rank == rank)?;
        let held = |state: CallState| {
            let mut calls = dump.calls.iter().filter(move |call| call.state == state);
            calls.find_map(|call| {
                let at = &dump.channels[call.channel];
                let same = |open: &&Open| open.channel.axis == at.axis && open.channel.members == at.members;
                open.iter().find(same).filter(|open| open.call.seq <= call.seq).map(|open| (open, call))
            })
        };
        match &dump.waiting {
            Some(waiting) if waiting.device => held(CallState::Queued),
            Some(_) => {
                let call = dump.waiting_call()?;
                let at = &dump.channels[call.channel];
                let same = |open: &&Open| open.channel.axis == at.axis && open.channel.members == at.members;
                open.iter().find(same).filter(|open| open.call.seq <= call.seq).map(|open| (open, call))
            }
            None => None,
        }
    };
    // who is missing somewhere and waits nowhere
    let free: BTreeSet<usize> =
        open.iter().flat_map(|open| &open.missing).copied().filter(|&rank| blocked(rank).is_none()).collect();
    let to_blame = open.iter().filter(|open| open.missing.iter().any(|rank| free.contains(rank)));
    if let Some(open) = to_blame.min_by(|a, b| a.start.total_cmp(&b.start)) {
        let missing: Vec<usize> = open.missing.iter().filter(|rank| free.contains(rank)).copied().collect();
        let waiting = open.channel.members.iter().filter(|rank| !open.missing.contains(rank)).copied().collect();
        return Some(Parting::Behind {
            axis: open.channel.axis.to_owned(),
            members: open.channel.members.to_vec(),
            seq: open.call.seq,
            call: open.channel.words(open.call),
            missing,
            waiting,
            seconds: open.seconds,
        });
    }
    if !open.is_empty() {
        let said: Vec<(usize, String)> =
            dumps.iter().filter_map(|dump| blocked(dump.rank).map(|(_, call)| (dump.rank, dump.words(call)))).collect();
        return Some(Parting::Circle { ranks: said.iter().map(|(rank, _)| *rank).collect(), said });
    }
    stuck(dumps, least)
}

/// All have come and still wait.
fn stuck(dumps: &[Dump], least: f64) -> Option<Parting> {
    let waits = dumps.iter().filter_map(|dump| Some((dump, dump.waiting.as_ref()?)));
    let waits = waits.filter(|(_, waiting)| (waiting.call.is_some() || waiting.device) && waiting.seconds >= least);
    let (dump, waiting) = waits.max_by(|(_, a), (_, b)| a.seconds.total_cmp(&b.seconds))?;
    let still = dumps.iter().filter(|dump| dump.stood_still > NO_WAIT);
    let stood_still: Vec<(usize, f64)> = still.map(|dump| (dump.rank, dump.stood_still)).collect();
    let members = dump.waiting_call().map(|call| dump.channels[call.channel].members.clone());
    let all = members.unwrap_or_else(|| vec![dump.rank]);
    let ranks = if stood_still.is_empty() { all } else { stood_still.iter().map(|(rank, _)| *rank).collect() };
    Some(Parting::Stuck { ranks, call: waiting.what.clone(), seconds: waiting.seconds, stood_still })
}

/// The parting in words; says what each rank to blame was doing.
pub fn verdict(dumps: &[Dump], world: usize) -> String {
    let gone = without_record(dumps, world);
    let no_record = "has left no record: stopped, killed, or its host or link is gone";
    let doing = |rank: usize| {
        let Some(dump) = dumps.iter().find(|dump| dump.rank == rank) else {
            return format!("  rank {rank} {no_record}");
        };
        let at = match &dump.waiting {
            Some(waiting) => format!("waits for {} since {:.1} s", waiting.what, waiting.seconds),
            None => match dump.calls.last() {
                Some(last) => format!("in no collective since {:.1} s, after {}", dump.idle_seconds, dump.words(last)),
                None => "in no collective yet".to_owned(),
            },
        };
        let still = dump.stood_still;
        let still = if still > NO_WAIT { format!("; the process stood still for {still:.0} s") } else { String::new() };
        format!("  rank {rank} on {}: {}, {at}{still}", dump.host, dump.phase)
    };
    let listed = |said: &[(usize, String)]| {
        // ranks with the same words in one line
        let mut by_words: Vec<(&str, Vec<usize>)> = Vec::new();
        for (rank, text) in said {
            match by_words.iter_mut().find(|(words, _)| words == text) {
                Some((_, of)) => of.push(*rank),
                None => by_words.push((text, vec![*rank])),
            }
        }
        by_words.into_iter().map(|(words, of)| format!("\n  {}: {words}", name_ranks(&of))).collect::<String>()
    };
    match parting(dumps) {
        None if gone.is_empty() => "the ranks agree: nobody waits in a collective".to_owned(),
        None => format!("{} {no_record}", name_ranks(&gone)),
        Some(Parting::Unequal { axis, members, seq, odd, said }) => {
            let who = name_ranks(&odd);
            format!("the ranks part at number {seq} of {axis} {}; odd: {who}{}", ranks(&members), listed(&said))
        }
        Some(Parting::Behind { call, missing, waiting, seconds, .. }) => {
            let has = if missing.len() == 1 { "has" } else { "have" };
            let (who, others) = (name_ranks(&missing), name_ranks(&waiting));
            let wait = if waiting.len() == 1 { "waits" } else { "wait" };
            let doing: Vec<String> = missing.iter().take(4).map(|&rank| doing(rank)).collect();
            format!("{who} {has} not come to {call}; {others} {wait} there since {seconds:.1} s\n{}", doing.join("\n"))
        }
        Some(Parting::Circle { said, .. }) => {
            format!("each waits for another, so their collectives come in different orders:{}", listed(&said))
        }
        Some(Parting::Stuck { call, seconds, stood_still, ranks: of }) if stood_still.is_empty() => {
            format!(
                "{} are all in {call} since {seconds:.1} s: the network, a device or a host stands still",
                name_ranks(&of)
            )
        }
        Some(Parting::Stuck { call, seconds, stood_still, .. }) => {
            let of: Vec<String> = stood_still.iter().map(|(rank, _)| doing(*rank)).collect();
            format!("all ranks have come to {call}, which lasts {seconds:.1} s\n{}", of.join("\n"))
        }
    }
}

/// What `dunlearn doctor flight` prints.
pub fn report(
    dumps: &[Dump],
    world: usize,
    failed: Option<&Failed>,
    table: impl Fn(&[&str], &[Vec<String>]) -> String,
) -> String {
    let rows: Vec<Vec<String>> = (0..world)
        .map(|rank| {
            let Some(dump) = dumps.iter().find(|dump| dump.rank == rank) else {
                let mut row = vec![rank.to_string(), "no record".to_owned()];
                row.resize(6, "-".to_owned());
                return row;
            };
            let calls: u64 = dump.channels.iter().map(|channel| channel.calls).sum();
            let (seconds, waits) = match &dump.waiting {
                Some(waiting) => (waiting.seconds, waiting.what.clone()),
                None => (dump.idle_seconds, "(in no collective)".to_owned()),
            };
            let (phase, host) = (dump.phase.clone(), dump.host.clone());
            vec![rank.to_string(), phase, host, calls.to_string(), format!("{seconds:.1}"), waits]
        })
        .collect();
    let head = ["rank", "phase", "host", "calls", "seconds", "waits for"];
    let first = failed.map_or_else(String::new, |failed| {
        let message = failed.message.lines().next().unwrap_or_default();
        format!("first to fail: rank {}: {message}\n\n", failed.rank)
    });
    format!("{first}{}\n{}\n", table(&head, &rows), verdict(dumps, world))
}

#[cfg(test)]
mod tests;
