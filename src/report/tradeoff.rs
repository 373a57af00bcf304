//! Forgetting against keeping: one plane a metric, with the way of each run and the retrained model.

use super::figures::{Figure, run_colour};
use super::html::{escape, number};
use super::names;
use super::plot::{Scatter, Trail};
use super::run::Run;
use crate::eval::Evaluation;
use crate::eval::tradeoff::Tradeoff;

/// Metrics of both sets, the more telling ones first.
const METRICS: [&str; 6] =
    ["extraction_strength", "rouge_l_recall", "rouge_l_f1", "probability", "exact_memorisation", "token_accuracy"];

/// What was to be forgotten and what was to be kept: of a benchmark, else of the run's own data.
const SETS: [(&str, &str); 3] =
    [("tofu_forget", "tofu_retain"), ("forget", "retain"), ("muse_knowmem_forget", "muse_knowmem_retain")];

/// At most three planes.
pub(super) fn planes(runs: &[Run]) -> Vec<Figure> {
    let utility = plane(runs, "tofu.log10_forget_quality", "tofu.model_utility", "upper right is better");
    let both = METRICS.iter().filter_map(|metric| {
        SETS.iter().find_map(|(forget, retain)| {
            plane(runs, &format!("{forget}.{metric}"), &format!("{retain}.{metric}"), "upper left is better")
        })
    });
    utility.into_iter().chain(both).take(3).collect()
}

fn plane(runs: &[Run], x: &str, y: &str, direction: &str) -> Option<Figure> {
    let at = |evaluation: &Evaluation| Some((evaluation.value(x)?, evaluation.value(y)?));
    let mut trails = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        let label = if runs.len() == 1 { "after".to_owned() } else { run.name.clone() };
        let name = |one: &Evaluation| one.step.map_or(one.label.clone(), |step| format!("{label}, step {step}"));
        let points = run.evaluations.iter().filter_map(|one| Some((name(one), at(one)?))).collect();
        trails.push(Trail { label: label.clone(), colour: Some(run_colour(index)), points });
    }
    if !trails.iter().any(|trail| trail.points.len() > 1) {
        return None;
    }
    let fixed = [
        ("retrained", runs.iter().find_map(|run| run.retrained.as_ref())),
        ("original", runs.iter().find_map(|run| run.original.as_ref())),
    ];
    for (label, evaluation) in fixed {
        let points = evaluation.and_then(at).map(|at| (label.to_owned(), at)).into_iter().collect();
        trails.push(Trail { label: label.to_owned(), colour: None, points });
    }
    let shares = trails
        .iter()
        .flat_map(|trail| &trail.points)
        .all(|(_, (x, y))| (0.0..=1.0).contains(x) && (0.0..=1.0).contains(y));
    let scatter = Scatter {
        about: format!("{} across, {} up, for each model", names::words(x), names::words(y)),
        x_label: names::words(x),
        trails,
        include: if shares { vec![(0.0, 0.0), (1.0, 1.0)] } else { Vec::new() },
    };
    let scores = match x {
        _ if x.ends_with(".extraction_strength") => told(runs, "AUES", |scores| scores.aues),
        "tofu.log10_forget_quality" => told(runs, "MU95", |scores| scores.mu95),
        _ => String::new(),
    };
    Figure::new(format!("↑ {}", names::words(y)), format!("{direction}; a ring is the start{scores}"), scatter.svg())
}

/// A score of each run that has one.
fn told(runs: &[Run], name: &str, score: fn(Tradeoff) -> Result<f64, String>) -> String {
    let one = |run: &Run| {
        // those without a step come last
        let steps = run.evaluations.partition_point(|one| one.step.is_some());
        let value = number(score(Tradeoff::of(&run.evaluations[..steps])).ok()?);
        Some(if runs.len() == 1 { value } else { format!("{} {value}", escape(&run.name)) })
    };
    let all: Vec<String> = runs.iter().filter_map(one).collect();
    if all.is_empty() { String::new() } else { format!("; {name} {}", all.join(", ")) }
}
