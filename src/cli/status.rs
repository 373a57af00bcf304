//! The verb `status`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::ending;
use crate::eval::compare::number;
use crate::telemetry::{Life, Status};

/// Exit code 0: running, finished, or stopped and saved; 1: dead or failed.
#[derive(Debug, Args)]
pub(super) struct StatusOptions {
    /// Run folder
    run: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn status(options: &StatusOptions) -> anyhow::Result<()> {
    let status = Status::read(&options.run).map_err(anyhow::Error::msg)?;
    let now = std::time::UNIX_EPOCH.elapsed().map_or(0.0, |time| time.as_secs_f64());
    let host = sysinfo::System::host_name().unwrap_or_default();
    let life = status.life(now, &host, lives);
    let results = if life == Life::Finished { Results::read(&options.run) } else { Results::default() };
    if options.json {
        let mut object = serde_json::to_value(&status)?;
        object["alive"] = (life == Life::Running).into();
        object["dead"] = matches!(life, Life::Dead(_)).into();
        if !results.sets.is_empty() {
            object["results"] = serde_json::to_value(&results.sets)?;
        }
        println!("{}", serde_json::to_string_pretty(&object)?);
    } else {
        print!("{}", text(&status, life, now, &options.run, &results));
    }
    if matches!(life, Life::Dead(_) | Life::Failed) {
        ending::answer_no();
    }
    Ok(())
}

/// Whether a process of this host runs this program; one that ended and was not fetched does not.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((name, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')) else { return false };
    name.starts_with("dunlearn") && !rest.trim_start().starts_with('Z')
}

/// What a run that came to its end has written into its summary.
#[derive(Debug, Default)]
struct Results {
    /// Answer probability of each set before and after, where they were measured.
    sets: BTreeMap<String, BTreeMap<&'static str, f64>>,
    model: Option<String>,
}

impl Results {
    /// Empty where there is no summary that can be read.
    fn read(run: &Path) -> Self {
        let text = std::fs::read_to_string(run.join("summary.json")).unwrap_or_default();
        Self::of(&serde_json::from_str(&text).unwrap_or_default())
    }

    fn of(summary: &Value) -> Self {
        let probability = |set: &Value, when: &'static str| Some((when, set[when]["probability"].as_f64()?));
        let measured = |set: &Value| ["before", "after"].iter().filter_map(|when| probability(set, when)).collect();
        let sets = summary.as_object().into_iter().flatten().map(|(name, set)| (name.clone(), measured(set)));
        let sets = sets.filter(|(_, measured): &(_, BTreeMap<_, _>)| !measured.is_empty()).collect();
        Self { sets, model: summary["export"].as_str().map(str::to_owned) }
    }
}

fn text(status: &Status, life: Life, now: f64, run: &Path, results: &Results) -> String {
    let Status { step, steps, phase, host, pid, ranks, tp, dp, .. } = status;
    let mut rows: Vec<(&str, String)> = Vec::new();
    let state = match life {
        Life::Running => format!("running: {phase} for {}", span(status.phase_seconds + now - status.updated)),
        Life::Finished => {
            format!("finished {} ago, after {}", span(now - status.updated), span(status.updated - status.started))
        }
        Life::Stopped => "stopped and saved; the same command goes on".to_owned(),
        Life::Failed => format!("failed in {phase}"),
        Life::Dead(silent) => format!("dead: no sign of life for {}, last in {phase}", span(silent)),
    };
    rows.push(("state", state));
    if let Some(message) = &status.message {
        rows.push(("why", message.replace('\n', "\n          ")));
    }
    let share = if *steps > 0 { format!(" ({:.0} %)", *step as f64 / *steps as f64 * 100.0) } else { String::new() };
    rows.push(("step", format!("{step} of {steps}{share}")));
    if let (Some(seconds), Some(tokens)) = (status.step_seconds, status.tokens_per_s) {
        rows.push(("rate", format!("{seconds:.2} s a step, {tokens:.0} tokens/s")));
    }
    if let Some(loss) = status.loss {
        rows.push(("loss", format!("{loss:.4}")));
    }
    if let Some(left) = status.seconds_left.filter(|_| life == Life::Running) {
        rows.push(("left", format!("{} of steps", span(left))));
    }
    for (set, measured) in &results.sets {
        let value = |when| measured.get(when).map_or_else(|| "not measured".to_owned(), |&value| number(value));
        rows.push((set, format!("answer probability {} before, {} after", value("before"), value("after"))));
    }
    if let Some(model) = &results.model {
        rows.push(("model", model.clone()));
    }
    let gib = |bytes: u64| bytes as f64 / 1073741824.0;
    let device =
        if status.device_bytes > 0 { format!(", device {:.2} GiB", gib(status.device_bytes)) } else { String::new() };
    rows.push(("memory", format!("{:.2} GiB on rank 0{device}", gib(status.rss_bytes))));
    let saved = status.checkpoint.map_or_else(
        || "none yet".to_owned(),
        |saved| format!("after step {}, {} ago", saved.step, span(now - saved.time)),
    );
    if life != Life::Finished || status.checkpoint.is_some() {
        rows.push(("saved", saved));
    }
    rows.push(("ranks", format!("{ranks} (tp {tp} x dp {dp}); rank 0 is process {pid} on {host}")));
    if life != Life::Finished {
        rows.push(("since", format!("{} ago", span(now - status.started))));
    }
    if let Some(address) = status.address.as_ref().filter(|_| life == Life::Running) {
        rows.push(("http", format!("http://{address}/status.json, /metrics")));
    }
    if matches!(life, Life::Failed | Life::Dead(_)) && run.join("flight").is_dir() {
        rows.push(("next", format!("dunlearn doctor flight {}", run.display())));
    }
    rows.into_iter().map(|(name, value)| format!("  {name:<8}{value}\n")).collect()
}

