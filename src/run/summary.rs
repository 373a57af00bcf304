//! `summary.json` and the table at the end: what ran, on what, how long, and the numbers before and after.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::{Context, Inputs, process};
use crate::abi::host;
use crate::config::{self, Config};
use crate::data::Stats;
use crate::dist::Reduce;
use crate::eval::LikelihoodScores;
use crate::eval::compare::number;
use crate::telemetry::{Console, table};

/// A run in numbers. The presence of the file says that the run came to its end.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub version: &'static str,
    pub config_digest: String,
    /// Name of the start that came to its end, under `dunlearn launch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launch: Option<String>,
    pub model: ModelLine,
    pub mesh: MeshLine,
    pub device: &'static str,
    pub precision: config::Precision,
    pub libraries: Value,
    pub data: BTreeMap<String, Stats>,
    pub steps: usize,
    /// From the start of the process.
    pub seconds: f64,
    pub training_seconds: f64,
    /// What the model before training says of the samples, before the first step; 0 where the cache had it.
    pub reference_seconds: f64,
    pub seconds_to_first_step: f64,
    /// Tokens through the model in training, all ranks, a second.
    pub tokens_per_s: f64,
    /// Largest of the ranks.
    pub peak_rss_bytes: u64,
    /// Largest of the ranks: what the device had given at the end, see `device_bytes` in `metrics.jsonl`; 0 on CPUs.
    pub peak_device_bytes: u64,
    /// Exported Hugging Face folder.
    pub export: Option<PathBuf>,
    pub warnings: Vec<String>,
    /// Each set's numbers before and after: `forget.before.probability` and so on.
    #[serde(flatten)]
    pub sets: BTreeMap<String, BeforeAfter>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ModelLine {
    pub path: PathBuf,
    pub family: &'static str,
    pub parameters: i64,
    /// Of the weights before training.
    pub digest: String,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct MeshLine {
    pub world: usize,
    pub tp: usize,
    pub dp: usize,
    pub sequence_parallel: bool,
    pub zero: bool,
}

/// Numbers of one set.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BeforeAfter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<LikelihoodScores>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<LikelihoodScores>,
    /// Evaluations in between, by step.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub during: Vec<(usize, LikelihoodScores)>,
}

/// All evaluations of a run: scores by the set's name.
#[derive(Clone, Debug, Default)]
pub struct Evaluations {
    pub before: Vec<(String, LikelihoodScores)>,
    pub during: Vec<(usize, Vec<(String, LikelihoodScores)>)>,
    pub after: Vec<(String, LikelihoodScores)>,
}

pub(super) struct Timing {
    pub(super) steps: usize,
    pub(super) tokens: usize,
    pub(super) training_seconds: f64,
    pub(super) reference_seconds: f64,
    pub(super) seconds_to_first_step: f64,
}

impl Summary {
    /// All ranks call it.
    pub(super) fn new(
        config: &Config,
        inputs: &Inputs,
        context: &Context,
        identity: &str,
        evaluations: Evaluations,
        timing: Timing,
    ) -> Self {
        let world = &context.world;
        let mut peak = [host::peak_resident_bytes() as f64, process::device_bytes(context.device) as f64];
        world.world.all_reduce_f64(&mut peak, Reduce::Max);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            config_digest: config::digest(config),
            launch: context.launch.clone(),
            model: ModelLine {
                path: config.model.path.clone(),
                family: inputs.arch.family,
                parameters: inputs.arch.num_parameters(),
                digest: identity.to_owned(),
            },
            mesh: MeshLine {
                world: world.mesh.world(),
                tp: world.mesh.tp,
                dp: world.mesh.dp,
                sequence_parallel: config.parallel.sequence_parallel,
                zero: config.parallel.zero,
            },
            device: if context.device == tch::Device::Cpu { "cpu" } else { "cuda" },
            precision: config.train.precision,
            libraries: process::libraries(context),
            data: inputs.sets().into_iter().map(|(name, set)| (name.to_owned(), set.stats.clone())).collect(),
            steps: timing.steps,
            seconds: context.started.elapsed().as_secs_f64(),
            training_seconds: timing.training_seconds,
            reference_seconds: timing.reference_seconds,
            seconds_to_first_step: timing.seconds_to_first_step,
            tokens_per_s: timing.tokens as f64 / timing.training_seconds.max(1e-9),
            peak_rss_bytes: peak[0] as u64,
            peak_device_bytes: peak[1] as u64,
            export: config.export.model.then(|| config.run.dir.join("model")),
            warnings: inputs.warnings.clone(),
            sets: by_set(evaluations),
        }
    }

    /// Logs the table and where things are.
    pub(super) fn print(&self, folder: &Path, console: &Console) {
        if console.is_for_machines() {
            let path = folder.join("summary.json");
            let Self { steps, seconds, tokens_per_s, .. } = self;
            tracing::info!(steps, seconds, tokens_per_s, summary = %path.display(), "finished");
            return;
        }
        let mut rows = Vec::new();
        for (name, set) in &self.sets {
            let metrics: [(&str, fn(&LikelihoodScores) -> f64); 2] =
                [("answer probability", |s| s.probability), ("token accuracy", |s| s.token_accuracy)];
            for (metric, value) in metrics {
                let cell = |scores: &Option<LikelihoodScores>| {
                    scores.as_ref().map_or_else(|| "-".to_owned(), |scores| number(value(scores)))
                };
                rows.push(vec![format!("{name}: {metric}"), cell(&set.before), cell(&set.after)]);
            }
        }
        let numbers = if rows.is_empty() { String::new() } else { table(&["", "before", "after"], &rows) };
        let Self { steps, training_seconds, tokens_per_s, peak_rss_bytes, .. } = self;
        tracing::info!(
            "\n{numbers}\n{steps} steps in {training_seconds:.1} s, {tokens_per_s:.0} tokens/s, peak memory {:.0} MiB a rank\n{}",
            *peak_rss_bytes as f64 / 1048576.0,
            match &self.export {
                Some(model) =>
                    format!("model: {}, numbers: {}", model.display(), folder.join("summary.json").display()),
                None => format!("numbers: {}", folder.join("summary.json").display()),
            }
        );
    }
}

fn by_set(evaluations: Evaluations) -> BTreeMap<String, BeforeAfter> {
    let mut sets = BTreeMap::<String, BeforeAfter>::new();
    for (name, scores) in evaluations.before {
        sets.entry(name).or_default().before = Some(scores);
    }
    for (step, scores) in evaluations.during {
        for (name, scores) in scores {
            sets.entry(name).or_default().during.push((step, scores));
        }
    }
    for (name, scores) in evaluations.after {
        sets.entry(name).or_default().after = Some(scores);
    }
    sets
}
