//! Evaluations side by side, for the terminal.

use std::collections::BTreeSet;

use super::record::Evaluation;
use crate::telemetry::table;

/// A table with a line a metric and a column an evaluation; `-` where there is no number.
pub fn side_by_side(columns: &[(String, &Evaluation)], keep: impl Fn(&str) -> bool) -> String {
    let names: BTreeSet<&str> =
        columns.iter().flat_map(|(_, one)| one.metrics.keys().map(String::as_str)).filter(|name| keep(name)).collect();
    let cell = |one: &Evaluation, name: &str| one.value(name).map_or_else(|| "-".to_owned(), number);
    let row = |name: &str| {
        let cells = columns.iter().map(|(_, one)| cell(one, name));
        std::iter::once(name.to_owned()).chain(cells).collect()
    };
    let rows: Vec<Vec<String>> = names.into_iter().map(row).collect();
    let head: Vec<&str> = std::iter::once("").chain(columns.iter().map(|(name, _)| name.as_str())).collect();
    table(&head, &rows)
}

/// Why the columns cannot be read side by side, in plain words; empty where they can.
pub fn differences(columns: &[(String, &Evaluation)]) -> Vec<String> {
    let Some((first_name, first)) = columns.first() else { return Vec::new() };
    let mut warnings = Vec::new();
    for (name, one) in &columns[1..] {
        for (what, ours, theirs) in
            [("template", &first.template, &one.template), ("precision", &first.precision, &one.precision)]
        {
            if ours != theirs {
                warnings.push(format!(
                    "{what} is {ours:?} in {first_name} and {theirs:?} in {name}: their numbers are not comparable"
                ));
            }
        }
        for (set, digest) in &first.data {
            if one.data.get(set).is_some_and(|theirs| theirs != digest) {
                warnings.push(format!(
                    "{set} holds other items in {first_name} than in {name}: its numbers are not comparable"
                ));
            }
        }
    }
    warnings
}

/// Four digits behind the point, or two that count where those would be zeros.
pub fn number(x: f64) -> String {
    if x != 0.0 && x.abs() < 1e-3 { format!("{x:.1e}") } else { format!("{x:.4}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::record::{Better, Metric, empty};

    #[test]
    fn what_is_not_there_is_no_zero_and_what_differs_is_told() {
        let mut a = empty("step_000000");
        a.put("forget.probability", None, Metric::new(0.9, 3, Better::Lower));
        a.put("tofu.forget_quality", None, Metric::new(1.06e-239, 3, Better::Higher));
        a.data.insert("forget".into(), "x".into());
        let mut b = Evaluation { precision: "bf16".into(), ..empty("step_000010") };
        b.put("forget.probability", None, Metric::new(0.0, 3, Better::Lower));
        b.data.insert("forget".into(), "y".into());
        let columns = [("before".to_owned(), &a), ("after".to_owned(), &b)];
        let text = side_by_side(&columns, |_| true);
        assert!(text.contains("forget.probability     0.9000  0.0000"), "{text}");
        assert!(text.contains("tofu.forget_quality  1.1e-239       -"), "{text}");
        assert!(!side_by_side(&columns, |name| name.starts_with("forget")).contains("tofu"));
        let told = differences(&columns);
        assert_eq!(told[0], "precision is \"f32\" in before and \"bf16\" in after: their numbers are not comparable");
        assert!(told[1].starts_with("forget holds other items"), "{told:?}");
    }
}
