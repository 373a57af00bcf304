//! How a number is distributed over the items of a set: empirical distribution functions, which is also what the Kolmogorov-Smirnov test of
//! the forget quality compares.

use std::collections::BTreeMap;

use super::figures::{Figure, run_colour};
use super::html::{escape, number, p_value};
use super::names;
use super::plot::{COLOURS, Lines, Scale, Series};
use super::run::Run;
use crate::eval::statistics::kolmogorov_smirnov;
use crate::eval::{Evaluation, Item};

/// Truth ratios and probabilities of the sets that were to be forgotten, then of those to be kept. Where a benchmark has truth ratios, its sets
/// stand for the others.
pub(super) fn distributions(runs: &[Run]) -> Vec<Figure> {
    let all: BTreeMap<&String, &Vec<Item>> = runs.iter().filter_map(Run::after).flat_map(|one| &one.items).collect();
    let has_ratios = |items: &[Item]| items.iter().any(|item| item.numbers.contains_key("truth_ratio"));
    let ratios = all.values().any(|items| has_ratios(items));
    let mut sets: Vec<&String> = all
        .into_iter()
        .filter(|(set, items)| (set.contains("forget") || set.contains("retain")) && (!ratios || has_ratios(items)))
        .map(|(set, _)| set)
        .collect();
    sets.sort_by_key(|set| (!set.contains("forget"), *set));
    let numbers = ["truth_ratio", "probability"];
    sets.iter().flat_map(|set| numbers.iter().filter_map(|name| figure(runs, set, name))).take(6).collect()
}

fn figure(runs: &[Run], set: &str, name: &str) -> Option<Figure> {
    let after: Vec<(String, Option<usize>, Vec<f64>)> = runs
        .iter()
        .enumerate()
        .filter_map(|(index, run)| {
            let label = if runs.len() == 1 { "after".to_owned() } else { run.name.clone() };
            Some((label, Some(run_colour(index)), values(run.after()?, set, name)?))
        })
        .collect();
    let first = |of: fn(&Run) -> Option<&Evaluation>| runs.iter().filter_map(of).find_map(|one| values(one, set, name));
    let before = first(|run| run.before()).map(|values| ("before".to_owned(), Some(COLOURS - 1), values));
    let retrained = first(|run| run.retrained.as_ref());
    if after.is_empty() {
        return None;
    }
    let note = match (&retrained, after.as_slice()) {
        (Some(retrained), [(_, _, values)]) => kolmogorov_smirnov(values, retrained).map_or(String::new(), |test| {
            format!(
                "greatest distance from the retrained model {}, p = {}",
                number(test.statistic),
                p_value(test.p_value, test.log10_p)
            )
        }),
        _ => String::new(),
    };
    let retrained = retrained.map(|values| ("retrained".to_owned(), None, values));
    let all = before.into_iter().chain(after).chain(retrained);
    let series = all.map(|(label, colour, values)| Series { label, colour, points: steps(values) });
    let title = format!("{}: {} of each item", set.replace('_', " "), names::metric_words(name));
    let lines = Lines {
        about: format!("{title}: share of items at or below a value"),
        x_label: names::metric_words(name),
        x_scale: if name == "truth_ratio" { Scale::Log } else { Scale::Linear },
        y_scale: Scale::Linear,
        series: series.collect(),
        levels: Vec::new(),
        include: vec![0.0, 1.0],
    };
    Figure::new(title, escape(&note), lines.svg())
}

fn values(evaluation: &Evaluation, set: &str, name: &str) -> Option<Vec<f64>> {
    let number = |item: &Item| item.numbers.get(name).copied().filter(|x| x.is_finite());
    let values: Vec<f64> = evaluation.items.get(set)?.iter().filter_map(number).collect();
    (values.len() > 1).then_some(values)
}

/// The corners of the empirical distribution function, from 0 to 1.
fn steps(mut values: Vec<f64>) -> Vec<(f64, f64)> {
    values.sort_by(f64::total_cmp);
    let n = values.len() as f64;
    let corner = |(index, x): (usize, f64)| [(x, index as f64 / n), (x, (index + 1) as f64 / n)];
    values.into_iter().enumerate().flat_map(corner).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn each_item_is_one_step() {
        let corners = super::steps(vec![3.0, 1.0]);
        assert_eq!(corners, [(1.0, 0.0), (1.0, 0.5), (3.0, 0.5), (3.0, 1.0)]);
    }
}
