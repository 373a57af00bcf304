//! The page: a title, what to know, the headline table, pictures, samples, and the rest folded away.

use super::figures::{self, Figure};
use super::findings::{Finding, findings};
use super::headline;
use super::html::{escape, folded, number};
use super::run::Run;
use super::{details, distribution, samples, tradeoff};
use crate::eval::Evaluation;

/// The whole page: one file without scripts, which loads nothing.
pub fn page(runs: &[Run]) -> String {
    let title = match runs {
        [run] => run.name.clone(),
        runs => format!("{} runs compared", runs.len()),
    };
    let mut body = format!("<header><h1>{}</h1>{}</header>\n", escape(&title), lines(runs));
    // remarks on several runs are long: the table that compares them comes first
    let mut first = [in_short(runs), section("Numbers", "", &headline::html(runs, false))];
    if runs.len() > 1 {
        first.reverse();
    }
    body += &first.concat();
    let mut curves: Vec<Figure> = tradeoff::planes(runs);
    curves.extend(figures::over_steps(runs));
    body += &pictures("Forgetting and keeping", "", &curves);
    body += &pictures(
        "Item by item",
        "Each line is the share of items at or below a value. A model that forgot as if it had never seen the data lies on the retrained one.",
        &distribution::distributions(runs),
    );
    body += &pictures("Under attack", "", &figures::attacks(runs));
    body += &section("What the models say", "", &samples::html(runs));
    body += &pictures("Training", "", &figures::training(runs));
    let all = headline::html(runs, true);
    let all = if all.is_empty() { all } else { folded("All metrics", &all) };
    body += &section("Details", "", &(all + &details::html(runs)));
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\
         <meta name=\"color-scheme\" content=\"light dark\"/>\
         <title>{} · dunlearn</title>\n<style>\n{}</style></head>\n<body><main>\n{body}\
         <footer>Written by dunlearn {} from the files of the run folder{}.</footer></main></body></html>\n",
        escape(&title),
        include_str!("style.css"),
        env!("CARGO_PKG_VERSION"),
        if runs.len() == 1 { "" } else { "s" }
    )
}

fn lines(runs: &[Run]) -> String {
    match runs {
        [run] => format!("<p class=\"quiet\">{}</p>", escape(&details::in_a_line(run))),
        runs => {
            let line = |(index, run): (usize, &Run)| {
                format!(
                    "<li><span class=\"name c{}\">{}</span> <span class=\"quiet\">{}</span></li>",
                    figures::run_colour(index),
                    escape(&run.name),
                    escape(&details::in_a_line(run))
                )
            };
            format!("<ul class=\"runs\">{}</ul>", runs.iter().enumerate().map(line).collect::<String>())
        }
    }
}

/// What happened, in a sentence a run, and what to know of it. What holds of all runs is said once.
fn in_short(runs: &[Run]) -> String {
    let found: Vec<Vec<Finding>> = runs.iter().map(findings).collect();
    let of_all = |finding: &&Finding| runs.len() > 1 && found.iter().all(|own| own.contains(finding));
    let list = |items: Vec<&Finding>| {
        let items: String = items.into_iter().map(item).collect();
        if items.is_empty() { items } else { format!("<ul class=\"findings\">{items}</ul>\n") }
    };
    let mut text = String::new();
    for (index, run) in runs.iter().enumerate() {
        let name = if runs.len() == 1 {
            String::new()
        } else {
            format!("<strong class=\"c{}\">{}</strong> ", figures::run_colour(index), escape(&run.name))
        };
        if let Some(sentence) = sentence(run, runs.len() == 1) {
            text += &format!("<p>{name}{sentence}</p>");
        } else if !name.is_empty() {
            text += &format!("<p>{name}</p>");
        }
        text += &list(found[index].iter().filter(|finding| !of_all(finding)).collect());
    }
    let shared = list(found.first().into_iter().flatten().filter(of_all).collect());
    if !shared.is_empty() {
        text += &format!("<p>All runs:</p>{shared}");
    }
    section("In short", "", &text)
}

fn item(finding: &Finding) -> String {
    let (class, mark) = if finding.is_warning { ("warning", "Warning") } else { ("note", "Note") };
    format!("<li class=\"{class}\"><strong>{mark}</strong> {}</li>", escape(&finding.text))
}

/// How the answers of both sets changed; where colours stand for runs, these stay grey.
fn sentence(run: &Run, coloured: bool) -> Option<String> {
    let part = |set: &str| {
        let of = |one: Option<&Evaluation>| one?.value(&format!("{set}.probability"));
        let (before, after) = (of(run.before())?, of(run.after())?);
        Some(format!(
            "<strong class=\"{}\">{} → {}</strong> on the {set} set",
            match set {
                _ if !coloured => "ink",
                "forget" => "c1",
                _ => "c0",
            },
            number(before),
            number(after)
        ))
    };
    let parts: Vec<String> = ["forget", "retain"].into_iter().filter_map(part).collect();
    (!parts.is_empty()).then(|| format!("Answer probability: {}.", parts.join(", ")))
}

fn section(title: &str, note: &str, content: &str) -> String {
    if content.is_empty() {
        return String::new();
    }
    let note = if note.is_empty() { String::new() } else { format!("<p class=\"quiet\">{note}</p>") };
    format!("<section><h2>{title}</h2>{note}{content}</section>\n")
}

fn pictures(title: &str, note: &str, figures: &[Figure]) -> String {
    if figures.is_empty() {
        return String::new();
    }
    let all: String = figures.iter().map(Figure::html).collect();
    section(title, note, &format!("<div class=\"plots\">{all}</div>"))
}
