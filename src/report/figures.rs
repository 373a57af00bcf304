//! Which curves are drawn: metrics over the steps of a run, what training reported, attacks.

use std::collections::BTreeMap;

use super::headline::{arrow, better_words};
use super::html::escape;
use super::names;
use super::plot::{Level, Lines, Scale, Series};
use super::run::Run;
use crate::eval::{Better, Evaluation};

/// A picture with its title.
pub(super) struct Figure {
    title: String,
    /// A sentence below the title; HTML.
    note: String,
    svg: String,
}

impl Figure {
    /// None where there is nothing to draw.
    pub(super) fn new(title: String, note: String, svg: Option<String>) -> Option<Self> {
        Some(Self { title, note, svg: svg? })
    }

    pub(super) fn html(&self) -> String {
        let Self { title, note, svg } = self;
        let note = if note.is_empty() { String::new() } else { format!("<small>{note}</small>") };
        format!("<figure class=\"plot\"><figcaption>{}{note}</figcaption>{svg}</figure>\n", escape(title))
    }
}

/// Colour of a set: what is to be forgotten and what is to be kept look the same everywhere.
fn set_colour(set: &str, index: usize) -> usize {
    match set {
        set if set.ends_with("forget") => 1,
        set if set.ends_with("retain") => 0,
        _ => 2 + index % (super::plot::COLOURS - 2),
    }
}

/// Colour of a run among several.
pub(super) fn run_colour(index: usize) -> usize {
    index % super::plot::COLOURS
}

/// Metrics over steps. One run: a plot a metric, a line a set. Several: a plot a metric and set, a line a run.
pub(super) fn over_steps(runs: &[Run]) -> Vec<Figure> {
    let evaluations = runs.iter().flat_map(|run| &run.evaluations).filter(|evaluation| evaluation.step.is_some());
    let names = names::headline(evaluations.flat_map(|evaluation| evaluation.metrics.keys()));
    match runs {
        [run] => over_steps_of_one(run, &names),
        runs => names.into_iter().filter_map(|name| over_steps_of_many(runs, name)).take(9).collect(),
    }
}

fn over_steps_of_one(run: &Run, names: &[&String]) -> Vec<Figure> {
    let mut by_metric: Vec<(&str, Vec<&String>)> = Vec::new();
    for name in names {
        let metric = name.rsplit_once('.').map_or(name.as_str(), |(_, metric)| metric);
        match by_metric.iter_mut().find(|(known, _)| *known == metric) {
            Some((_, all)) => all.push(name),
            None => by_metric.push((metric, vec![name])),
        }
    }
    let figure = |(metric, names): &(&str, Vec<&String>)| {
        let set = |name: &str| name.rsplit_once('.').map_or(String::new(), |(set, _)| set.replace('_', " "));
        let series = names.iter().enumerate().filter_map(|(index, name)| {
            let label = set(name);
            let colour = Some(set_colour(&label, index));
            points(run, name).map(|points| Series { label, colour, points })
        });
        let levels = names.iter().filter_map(|name| {
            let value = run.retrained.as_ref()?.value(name)?;
            Some(Level { label: if names.len() == 1 { "retrained".into() } else { format!("{}*", set(name)) }, value })
        });
        let (series, levels): (Vec<_>, Vec<_>) = (series.collect(), levels.collect());
        let starred = if levels.iter().any(|level| level.label.ends_with('*')) { "* the retrained model" } else { "" };
        plot(names::metric_words(metric), starred.to_owned(), "step", series, levels)
    };
    by_metric.iter().filter_map(figure).take(9).collect()
}

fn over_steps_of_many(runs: &[Run], name: &String) -> Option<Figure> {
    let series = runs.iter().enumerate().filter_map(|(index, run)| {
        let points = points(run, name)?;
        Some(Series { label: run.name.clone(), colour: Some(run_colour(index)), points })
    });
    let retrained = runs.iter().find_map(|run| run.retrained.as_ref()?.value(name));
    let levels = retrained.map(|value| Level { label: "retrained".to_owned(), value }).into_iter().collect();
    let metric = runs.iter().flat_map(|run| &run.evaluations).find_map(|evaluation| evaluation.metrics.get(name));
    let better = metric.map_or(Better::Retrained, |metric| metric.better);
    plot(names::words(name), format!("{} {}", arrow(better), better_words(better)), "step", series.collect(), levels)
}

/// A metric at every step at which the run was evaluated; None with fewer than two.
fn points(run: &Run, name: &str) -> Option<Vec<(f64, f64)>> {
    let point = |evaluation: &Evaluation| Some((evaluation.step? as f64, evaluation.value(name)?));
    let points: Vec<(f64, f64)> = run.evaluations.iter().filter_map(point).collect();
    (points.len() > 1).then_some(points)
}

