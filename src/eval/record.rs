//! Results of one evaluation and the files that hold them: `eval/LABEL.json` with all metrics, and `eval/LABEL/SET.jsonl` with
//! one line an item. Every aggregate can be computed again from the items.
//!
//! A number that cannot be computed is absent and a warning says why; it is never 0.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::EvalError;

/// Version of the files.
pub const FORMAT: u32 = 1;
/// Folder of the results in a run's folder.
pub const FOLDER: &str = "eval";

/// One model, evaluated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub format: u32,
    /// `step_000000` before training, `step_NNNNNN` during and after, or a name that was given.
    pub label: String,
    /// Optimizer steps that the model has behind it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<usize>,
    pub model: ModelFacts,
    pub config_digest: String,
    /// What was computed in: `bf16` or `f32`.
    pub precision: String,
    /// `chat`, or an explicit template's text.
    pub template: String,
    /// Digest of the texts of each set, by set.
    pub data: BTreeMap<String, String>,
    /// By name: `SUITE.METRIC` or `SET.METRIC`.
    pub metrics: BTreeMap<String, Metric>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub curves: BTreeMap<String, Curve>,
    pub warnings: Vec<String>,
    /// By suite.
    pub seconds: BTreeMap<String, f64>,
    /// By set; in files of their own, see [`Self::read_items`].
    #[serde(skip)]
    pub items: BTreeMap<String, Vec<Item>>,
}

/// Which model it was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    pub path: PathBuf,
    /// Of the weights; empty for a model in training, which its run and step identify.
    pub digest: String,
    pub family: String,
    pub parameters: i64,
}

/// One number about a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    pub value: f64,
    /// Items that it is an aggregate of.
    pub n: usize,
    /// File of those items, relative to the folder of the results; where it comes from several sets, the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub items: Option<String>,
    pub better: Better,
    /// Ends of the 95% confidence interval, where one was computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high: Option<f64>,
}

/// What a good model's number is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    Lower,
    Higher,
    /// Near that of a model that never saw the forget data.
    Retrained,
}

/// Metrics over the steps of an attack or of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Name of the entry of each point that is the abscissa.
    pub x: String,
    pub points: Vec<BTreeMap<String, f64>>,
}

/// One item of a set and what was measured of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// Place in the set, counted from 0.
    pub index: usize,
    pub prompt: String,
    pub answer: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
    /// Subject or other part of the set that the item belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Every number of the item by name.
    #[serde(flatten)]
    pub numbers: BTreeMap<String, f64>,
}

impl Metric {
    /// A number that `n` items give, without file and interval.
    pub fn new(value: f64, n: usize, better: Better) -> Self {
        Self { value, n, items: None, better, low: None, high: None }
    }

    /// With the ends of its 95% confidence interval.
    pub fn within(self, low: f64, high: f64) -> Self {
        Self { low: Some(low), high: Some(high), ..self }
    }
}

impl Evaluation {
    /// The label of a model with so many optimizer steps behind it.
    pub fn label_of(step: usize) -> String {
        format!("step_{step:06}")
    }

    /// Adds a metric of the items of `set`; one that is no finite number becomes a warning.
    pub fn put(&mut self, name: &str, set: Option<&str>, metric: Metric) {
        let Metric { value, low, high, .. } = metric;
        if !value.is_finite() {
            let told = set.map(|set| format!("; see the items of {set}")).unwrap_or_default();
            self.warn(format!("{name} is {value} and was left out{told}"));
            return;
        }
        let bound = |end: Option<f64>| end.filter(|end| end.is_finite());
        let items = set.map(|set| items_name(&self.label, set));
        self.metrics.insert(name.to_owned(), Metric { items, low: bound(low), high: bound(high), ..metric });
    }

    /// Adds a warning once.
    pub fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// The value of a metric.
    pub fn value(&self, name: &str) -> Option<f64> {
        Some(self.metrics.get(name)?.value)
    }

    /// Writes `RUN/eval/LABEL.json` and the items beside it; the file with the metrics comes last and whole.
    ///
    /// # Errors
    /// What cannot be written.
    pub fn write(&self, run: &Path) -> Result<PathBuf, EvalError> {
        let folder = run.join(FOLDER);
        for (set, items) in &self.items {
            write_items(&folder.join(items_name(&self.label, set)), items)?;
        }
        let path = folder.join(format!("{}.json", self.label));
        let text = serde_json::to_string_pretty(self).expect("invariant: results are JSON");
        write_whole(&path, &(text + "\n"))?;
        Ok(path)
    }

    /// Reads a file of metrics, without the items.
    ///
    /// # Errors
    /// A file that is missing or is not of this format.
    pub fn read(path: &Path) -> Result<Self, EvalError> {
        let text = fs::read_to_string(path).map_err(|source| EvalError::Read { path: path.to_owned(), source })?;
        let wrong = |reason: String| EvalError::Format { place: path.display().to_string(), reason };
        let value: Value = serde_json::from_str(&text).map_err(|e| wrong(format!("invalid JSON: {e}")))?;
        match value.get("format").and_then(Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(other) => return Err(wrong(format!("results of format {other}, this program reads {FORMAT}"))),
            None => return Err(wrong("no key \"format\": these are no results of an evaluation".to_owned())),
        }
        serde_json::from_value(value).map_err(|e| wrong(e.to_string()))
    }

    /// Reads the items of a set that stand beside the metrics at `path`.
    ///
    /// # Errors
    /// A file that is missing, or a line that is no item, with its number.
    pub fn read_items(&self, path: &Path, set: &str) -> Result<Vec<Item>, EvalError> {
        read_items(&path.with_file_name(items_name(&self.label, set)))
    }

