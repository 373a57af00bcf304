//! Looks at ranks, hosts, disks and links before a run does: what is wrong is told in words, with what to do about it.
//!
//! Launched like a run. Every rank says what it sees of itself; the judgement is a function of what all have said, so every rank
//! comes to the same one.

mod disk;
mod facts;
mod links;

use serde::Serialize;

use crate::dist::World;
use crate::telemetry::table;

pub use facts::Facts;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Pass,
    /// A run works, but slower, or not everywhere.
    Warn,
    /// A run does not work, or cannot be trusted.
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    pub check: String,
    pub verdict: Verdict,
    pub found: String,
    /// What to do; empty where nothing is to be done.
    pub advice: String,
}

/// What the doctor is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// A folder of the file system that runs use.
    pub folder: std::path::PathBuf,
    /// Bytes that each rank writes there.
    pub file_bytes: usize,
    /// Largest all-reduce, in bytes.
    pub link_bytes: usize,
    /// What the ranks compute on, in words, and whether that is a GPU.
    pub device: tch::Device,
    pub about_device: String,
}

/// Everything that was found; the same on all ranks.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub verdict: Verdict,
    pub lines: Vec<Line>,
    pub links: Vec<links::Link>,
    pub ranks: Vec<Facts>,
}

impl Line {
    fn new(check: &str, verdict: Verdict, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let advice = if verdict == Verdict::Pass { String::new() } else { advice.into() };
        Self { check: check.to_owned(), verdict, found: found.into(), advice }
    }
}

/// Examines everything. All ranks call it.
pub fn examine(mine: &Facts, options: &Options, world: &World) -> Report {
    let text = serde_json::to_string(mine).expect("invariant: facts are JSON");
    let all = world.world.gather_bytes(text.as_bytes());
    let ranks: Vec<Facts> =
        all.iter().map(|text| serde_json::from_slice(text).expect("invariant: written by us above")).collect();
    let mut lines = facts::judge(&ranks);
    lines.push(facts::device(&options.about_device, options.device, &ranks));
    lines.push(links::clocks(world));
    lines.extend(disk::examine(&options.folder, options.file_bytes, world));
    let links = links::measure(options.device, options.link_bytes, world);
    lines.push(links::judge(&links, world));
    let verdict = lines.iter().map(|line| line.verdict).max().unwrap_or(Verdict::Pass);
    Report { verdict, lines, links, ranks }
}

impl Report {
    /// The tables for a person.
    pub fn text(&self) -> String {
        let word = |verdict| match verdict {
            Verdict::Pass => "pass",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        let width = self.lines.iter().map(|line| line.check.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for Line { check, verdict, found, advice } in &self.lines {
            text += &format!("  {}  {check:<width$}  {found}\n", word(*verdict));
            if !advice.is_empty() {
                text += &format!("        {:width$}  -> {advice}\n", "");
            }
        }
        if !self.links.is_empty() {
            let rows: Vec<Vec<String>> = self.links.iter().map(links::Link::row).collect();
            text += &format!("\n{}", table(&["all-reduce over", "ranks", "bytes", "time", "GB/s on the wire"], &rows));
        }
        let count = |verdict| self.lines.iter().filter(|line| line.verdict == verdict).count();
        let (fail, warn) = (count(Verdict::Fail), count(Verdict::Warn));
        text + &format!("\n  {} checks: {fail} fail, {warn} warn\n", self.lines.len())
    }
}
