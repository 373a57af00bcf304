//! A run folder as a report needs it: `summary.json`, `config.toml`, `metrics.jsonl`, `eval/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::eval::record::{FOLDER, FORMAT};
use crate::eval::{Better, EvalError, Evaluation, Metric, ModelFacts};

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("{} is no run folder: no summary.json, no metrics.jsonl and no eval/*.json in it; a run's folder is its run.dir", .0.display())]
    NoRun(PathBuf),

    #[error("{}:{line}: {reason}; expected one JSON object a line", path.display())]
    Line { path: PathBuf, line: usize, reason: String },

    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },

    #[error(transparent)]
    Eval(#[from] EvalError),
}

/// One run, finished or not.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Name of its folder, with as much of the path as tells it from the others.
    pub name: String,
    /// `config.toml`, empty where there is none.
    pub config: String,
    /// `summary.json`; None: the run has not come to its end.
    pub summary: Option<Value>,
    /// Numbers of each optimizer step, `metrics.jsonl`.
    pub steps: Vec<BTreeMap<String, f64>>,
    /// In the order of steps, with their items.
    pub evaluations: Vec<Evaluation>,
    /// Of a model that never saw the forget data.
    pub retrained: Option<Evaluation>,
    /// Of the model before unlearning, where it was evaluated apart.
    pub original: Option<Evaluation>,
}

/// Reads run folders.
///
/// # Errors
/// A folder that holds nothing of a run, or a file that is not what a run writes.
pub fn read(folders: &[PathBuf]) -> Result<Vec<Run>, ReportError> {
    let mut runs: Vec<Run> = folders.iter().map(|folder| Run::read(folder)).collect::<Result<_, _>>()?;
    for (run, name) in runs.iter_mut().zip(names(folders)) {
        run.name = name;
    }
    Ok(runs)
}

impl Run {
    fn read(folder: &Path) -> Result<Self, ReportError> {
        let summary = folder.join("summary.json");
        let summary = if summary.exists() { Some(json(&summary)?) } else { None };
        let metrics = folder.join("metrics.jsonl");
        let steps = if metrics.exists() { steps(&metrics)? } else { Vec::new() };
        let mut run = Self {
            config: fs::read_to_string(folder.join("config.toml")).unwrap_or_default(),
            summary,
            steps,
            ..Self::default()
        };
        for path in Evaluation::files(folder) {
            let evaluation = Evaluation::read(&path)?.with_all_items(&path)?;
            match evaluation.label.as_str() {
                "retrained" => run.retrained = Some(evaluation),
                "original" => run.original = Some(evaluation),
                _ => run.evaluations.push(evaluation),
            }
        }
        // the model without a step is one that was evaluated by itself: the last word
        run.evaluations.sort_by_key(|evaluation| evaluation.step.unwrap_or(usize::MAX));
        if run.evaluations.is_empty() {
            run.evaluations = run.summary.as_ref().map(of_summary).unwrap_or_default();
        }
        if run.summary.is_none() && run.steps.is_empty() && run.evaluations.is_empty() {
            return Err(ReportError::NoRun(folder.to_owned()));
        }
        let other = |name: &str| other_model(folder, &run.config, name, run.evaluations.last()?);
        let (retrained, original) = (other("retrained"), other("original"));
        run.retrained = run.retrained.take().or(retrained);
        run.original = run.original.take().or(original);
        Ok(run)
    }

    /// The evaluation before the first step.
    pub fn before(&self) -> Option<&Evaluation> {
        self.evaluations.iter().find(|evaluation| evaluation.step == Some(0)).or(self.original.as_ref())
    }

    /// The last evaluation, if it is not the one before the first step.
    pub fn after(&self) -> Option<&Evaluation> {
        self.evaluations.last().filter(|evaluation| evaluation.step != Some(0))
    }

    /// A setting of the run, such as `["method", "objective"]`.
    pub(super) fn setting(&self, path: &[&str]) -> Option<String> {
        setting(&self.config, path)
    }

    /// A number of the summary, by a path like `/mesh/tp`.
    pub(super) fn fact(&self, pointer: &str) -> Option<&Value> {
        self.summary.as_ref()?.pointer(pointer).filter(|value| !value.is_null())
    }
}

/// The shortest ends of the paths that tell them apart.
fn names(folders: &[PathBuf]) -> Vec<String> {
    let whole: Vec<PathBuf> = folders.iter().map(|folder| folder.canonicalize().unwrap_or(folder.clone())).collect();
    let end = |path: &Path, parts: usize| {
        let mut last: Vec<String> =
            path.components().rev().take(parts).map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        last.reverse();
        last.join("/")
    };
    let unique = |parts: usize| {
        let mut ends: Vec<String> = whole.iter().map(|path| end(path, parts)).collect();
        ends.sort();
        ends.windows(2).all(|pair| pair[0] != pair[1])
    };
    let deepest = whole.iter().map(|path| path.components().count()).max().unwrap_or(1);
    let parts = (1..=deepest).find(|&parts| unique(parts)).unwrap_or(1);
    whole.iter().map(|path| end(path, parts)).collect()
}

