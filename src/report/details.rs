//! What ran, on what: folded away at the end of the page.

use serde_json::Value;

use super::html::{bytes, escape, folded, number};
use super::run::Run;

/// Configuration and environment of each run.
pub(super) fn html(runs: &[Run]) -> String {
    let part = |run: &Run| {
        let of = if runs.len() == 1 { String::new() } else { format!(" of {}", run.name) };
        let mut text = String::new();
        let environment = environment(run);
        if !environment.is_empty() {
            text += &folded(&format!("Environment{of}"), &environment);
        }
        if !run.config.is_empty() {
            text += &folded(&format!("Configuration{of}"), &format!("<pre>{}</pre>", escape(&run.config)));
        }
        text
    };
    runs.iter().map(part).collect()
}

/// One line about a run: method, model, steps, time.
pub(super) fn in_a_line(run: &Run) -> String {
    let mut parts = Vec::new();
    if let Some(objective) = run.setting(&["method", "objective"]) {
        let retain = run.setting(&["method", "retain"]).filter(|retain| retain != "none");
        parts.push(retain.map_or(objective.clone(), |retain| format!("{objective} + {retain}")));
    }
    if let Some(lr) = run.setting(&["optimizer", "lr"]).and_then(|lr| lr.parse::<f64>().ok()) {
        parts.push(format!("learning rate {lr:e}"));
    }
    if let (Some(family), Some(parameters)) = (run.fact("/model/family"), run.fact("/model/parameters")) {
        parts.push(format!("{} with {} parameters", text(family), size(parameters.as_f64().unwrap_or(0.0))));
    }
    match (run.fact("/steps"), run.fact("/training_seconds").and_then(Value::as_f64)) {
        (Some(steps), Some(seconds)) => parts.push(format!("{steps} steps in {}", time(seconds))),
        _ if !run.steps.is_empty() => parts.push(format!("{} steps so far", run.steps.len())),
        _ => {}
    }
    parts.join(" · ")
}

fn environment(run: &Run) -> String {
    let Some(summary) = &run.summary else { return String::new() };
    let mut rows: Vec<(String, String)> = Vec::new();
    let mut row = |name: &str, value: Option<String>| rows.extend(value.map(|value| (name.to_owned(), value)));
    let fact = |pointer: &str| run.fact(pointer).map(text);
    let amount = |pointer: &str| run.fact(pointer).and_then(Value::as_f64).filter(|x| *x > 0.0);
    row("dunlearn", fact("/version"));
    row("model", fact("/model/path"));
    row("digest of its weights", fact("/model/digest"));
    row(
        "ranks",
        fact("/mesh/world").map(|world| {
            let part = |pointer| fact(pointer).unwrap_or_default();
            format!("{world} (tensor parallel {}, data parallel {})", part("/mesh/tp"), part("/mesh/dp"))
        }),
    );
    row("device", fact("/device"));
    row("precision", fact("/precision"));
    row("training", amount("/training_seconds").map(time));
    row("all together", amount("/seconds").map(time));
    row("speed", amount("/tokens_per_s").map(|x| format!("{x:.0} tokens a second")));
    row("most memory of a rank", amount("/peak_rss_bytes").map(bytes));
    row("most device memory of a rank", amount("/peak_device_bytes").map(bytes));
    row("exported to", fact("/export"));
    row("digest of the configuration", fact("/config_digest"));
    for (key, name) in [("libraries", "library"), ("data", "data")] {
        for (part, value) in summary.get(key).and_then(Value::as_object).into_iter().flatten() {
            row(&format!("{name}: {part}"), Some(flat(value)));
        }
    }
    let row = |(name, value): &(String, String)| {
        format!("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", escape(name), escape(value))
    };
    format!(
        "<div class=\"wide\"><table class=\"facts\"><tbody>{}</tbody></table></div>",
        rows.iter().map(row).collect::<String>()
    )
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// An object as `key value, key value`.
fn flat(value: &Value) -> String {
    match value {
        Value::Object(object) => object
            .iter()
            .map(|(key, value)| format!("{} {}", key.replace('_', " "), flat(value)))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Number(n) if n.is_f64() => number(n.as_f64().unwrap_or(0.0)),
        other => text(other),
    }
}

fn size(parameters: f64) -> String {
    match parameters {
        x if x >= 1e9 => format!("{:.1} B", x / 1e9),
        x if x >= 1e6 => format!("{:.1} M", x / 1e6),
        x => format!("{x:.0}"),
    }
}

/// Unit: seconds in, words out.
fn time(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
