//! From the numbers of items to metrics; what is missing is told.

use crate::eval::record::{Better, Evaluation, Item, Metric};
use crate::eval::statistics::{self, StatisticsError};
use crate::eval::text::RougeTokens;

/// Resamples of a bootstrap interval.
pub(super) const RESAMPLES: usize = 1000;
/// Share of them between its ends.
pub(super) const LEVEL: f64 = 0.95;

/// Number `name` of every item that has one that is finite.
pub fn numbers(items: &[Item], name: &str) -> Vec<f64> {
    items.iter().filter_map(|item| item.numbers.get(name)).copied().filter(|x| x.is_finite()).collect()
}

/// How many items lack a finite number `name`.
pub fn missing(items: &[Item], name: &str) -> usize {
    items.len() - numbers(items, name).len()
}

/// Puts `SET.METRIC`: the mean of number `number` over the items of `set`, with a bootstrap interval.
pub fn mean_of(out: &mut Evaluation, set: &str, metric: &str, number: &str, better: Better) {
    let values = |values: &[f64]| statistics::mean(values);
    aggregate(out, set, metric, number, better, values);
    let items = out.items.get(set).map_or(&[][..], Vec::as_slice);
    let interval = statistics::mean_interval(&numbers(items, number), LEVEL, RESAMPLES, 0);
    if let (Ok(interval), Some(metric)) = (interval, out.metrics.get_mut(&format!("{set}.{metric}"))) {
        (metric.low, metric.high) = (Some(interval.low), Some(interval.high));
    }
}

/// Puts `SET.METRIC` from the numbers of the items of `set`; warns of items that have none.
pub(super) fn aggregate(
    out: &mut Evaluation,
    set: &str,
    metric: &str,
    number: &str,
    better: Better,
    of: impl Fn(&[f64]) -> Result<f64, StatisticsError>,
) {
    let items = out.items.get(set).map_or(&[][..], Vec::as_slice);
    let (values, all, lacking) = (numbers(items, number), items.len(), missing(items, number));
    let silent = items.iter().filter(|item| missing(std::slice::from_ref(item), number) > 0 && is_silent(item)).count();
    let name = format!("{set}.{metric}");
    // an answer without a word lacks every number of what was written: told once, where the first of them is looked for
    if silent > 0 && number.starts_with("rouge") {
        out.warn(format!("{set}: {silent} of {all} answers hold no word; {name} is of the others"));
    }
    if lacking > silent {
        out.warn(format!("{set}: {} of {all} items have no {number}; {name} is of the others", lacking - silent));
    }
    put(out, &name, Some(set), of(&values), values.len(), better);
}

/// Whether the model wrote something, and no word of it.
fn is_silent(item: &Item) -> bool {
    item.generation.as_ref().is_some_and(|written| RougeTokens::new(written, false).is_empty())
}

/// Puts a metric that may have no value; says why.
pub(super) fn put(
    out: &mut Evaluation,
    name: &str,
    set: Option<&str>,
    value: Result<f64, StatisticsError>,
    n: usize,
    better: Better,
) {
    match value {
        Ok(value) => out.put(name, set, Metric::new(value, n, better)),
        Err(error) => out.warn(format!("{name} was not computed: {error}")),
    }
}

/// Adds a number to an item where there is one.
pub(super) fn give(item: &mut Item, name: &str, value: Option<f64>) {
    if let Some(value) = value {
        item.numbers.insert(name.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::record::empty;

    #[test]
    fn what_is_missing_is_told_once() {
        let item = |written: &str, numbers: &[&str]| Item {
            generation: Some(written.to_owned()),
            numbers: numbers.iter().map(|name| ((*name).to_owned(), 0.5)).collect(),
            ..Item::default()
        };
        let both = ["rouge_l_recall", "variety"];
        let items = vec![item("two words", &both), item("", &[]), item("?!", &["variety"]), item("word", &both[..1])];
        let mut out = empty("x");
        out.items.insert("set".to_owned(), items);
        for number in both {
            mean_of(&mut out, "set", number, number, Better::Higher);
        }
        assert_eq!(
            out.warnings,
            [
                "set: 2 of 4 answers hold no word; set.rouge_l_recall is of the others",
                "set: 1 of 4 items have no variety; set.variety is of the others"
            ]
        );
        assert_eq!(out.metrics["set.variety"].n, 2);
    }
}
