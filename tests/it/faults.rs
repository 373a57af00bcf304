//! Faults put in on purpose, in every phase of a run: the job ends within its deadline plus ten seconds, says why, and never hangs.

use std::fmt::Write as _;

use crate::program::{Finished, SHAPE, Workshop, meeting, mpirun};

/// Deadline of a step. Unit: seconds.
const TIMEOUT: f64 = 4.0;
/// What detection, records, and the launcher may take beyond the deadline. Unit: seconds.
const BEYOND: f64 = 10.0;

const RUN: &str = r#"
[run]
dir = "{runs}/run"
timeout = 4
[model]
path = "{data}/model"
init = "random"
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[method]
objective = "npo"
retain = "nll"
[train]
steps = 6
global_batch = 4
precision = "f32"
[optimizer]
lr = 1e-3
[checkpoint]
every = 2
resume = "never"
[eval]
every = 3
"#;

/// A fault, and the ranks among which it happens.
#[derive(Clone, Debug)]
struct Case {
    kind: &'static str,
    place: &'static str,
    count: usize,
    rank: usize,
    tp: usize,
    dp: usize,
    /// Ranks that mpirun has not started, and that nobody else ends.
    tcp: bool,
}

/// What came of it.
struct Outcome {
    /// From the fault to the end of the last process.
    seconds: Option<f64>,
    code: Option<i32>,
    success: bool,
    text: String,
}

impl Case {
    fn new(kind: &'static str, place: &'static str, count: usize, rank: usize) -> Self {
        Self { kind, place, count, rank, tp: 2, dp: 2, tcp: false }
    }

    fn fault(&self) -> String {
        format!("{}@{}.{}:{}", self.kind, self.place, self.count, self.rank)
    }

    /// Longest wait in the phase of the fault, as `run::stages` has it.
    fn deadline(&self) -> f64 {
        match (self.place, self.count) {
            ("eval", 1) | ("step", 1) => 2.0 * TIMEOUT,
            _ => TIMEOUT,
        }
    }

    fn run(&self, workshop: &Workshop, config: &str) -> Outcome {
        let (tp, fault) = (format!("parallel.tp={}", self.tp), self.fault());
        let arguments = ["--config", config, "--overwrite", "--set", &tp, "--fault", &fault];
        let ranks = self.tp * self.dp;
        let all = if self.tcp { meeting(ranks, &arguments) } else { vec![mpirun(ranks, &arguments)] };
        let end = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        let mut text: String = all.iter().map(|finished| finished.text.as_str()).collect();
        // the last words of a process that is killed may not get through, but they are in its log
        let log = workshop.path(&format!("run/logs/rank_{:05}.log", self.rank));
        text += &std::fs::read_to_string(log).unwrap_or_default();
        let put_in = text.split(&format!("fault {fault} put in at ")).nth(1);
        let put_in = put_in.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
        let of = |finished: &Finished| (finished.code, finished.success);
        let (code, _) = all.iter().map(of).find(|(_, success)| !success).unwrap_or(of(&all[0]));
        Outcome {
            seconds: put_in.map(|time| end - time),
            code,
            success: all.iter().all(|finished| finished.success),
            text,
        }
    }