/// A value of a TOML document as text.
fn setting(config: &str, path: &[&str]) -> Option<String> {
    let table: toml::Table = config.parse().ok()?;
    let (first, rest) = path.split_first()?;
    let value = rest.iter().try_fold(table.get(*first)?, |value, key| value.get(key))?;
    Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

/// Results of the model that the configuration names as `eval.retrained` or `eval.original`: what the run has kept of it in its cache, else the
/// file of results or the last results of the run folder that is named. They must be of the same items as `like`.
fn other_model(folder: &Path, config: &str, name: &str, like: &Evaluation) -> Option<Evaluation> {
    let path = PathBuf::from(setting(config, &["eval", name])?);
    let cache = setting(config, &["eval", "cache"]).map_or_else(|| folder.join("cache/eval"), PathBuf::from);
    let kept = fs::read_dir(cache).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = kept.map(|entry| entry.path().join(FOLDER).join(format!("{name}.json"))).collect();
    files.sort();
    let of_it = |one: &Evaluation| one.model.path == path || one.model.path == path.join("model");
    let read = |file: &PathBuf| Evaluation::read(file).ok()?.with_all_items(file).ok();
    let same = |one: &Evaluation| like.data.iter().all(|(set, digest)| one.data.get(set).is_none_or(|it| it == digest));
    let direct = if path.is_file() { Some(path.clone()) } else { Evaluation::files(&path).pop() };
    let cached = files.iter().filter_map(read).find(|one| of_it(one) && same(one));
    cached.or_else(|| direct.as_ref().and_then(read).filter(same))
}

fn json(path: &Path) -> Result<Value, ReportError> {
    let wrong = |reason: String| ReportError::File { path: path.to_owned(), reason };
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| wrong(format!("invalid JSON: {error}")))
}

/// Lines with a loss; those of evaluations are told elsewhere. A number that was none is null in the file and absent here.
fn steps(path: &Path) -> Result<Vec<BTreeMap<String, f64>>, ReportError> {
    let text = fs::read_to_string(path)
        .map_err(|error| ReportError::File { path: path.to_owned(), reason: error.to_string() })?;
    let mut lines: Vec<&str> = text.lines().collect();
    if !text.ends_with('\n') {
        lines.pop(); // a run that goes on may be writing it
    }
    let mut steps = Vec::new();
    for (at, line) in lines.into_iter().enumerate() {
        let wrong = |reason: String| ReportError::Line { path: path.to_owned(), line: at + 1, reason };
        let object: Map<String, Value> = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        if object.contains_key("loss") {
            steps.push(object.into_iter().filter_map(|(key, value)| Some((key, value.as_f64()?))).collect());
        }
    }
    Ok(steps)
}

/// What a run without `eval/` tells in its summary: the likelihood of each set before, during and after.
fn of_summary(summary: &Value) -> Vec<Evaluation> {
    let mut found: BTreeMap<usize, Evaluation> = BTreeMap::new();
    let last = summary["steps"].as_u64().unwrap_or(0) as usize;
    let mut add = |step: usize, set: &str, scores: &Value| {
        let evaluation = found.entry(step).or_insert_with(|| empty(step, summary));
        let forget = set == "forget";
        for (key, name, better) in [
            ("probability", "probability", if forget { Better::Lower } else { Better::Higher }),
            ("token_accuracy", "token_accuracy", if forget { Better::Lower } else { Better::Higher }),
            ("nll", "loss", if forget { Better::Higher } else { Better::Lower }),
        ] {
            let n = scores["samples"].as_u64().unwrap_or(0) as usize;
            if let Some(value) = scores[key].as_f64() {
                evaluation.put(&format!("{set}.{name}"), None, Metric::new(value, n, better));
            }
        }
    };
    for (set, numbers) in summary.as_object().into_iter().flatten() {
        for (key, step) in [("before", 0), ("after", last)] {
            if let Some(scores) = numbers.get(key).filter(|scores| scores.is_object()) {
                add(step, set, scores);
            }
        }
        for pair in numbers.get("during").and_then(Value::as_array).into_iter().flatten() {
            if let Some(step) = pair[0].as_u64() {
                add(step as usize, set, &pair[1]);
            }
        }
    }
    found.into_values().collect()
}

fn empty(step: usize, summary: &Value) -> Evaluation {
    let text = |pointer: &str| summary.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    Evaluation {
        format: FORMAT,
        label: Evaluation::label_of(step),
        step: Some(step),
        model: ModelFacts {
            path: text("/model/path").into(),
            digest: if step == 0 { text("/model/digest") } else { String::new() },
            family: text("/model/family"),
            parameters: summary.pointer("/model/parameters").and_then(Value::as_i64).unwrap_or(0),
        },
        config_digest: text("/config_digest"),
        precision: text("/precision"),
        template: String::new(),
        data: BTreeMap::new(),
        metrics: BTreeMap::new(),
        curves: BTreeMap::new(),
        warnings: Vec::new(),
        seconds: BTreeMap::new(),
        items: BTreeMap::new(),
    }
}
