//! The table that one looks at first: metrics down, models across, the better direction marked.

use std::collections::BTreeSet;

use super::findings::has_collapsed;
use super::html::{escape, number};
use super::names;
use super::run::Run;
use crate::eval::{Better, Evaluation, Metric};
use crate::telemetry::table;

/// One model of the table.
pub(super) struct Column<'a> {
    pub(super) title: String,
    pub(super) evaluation: &'a Evaluation,
    /// A result of unlearning, as opposed to what it is held against.
    pub(super) is_result: bool,
    /// A result that is gibberish: it is never the best one.
    pub(super) has_collapsed: bool,
}

/// Of one run: original, before, after, retrained. Of several: the first run's start, every run's end, retrained.
pub(super) fn columns(runs: &[Run]) -> Vec<Column<'_>> {
    let context = |title: &str, evaluation| Column {
        title: title.to_owned(),
        evaluation,
        is_result: false,
        has_collapsed: false,
    };
    let mut columns = Vec::new();
    if let Some(original) = runs.iter().find_map(|run| run.original.as_ref()) {
        columns.push(context("original", original));
    }
    let starts = || runs.iter().filter_map(|run| run.evaluations.iter().find(|one| one.step == Some(0)));
    if let Some(before) = starts().next() {
        // runs from different models: their starts would be told by one of them
        let known = |one: &Evaluation| match one.model.digest.as_str() {
            "" => one.model.path.display().to_string(),
            digest => digest.to_owned(),
        };
        if starts().all(|other| known(other) == known(before)) {
            columns.push(context("before", before));
        }
    }
    for run in runs {
        if let Some(after) = run.after() {
            let title = if runs.len() == 1 { "after".to_owned() } else { run.name.clone() };
            columns.push(Column { title, evaluation: after, is_result: true, has_collapsed: has_collapsed(run) });
        }
    }
    if let Some(retrained) = runs.iter().find_map(|run| run.retrained.as_ref()) {
        columns.push(context("retrained", retrained));
    }
    columns
}

/// The table in HTML; `all`: every metric instead of the headline's.
pub(super) fn html(runs: &[Run], all: bool) -> String {
    let columns = columns(runs);
    let rows = metrics(&columns, all);
    if rows.is_empty() {
        return String::new();
    }
    let mut text =
        String::from("<div class=\"wide\"><table class=\"numbers\"><thead><tr><th scope=\"col\">metric</th>");
    for column in &columns {
        let class = if column.is_result { " class=\"result\"" } else { "" };
        let state = if column.has_collapsed { "<small>collapsed</small>" } else { "" };
        text += &format!("<th scope=\"col\"{class}>{}{state}</th>", escape(&column.title));
    }
    text += "</tr></thead><tbody>\n";
    for name in rows {
        let better = better(&columns, &name);
        text += &format!(
            "<tr><th scope=\"row\">{} <span class=\"direction\" title=\"{}\">{}</span></th>",
            escape(&names::words(&name)),
            better_words(better),
            arrow(better)
        );
        let best = best(&columns, &name, better);
        for (index, column) in columns.iter().enumerate() {
            let mut classes = Vec::new();
            classes.extend(column.is_result.then_some("result"));
            classes.extend((best == Some(index)).then_some("best"));
            let class = if classes.is_empty() { String::new() } else { format!(" class=\"{}\"", classes.join(" ")) };
            text += &format!("<td{class}>{}</td>", cell(column.evaluation.metrics.get(&name)));
        }
        text += "</tr>\n";
    }
    text + "</tbody></table></div>\n"
}

/// The table for the terminal.
pub fn terminal(runs: &[Run]) -> String {
    let columns = columns(runs);
    let head: Vec<&str> = [""].into_iter().chain(columns.iter().map(|column| column.title.as_str())).collect();
    let row = |name: &String| {
        let better = better(&columns, name);
        let value = |column: &Column| column.evaluation.metrics.get(name).map_or("-".to_owned(), |m| number(m.value));
        let title = format!("{} {}", names::words(name), arrow(better));
        [title].into_iter().chain(columns.iter().map(value)).collect()
    };
    let rows: Vec<Vec<String>> = metrics(&columns, false).iter().map(row).collect();
    if rows.is_empty() {
        return "  no evaluation in these folders\n".to_owned();
    }
    table(&head, &rows) + "  ↓ lower is better, ↑ higher is better, ≈ near the retrained model is better\n"
}

/// Names of the rows, in their order.
fn metrics(columns: &[Column], all: bool) -> Vec<String> {
    let names: BTreeSet<&String> = columns.iter().flat_map(|column| column.evaluation.metrics.keys()).collect();
    let names = if all { names.into_iter().collect() } else { names::headline(names.into_iter()) };
    names.into_iter().cloned().collect()
}

fn cell(metric: Option<&Metric>) -> String {
    let Some(metric) = metric else { return "–".to_owned() };
    let value = number(metric.value);
    match (metric.low, metric.high) {
        (Some(low), Some(high)) => format!(
            "<span title=\"95% interval {} to {}, {} items\">{value}</span>",
            number(low),
            number(high),
            metric.n
        ),
        _ if metric.n > 0 => format!("<span title=\"{} items\">{value}</span>", metric.n),
        _ => value,
    }
}

fn better(columns: &[Column], name: &str) -> Better {
    let metric = columns.iter().find_map(|column| column.evaluation.metrics.get(name));
    metric.map_or(Better::Retrained, |metric| metric.better)
}

/// Which of several results is the best one, where it can be told and they are not all the same.
fn best(columns: &[Column], name: &str, better: Better) -> Option<usize> {
    let value = |column: &Column| Some(column.evaluation.metrics.get(name)?.value);
    let retrained = columns.iter().find(|column| column.title == "retrained" && !column.is_result).and_then(value);
    let badness = |value: f64| match better {
        Better::Lower => Some(value),
        Better::Higher => Some(-value),
        Better::Retrained => retrained.map(|retrained| (value - retrained).abs()),
    };
    let mut results: Vec<(usize, f64)> = columns
        .iter()
        .enumerate()
        .filter(|(_, column)| column.is_result && !column.has_collapsed)
        .filter_map(|(index, column)| Some((index, badness(value(column)?)?)))
        .collect();
    results.sort_by(|a, b| a.1.total_cmp(&b.1));
    match results.as_slice() {
        [first, second, ..] if first.1 < second.1 => Some(first.0),
        _ => None,
    }
}

pub(super) fn arrow(better: Better) -> &'static str {
    match better {
        Better::Lower => "↓",
        Better::Higher => "↑",
        Better::Retrained => "≈",
    }
}

pub(super) fn better_words(better: Better) -> &'static str {
    match better {
        Better::Lower => "lower is better",
        Better::Higher => "higher is better",
        Better::Retrained => "near the retrained model is better",
    }
}
