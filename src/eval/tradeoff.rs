//! Trade-off scores over the checkpoints of one run, from its files of results: AUES and MU95.

use std::path::Path;

use super::error::EvalError;
use super::record::Evaluation;
use super::statistics::{self, TradeoffPoint, UtilityPoint};

/// Scores of a run's checkpoints; each may lack what it needs, and then says so.
#[derive(Clone, Debug, PartialEq)]
pub struct Tradeoff {
    /// Evaluations that were found, by step.
    pub steps: Vec<usize>,
    pub aues: Result<f64, String>,
    /// log10 of the forget quality where utility has fallen to 95%.
    pub mu95: Result<f64, String>,
}

/// Metrics whose names a curve takes, the first pair that is there.
const STRENGTHS: [[&str; 2]; 2] = [
    ["tofu_forget.extraction_strength", "tofu_retain.extraction_strength"],
    ["forget.extraction_strength", "retain.extraction_strength"],
];

/// Evaluations of a run that know their step, in the order of training.
///
/// # Errors
/// Files that are no results.
pub fn checkpoints(run: &Path) -> Result<Vec<Evaluation>, EvalError> {
    let all: Vec<Evaluation> =
        Evaluation::files(run).iter().map(|path| Evaluation::read(path)).collect::<Result<_, _>>()?;
    let mut known: Vec<Evaluation> = all.into_iter().filter(|evaluation| evaluation.step.is_some()).collect();
    known.sort_by_key(|evaluation| evaluation.step);
    Ok(known)
}

impl Tradeoff {
    /// Of evaluations in the order of training; the first one is the model before unlearning.
    pub fn of(checkpoints: &[Evaluation]) -> Self {
        let steps = checkpoints.iter().filter_map(|evaluation| evaluation.step).collect();
        if checkpoints.len() < 2 {
            let few = || Err(format!("{} evaluation with a step; set eval.every", checkpoints.len()));
            return Self { steps, aues: few(), mu95: few() };
        }
        Self { steps, aues: aues(checkpoints), mu95: mu95(checkpoints) }
    }
}

fn aues(checkpoints: &[Evaluation]) -> Result<f64, String> {
    let there = |names: &&[&str; 2]| names.iter().all(|name| checkpoints.iter().any(|one| one.value(name).is_some()));
    let names = STRENGTHS.iter().find(there).ok_or("no extraction strength of a forget and a retain set")?;
    let point = |one: &Evaluation| {
        let value = |name: &str| one.value(name).ok_or_else(|| format!("{} has no {name}", one.label));
        Ok::<_, String>(TradeoffPoint { forget: 1.0 - value(names[0])?, retain: value(names[1])? })
    };
    let points: Vec<TradeoffPoint> = checkpoints.iter().map(point).collect::<Result<_, _>>()?;
    statistics::aues(&points).map(|aues| aues.value).map_err(|error| error.to_string())
}

fn mu95(checkpoints: &[Evaluation]) -> Result<f64, String> {
    let point = |one: &Evaluation| {
        let value = |name: &str| one.value(name).ok_or_else(|| format!("{} has no {name}", one.label));
        let (utility, quality) = (value("tofu.model_utility")?, value("tofu.log10_forget_quality")?);
        let step = one.step.unwrap_or_default();
        Ok::<_, String>(UtilityPoint { step, utility, log10_forget_quality: quality })
    };
    let points: Vec<UtilityPoint> = checkpoints.iter().map(point).collect::<Result<_, _>>()?;
    statistics::mu95(&points).map(|mu95| mu95.log10_forget_quality).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::record::{Better, Metric, empty};

    fn evaluation(step: usize, metrics: &[(&str, f64)]) -> Evaluation {
        let mut one = Evaluation { step: Some(step), ..empty(&Evaluation::label_of(step)) };
        for (name, value) in metrics {
            one.put(name, None, Metric::new(*value, 1, Better::Higher));
        }
        one
    }

    /// The worked examples of the scores' rules, through files.
    #[test]
    fn scores_of_a_runs_files() {
        let folder = tempfile::tempdir().unwrap();
        let strengths = [(0.8, 0.85), (0.5, 0.8), (0.3, 0.6), (0.1, 0.3), (0.05, 0.05)];
        let utility = [(0.60, -20.0), (0.59, -14.0), (0.58, -10.0), (0.54, -4.0), (0.5, -3.0)];
        for (step, ((forget, retain), (utility, quality))) in strengths.into_iter().zip(utility).enumerate().rev() {
            let metrics = [
                ("forget.extraction_strength", forget),
                ("retain.extraction_strength", retain),
                ("tofu.model_utility", utility),
                ("tofu.log10_forget_quality", quality),
            ];
            evaluation(10 * step, &metrics).write(folder.path()).unwrap();
        }
        let found = checkpoints(folder.path()).unwrap();
        let tradeoff = Tradeoff::of(&found);
        assert_eq!(tradeoff.steps, [0, 10, 20, 30, 40]);
        assert!((tradeoff.aues.unwrap() - 0.65625).abs() < 1e-12);
        assert!((tradeoff.mu95.unwrap() + 8.5).abs() < 1e-9);
    }

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(Tradeoff::of(&[]).aues.unwrap_err(), "0 evaluation with a step; set eval.every");
        let strength = [("forget.extraction_strength", 0.5), ("retain.extraction_strength", 0.5)];
        let tradeoff = Tradeoff::of(&[evaluation(0, &strength), evaluation(5, &strength[..1])]);
        assert_eq!(tradeoff.aues.unwrap_err(), "step_000005 has no retain.extraction_strength");
        assert_eq!(tradeoff.mu95.unwrap_err(), "step_000000 has no tofu.model_utility");
    }
}