/// `42 s`, `7 min`, `3.5 h`.
fn span(seconds: f64) -> String {
    match seconds.max(0.0) {
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds if seconds < 7200.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{RunState, Saved};

    #[test]
    fn the_text_says_what_matters() {
        let status = Status {
            phase: "step 13".to_owned(),
            phase_seconds: 2.0,
            step: 12,
            steps: 48,
            step_seconds: Some(2.5),
            tokens_per_s: Some(1000.0),
            seconds_left: Some(90.0),
            checkpoint: Some(Saved { step: 10, time: 400.0 }),
            updated: 999.0,
            started: 100.0,
            ..Status::default()
        };
        let running = text(&status, Life::Running, 1000.0, Path::new("runs/x"), &Results::default());
        for expected in [
            "state   running: step 13 for 3 s",
            "step    12 of 48 (25 %)",
            "rate    2.50 s a step, 1000 tokens/s",
            "left    90 s of steps",
            "saved   after step 10, 10 min ago",
            "since   15 min ago",
        ] {
            assert!(running.contains(expected), "{expected}: {running}");
        }
        let dead = text(&status, Life::Dead(9000.0), 9999.0, Path::new("runs/x"), &Results::default());
        assert!(dead.contains("dead: no sign of life for 2.5 h, last in step 13") && !dead.contains("left"), "{dead}");
        let failed = Status { state: RunState::Failed, message: Some("rank 1\nis gone".to_owned()), ..status };
        let failed = text(&failed, Life::Failed, 1000.0, Path::new("runs/x"), &Results::default());
        assert!(
            failed.contains("failed in step 13") && failed.contains("why     rank 1\n          is gone"),
            "{failed}"
        );
    }

    #[test]
    fn a_finished_run_says_so_and_what_came_of_it() {
        let status = Status {
            state: RunState::Finished,
            step: 48,
            steps: 48,
            loss: Some(0.125),
            updated: 400.0,
            started: 100.0,
            ..Status::default()
        };
        let summary = serde_json::json!({
            "steps": 48, "export": "runs/x/model", "model": { "family": "llama" },
            "forget": { "before": { "probability": 0.9812 }, "after": { "probability": 0.0417 } },
            "retain": { "after": { "probability": 0.97 } },
        });
        let text = text(&status, Life::Finished, 1000.0, Path::new("runs/x"), &Results::of(&summary));
        for expected in [
            "state   finished 10 min ago, after 5 min",
            "step    48 of 48 (100 %)",
            "loss    0.1250",
            "forget  answer probability 0.9812 before, 0.0417 after",
            "retain  answer probability not measured before, 0.9700 after",
            "model   runs/x/model",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(!text.contains("saved") && !text.contains("since"), "{text}");
    }

    #[test]
    fn this_process_lives_and_another_program_does_not() {
        assert!(lives(std::process::id()));
        assert!(!lives(u32::MAX) && !lives(0));
    }
}