/// A linear plot; shares get an axis from 0 to 1.
fn plot(title: String, note: String, x_label: &str, series: Vec<Series>, levels: Vec<Level>) -> Option<Figure> {
    let values =
        || series.iter().flat_map(|one| &one.points).map(|(_, y)| *y).chain(levels.iter().map(|level| level.value));
    let shares = values().all(|y| (0.0..=1.0).contains(&y)) && values().any(|y| y > 0.2);
    let lines = Lines {
        about: format!("{title}, by {x_label}"),
        x_label: x_label.to_owned(),
        x_scale: Scale::Linear,
        y_scale: Scale::Linear,
        include: if shares { vec![0.0, 1.0] } else { vec![0.0] },
        series,
        levels,
    };
    Figure::new(title, note, lines.svg())
}

/// What `metrics.jsonl` tells of the optimizer's steps.
pub(super) fn training(runs: &[Run]) -> Vec<Figure> {
    let mut figures = Vec::new();
    if let [run] = runs {
        let parts = [("loss", "total", 3), ("forget_loss", "forget", 1), ("retain_loss", "retain", 0)];
        // a total that is one of its parts would hide it
        let total = column(run, "loss");
        let shown = parts.iter().filter(|(key, _, _)| {
            let points = column(run, key);
            let moves = points.iter().any(|(_, y)| *y != 0.0);
            moves && (*key == "loss" || points != total)
        });
        let series = shown.map(|(key, label, colour)| Series {
            label: (*label).to_owned(),
            colour: Some(*colour),
            points: column(run, key),
        });
        figures.extend(training_plot("loss", series.collect()));
    } else {
        for (key, title) in [("forget_loss", "forget loss"), ("retain_loss", "retain loss")] {
            figures.extend(of_runs(runs, key, title));
        }
    }
    for (key, title) in [("grad_norm", "gradient norm"), ("lr", "learning rate"), ("tokens_per_s", "tokens a second")] {
        figures.extend(of_runs(runs, key, title));
    }
    figures
}

fn of_runs(runs: &[Run], key: &str, title: &str) -> Option<Figure> {
    let series = runs.iter().enumerate().map(|(index, run)| Series {
        label: if runs.len() == 1 { String::new() } else { run.name.clone() },
        colour: Some(run_colour(index)),
        points: column(run, key),
    });
    let series: Vec<Series> = series.filter(|series| series.points.iter().any(|(_, y)| *y != 0.0)).collect();
    training_plot(title, series)
}

/// On a log scale where positive numbers span more than a factor of 100, but for the learning rate, which is read as a shape.
fn training_plot(title: &str, series: Vec<Series>) -> Option<Figure> {
    let values = || series.iter().flat_map(|one| &one.points).map(|(_, y)| *y);
    let (low, high) = values().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), y| (a.min(y), b.max(y)));
    let log = low > 0.0 && high / low > 100.0 && title != "learning rate";
    let lines = Lines {
        about: format!("{title} of each optimizer step"),
        x_label: "step".to_owned(),
        x_scale: Scale::Linear,
        y_scale: if log { Scale::Log } else { Scale::Linear },
        include: if log { Vec::new() } else { vec![0.0] },
        series,
        levels: Vec::new(),
    };
    Figure::new(title.to_owned(), String::new(), lines.svg())
}

fn column(run: &Run, key: &str) -> Vec<(f64, f64)> {
    run.steps.iter().filter_map(|line| Some((*line.get("step")?, *line.get(key)?))).collect()
}

/// Curves of attacks: a plot a curve and metric, a line a model, the retrained and the original one among them.
pub(super) fn attacks(runs: &[Run]) -> Vec<Figure> {
    let mut models: Vec<(String, Option<usize>, &Evaluation)> = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        let label = if runs.len() == 1 { "after".to_owned() } else { run.name.clone() };
        models.extend(run.after().map(|evaluation| (label, Some(run_colour(index)), evaluation)));
    }
    let first = |of: fn(&Run) -> Option<&Evaluation>| runs.iter().find_map(of);
    models.extend(first(|run| run.before()).map(|one| ("before".to_owned(), Some(super::plot::COLOURS - 1), one)));
    models.extend(first(|run| run.retrained.as_ref()).map(|one| ("retrained".to_owned(), None, one)));
    let mut wanted: BTreeMap<(&String, &String), &str> = BTreeMap::new();
    for (_, _, evaluation) in &models {
        for (name, curve) in &evaluation.curves {
            for metric in curve.points.iter().flat_map(BTreeMap::keys).filter(|key| **key != curve.x) {
                wanted.insert((name, metric), &curve.x);
            }
        }
    }
    let figure = |((name, metric), x): ((&String, &String), &str)| {
        let series = models.iter().filter_map(|(label, colour, evaluation)| {
            let curve = evaluation.curves.get(name)?;
            let point = |point: &BTreeMap<String, f64>| Some((*point.get(x)?, *point.get(metric)?));
            let points: Vec<(f64, f64)> = curve.points.iter().filter_map(point).collect();
            (!points.is_empty()).then(|| Series { label: label.clone(), colour: *colour, points })
        });
        let title = format!("{}: {}", name.trim_start_matches("attack.").replace('_', " "), names::words(metric));
        plot(title, String::new(), &x.replace('_', " "), series.collect(), Vec::new())
    };
    wanted.into_iter().filter_map(figure).collect()
}
