//! From the numbers of items to metrics; what is missing is told.

use crate::eval::record::{Better, Evaluation, Item, Metric};
use crate::eval::statistics::{self, StatisticsError};

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
    let name = format!("{set}.{metric}");
    if lacking > 0 {
        out.warn(format!("{set}: {lacking} of {all} items have no {number}; {name} is of the others"));
    }
    put(out, &name, Some(set), of(&values), values.len(), better);
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