    /// Complains about an outcome that is not what the fault deserves.
    fn judge(&self, outcome: &Outcome, workshop: &Workshop) {
        let about = format!("{self:?}: code {:?}\n{}", outcome.code, outcome.text);
        let seconds = outcome.seconds.unwrap_or_else(|| panic!("the fault never came: {about}"));
        if self.kind == "slow" {
            assert!(outcome.success, "{about}");
            return;
        }
        assert!(!outcome.success, "{about}");
        assert!(!workshop.path("run/summary.json").exists(), "a failed run looks finished: {about}");
        let limit = self.deadline() + BEYOND;
        assert!(seconds < limit, "{seconds:.1} s instead of {limit}: {about}");
        let named = |words: &[&str]| words.iter().any(|word| outcome.text.contains(word));
        let rank = format!("rank {}", self.rank);
        match self.kind {
            "panic" => assert!(named(&["injected panic"]), "{about}"),
            "error" => assert!(named(&["injected error"]), "{about}"),
            "kill" => assert!(named(&["signal", &rank]), "{about}"),
            "hang" | "stop" => {
                assert!(
                    named(&["no answer to"])
                        && named(&[
                            &format!("{rank} has not come to"),
                            &format!("{rank} has left no record"),
                            &format!("{rank} on ")
                        ]),
                    "{about}"
                );
            }
            "order" => {
                assert!(
                    named(&[
                        "part at number",
                        "different collectives",
                        "out of step",
                        "MPI: ",
                        "MPI Error",
                        "no answer to"
                    ]),
                    "{about}"
                );
            }
            other => panic!("no such kind: {other}"),
        }
    }

    fn row(&self, outcome: &Outcome) -> String {
        let launcher = if self.tcp { "TCP" } else { "mpirun" };
        let seconds = outcome.seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.1}"));
        let code = outcome.code.map_or_else(|| "signal".to_owned(), |code| code.to_string());
        let said = outcome.text.lines().find(|line| line.starts_with("error")).unwrap_or("-");
        let said: String = said.chars().take(110).collect();
        format!("| {} | {} x {} | {launcher} | {seconds} | {code} | {said} |", self.fault(), self.tp, self.dp)
    }
}

const HEAD: &str = "| fault | tp x dp | launcher | seconds to the end | exit code | said |\n|---|---|---|---|---|---|";

/// One of each kind, and of each phase. `launch/faults` puts in many at random.
#[test]
fn one_failing_rank_ends_all() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    for case in [
        Case::new("panic", "load", 1, 2),
        Case::new("error", "step", 2, 1),
        Case::new("error", "export", 1, 0),
        Case::new("kill", "eval", 1, 2),
        Case::new("hang", "save", 1, 3),
        Case::new("stop", "collective", 4, 2),
        Case::new("order", "collective", 1, 0),
        Case::new("slow", "step", 2, 1),
        Case { tcp: true, tp: 1, ..Case::new("hang", "step", 2, 0) },
    ] {
        let outcome = case.run(&workshop, &config);
        println!("{}", case.row(&outcome));
        case.judge(&outcome, &workshop);
    }
}

/// `DUNLEARN_FAULTS` faults drawn from `DUNLEARN_FAULTS_SEED`; none where the variable is not set.
#[test]
fn faults_at_random() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let Some(count) = number("DUNLEARN_FAULTS") else { return };
    let mut state = number("DUNLEARN_FAULTS_SEED").unwrap_or(1);
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    println!("{HEAD}");
    let (mut ends, mut longest) = (String::new(), 0.0f64);
    for _ in 0..count {
        let kind = ["panic", "error", "kill", "stop", "hang", "order", "slow"][next(7)];
        let (place, most) =
            [("load", 1), ("step", 6), ("collective", 30), ("eval", 3), ("save", 2), ("export", 1)][next(6)];
        let (tp, dp) = [(2, 2), (2, 1), (1, 2), (1, 3)][next(4)];
        let (rank, count) = (next(tp * dp), 1 + next(most));
        // a process that is stopped, and that no launcher ends, stays
        let tcp = kind != "stop" && next(4) == 0;
        let case = Case { kind, place, count, rank, tp, dp, tcp };
        let outcome = case.run(&workshop, &config);
        println!("{}", case.row(&outcome));
        case.judge(&outcome, &workshop);
        longest = longest.max(outcome.seconds.unwrap_or(0.0).min(if kind == "slow" { 0.0 } else { f64::MAX }));
        let _ = write!(ends, "{}", if outcome.success { '.' } else { 'x' });
    }
    println!("\n{count} faults, no hang; the longest end took {longest:.1} s");
}
