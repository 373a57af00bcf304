//! Going on from a checkpoint: whether it belongs to this run, and what of the run folder is kept.

use std::path::Path;

use serde_json::Value;

use super::RunError;
use crate::checkpoint::{Saved, Store};
use crate::config::{self, Config, Resume};
use crate::eval::LikelihoodScores;

/// How a run begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    #[default]
    New,
    /// After this step.
    Resume(usize),
}

/// Tables and keys that may change from one start to the next: they decide how a run computes and what it reports, not what.
const FREE: [&str; 18] = [
    "run.dir",
    "run.device",
    "run.threads",
    "run.timeout",
    "run.status_addr",
    "run.allow_shared_gpu",
    "model.path",
    "parallel",
    "data.forget.path",
    "data.retain.path",
    "data.train.path",
    "train.micro_batch_tokens",
    "train.recompute",
    "train.logits_mib",
    "train.precision",
    "train.grad_dtype",
    "optimizer.state_dtype",
    "checkpoint",
];
const REPORTS: [&str; 2] = ["eval", "export"];

impl Start {
    /// What the configuration and the run folder ask for. Only one rank looks.
    ///
    /// # Errors
    /// In words, where `must` finds nothing to go on from.
    pub fn of(config: &Config, overwrite: bool) -> Result<Self, String> {
        let store = Store::of_run(&config.run.dir);
        let newest = store.steps().map_err(|error| error.to_string())?.last().copied();
        let finished = config.run.dir.join("summary.json").exists();
        match (config.checkpoint.resume, newest) {
            (Resume::Never, _) => Ok(Self::New),
            _ if overwrite => Ok(Self::New),
            (Resume::Must, None) => Err(format!(
                "checkpoint.resume = \"must\": {} has no complete checkpoint to go on from",
                store.folder().display()
            )),
            (_, Some(step)) if !finished => Ok(Self::Resume(step)),
            _ => Ok(Self::New),
        }
    }
}

/// Holds a checkpoint against what is about to run: every difference in model, data and configuration, in words.
pub fn differences(saved: &Saved, config: &Config, digests: &[(String, String)]) -> Vec<String> {
    let mut list = Vec::new();
    for (name, digest) in digests {
        let known = saved.manifest.digests.get(name);
        if known != Some(digest) {
            let known = known.map_or("none", String::as_str);
            list.push(format!("{name}: the checkpoint was made with digest {known}, this is {digest}"));
        }
    }
    let mut found = Vec::new();
    compare("", &saved.manifest.config, &config::to_json(config), &mut found);
    list.extend(found.into_iter().map(|(key, before, now)| {
        format!("{key}: the checkpoint was made with {before}, this configuration says {now}")
    }));
    list
}

fn compare(key: &str, before: &Value, now: &Value, found: &mut Vec<(String, String, String)>) {
    if FREE.contains(&key) || REPORTS.contains(&key) || before == now {
        return;
    }
    if let (Value::Object(a), Value::Object(b)) = (before, now) {
        let mut names: Vec<&String> = a.keys().chain(b.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            let side = |table: &serde_json::Map<String, Value>| table.get(name).cloned().unwrap_or(Value::Null);
            compare(&path, &side(a), &side(b), found);
        }
        return;
    }
    let text = |value: &Value| if value.is_null() { "(not set)".to_owned() } else { value.to_string() };
    found.push((key.to_owned(), text(before), text(now)));
}

/// Scores by the set's name.
pub type Scores = Vec<(String, LikelihoodScores)>;

/// What `metrics.jsonl` says of the time up to `step`.
#[derive(Default)]
pub struct Past {
    /// The lines that stay: those of later steps belong to work that is done again.
    pub lines: Vec<String>,
    pub before: Scores,
    pub during: Vec<(usize, Scores)>,
    /// That went through the model in training, and how long that took.
    pub tokens: usize,
    pub seconds: f64,
}

impl Past {
    /// Reads the file; a last line that was cut off is left out.
    pub fn read(path: &Path, step: usize) -> Result<Self, RunError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| crate::checkpoint::CheckpointError::Read { path: path.to_owned(), source })?;
        let (mut past, mut steps) = (Self::default(), 0);
        for line in text.lines() {
            let Ok(json) = serde_json::from_str::<Value>(line) else { continue };
            let at = json["step"].as_u64().map(|at| at as usize);
            if at.is_some_and(|at| at > step) {
                continue;
            }
            if let (Some(at), Ok(scores)) = (at, serde_json::from_value::<Scores>(json["eval"].clone())) {
                match at {
                    0 => past.before = scores,
                    at => past.during.push((at, scores)),
                }
            }
            past.tokens += json["tokens"].as_u64().unwrap_or(0) as usize;
            past.seconds += json["step_s"].as_f64().unwrap_or(0.0);
            past.lines.push(line.to_owned());
            steps += usize::from(json["step_s"].is_number());
        }
        if steps < step {
            tracing::warn!(
                "{} has {steps} of the {step} steps before: the others' tokens and seconds do not count",
                path.display()
            );
        }
        Ok(past)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn only_what_changes_the_result_is_a_difference() {
        let before = json(r#"{"run":{"dir":"a","seed":0},"parallel":{"tp":2},"train":{"epochs":3,"precision":"f32"}}"#);
        let same = json(r#"{"run":{"dir":"b","seed":0},"parallel":{"tp":8},"train":{"epochs":3,"precision":"bf16"}}"#);
        let mut found = Vec::new();
        compare("", &before, &same, &mut found);
        assert!(found.is_empty(), "{found:?}");
        let other = json(r#"{"run":{"dir":"b","seed":0},"parallel":{"tp":8},"train":{"steps":9,"precision":"f32"}}"#);
        compare("", &before, &other, &mut found);
        let words = |key: &str, before: &str, now: &str| (key.to_owned(), before.to_owned(), now.to_owned());
        assert_eq!(found, [words("train.epochs", "3", "(not set)"), words("train.steps", "(not set)", "9")]);
    }

    #[test]
    fn work_that_is_done_again_is_cut_from_the_metrics() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines = [
            r#"{"version":"0"}"#,
            r#"{"step":0,"eval":[["forget",{"probability":0.5,"token_accuracy":1.0,"nll":0.1,"samples":1,"tokens":2}]]}"#,
            r#"{"step":1,"loss":1.0,"tokens":70,"step_s":0.5}"#,
            r#"{"step":2,"loss":1.0,"tokens":80,"step_s":0.5}"#,
            r#"{"step":3,"los"#,
        ];
        std::fs::write(&path, lines.join("\n")).unwrap();
        let past = Past::read(&path, 1).unwrap();
        assert_eq!(past.lines, lines[..3]);
        assert_eq!(past.before[0].1.probability, 0.5);
        assert_eq!((past.tokens, past.seconds), (70, 0.5));
    }
}