    /// Reads the items of every set there is.
    ///
    /// # Errors
    /// As [`Self::read_items`].
    pub fn with_all_items(mut self, path: &Path) -> Result<Self, EvalError> {
        let folder = path.with_file_name(&self.label);
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".jsonl").map(str::to_owned));
        let mut names: Vec<String> = names.collect();
        names.sort();
        for set in names {
            let items = self.read_items(path, &set)?;
            self.items.insert(set, items);
        }
        Ok(self)
    }

    /// Files of metrics in a run's folder, by name: so evaluations of a run are in the order of their steps.
    pub fn files(run: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(run.join(FOLDER)).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        paths
    }
}

/// Writes items, one a line.
///
/// # Errors
/// What cannot be written.
pub fn write_items(path: &Path, items: &[Item]) -> Result<(), EvalError> {
    let line = |item: &Item| serde_json::to_string(item).expect("invariant: an item is JSON") + "\n";
    write_whole(path, &items.iter().map(line).collect::<String>())
}

/// Reads items, one a line.
///
/// # Errors
/// A file that is missing, or a line that is no item, with its number. A number that is null was none and is left out.
pub fn read_items(path: &Path) -> Result<Vec<Item>, EvalError> {
    let text = fs::read_to_string(path).map_err(|source| EvalError::Read { path: path.to_owned(), source })?;
    let parse = |(at, line): (usize, &str)| {
        let wrong = |e: serde_json::Error| EvalError::Format {
            place: format!("{}:{}", path.display(), at + 1),
            reason: format!("no item of an evaluation: {e}"),
        };
        let mut object: Map<String, Value> = serde_json::from_str(line).map_err(wrong)?;
        object.retain(|_, value| !value.is_null());
        serde_json::from_value(Value::Object(object)).map_err(wrong)
    };
    text.lines().enumerate().map(parse).collect()
}

fn items_name(label: &str, set: &str) -> String {
    format!("{label}/{set}.jsonl")
}

/// A reader sees the old file or the new one, never a part.
fn write_whole(path: &Path, text: &str) -> Result<(), EvalError> {
    let partial = path.with_extension("partial");
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&partial, text))
        .and_then(|()| fs::rename(&partial, path))
        .map_err(|source| EvalError::Write { path: path.to_owned(), source })
}

/// Results without metrics, for tests.
#[cfg(test)]
pub(super) fn empty(label: &str) -> Evaluation {
    Evaluation {
        format: FORMAT,
        label: label.to_owned(),
        step: None,
        model: ModelFacts::default(),
        config_digest: String::new(),
        precision: "f32".into(),
        template: "chat".into(),
        data: BTreeMap::new(),
        metrics: BTreeMap::new(),
        curves: BTreeMap::new(),
        warnings: Vec::new(),
        seconds: BTreeMap::new(),
        items: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation() -> Evaluation {
        let item = |index, probability| Item {
            index,
            prompt: "Who?".into(),
            answer: "Me\n\"so\"".into(),
            generation: (index == 1).then(String::new),
            group: None,
            numbers: [("probability".to_owned(), probability)].into(),
        };
        let mut evaluation = Evaluation {
            format: FORMAT,
            label: Evaluation::label_of(12),
            step: Some(12),
            model: ModelFacts { path: "m".into(), digest: "d".into(), family: "llama".into(), parameters: 7 },
            config_digest: "c".into(),
            precision: "f32".into(),
            template: "chat".into(),
            data: [("forget".to_owned(), "x".to_owned())].into(),
            metrics: BTreeMap::new(),
            curves: BTreeMap::new(),
            warnings: Vec::new(),
            seconds: BTreeMap::new(),
            items: [("forget".to_owned(), vec![item(0, 0.5), item(1, 0.25)])].into(),
        };
        evaluation.put("forget.probability", Some("forget"), Metric::new(0.375, 2, Better::Lower).within(0.1, 0.6));
        let point = [("step".to_owned(), 0.0), ("forget.probability".to_owned(), 0.01)];
        evaluation.curves.insert("attack.relearn".into(), Curve { x: "step".into(), points: vec![point.into()] });
        evaluation
    }

    #[test]
    fn results_survive_the_way_through_files() {
        let folder = tempfile::tempdir().unwrap();
        let written = evaluation();
        let path = written.write(folder.path()).unwrap();
        assert_eq!(path, folder.path().join("eval/step_000012.json"));
        assert_eq!(Evaluation::files(folder.path()), std::slice::from_ref(&path));
        let read = Evaluation::read(&path).unwrap();
        let named = read.metrics["forget.probability"].items.as_deref().unwrap();
        assert_eq!(read_items(&folder.path().join("eval").join(named)).unwrap(), written.items["forget"]);
        assert_eq!(read.with_all_items(&path).unwrap(), written);
    }

    #[test]
    fn a_number_that_is_none_is_left_out_and_told() {
        let mut evaluation = evaluation();
        evaluation.put("forget.rouge", Some("forget"), Metric::new(f64::NAN, 2, Better::Lower));
        assert_eq!(evaluation.value("forget.rouge"), None);
        assert_eq!(evaluation.warnings, ["forget.rouge is NaN and was left out; see the items of forget"]);
    }

    #[test]
    fn what_is_no_result_is_refused_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        fs::write(&path, "{\"format\": 2}").unwrap();
        assert!(Evaluation::read(&path).unwrap_err().to_string().contains("a.json: results of format 2"));
        let path = folder.path().join("a.jsonl");
        fs::write(&path, "{\"index\":0,\"prompt\":\"\",\"answer\":\"\",\"p\":null}\n{\"index\":1}\n").unwrap();
        let message = read_items(&path).unwrap_err().to_string();
        assert!(message.contains("a.jsonl:2: no item"), "{message}");
    }
}
