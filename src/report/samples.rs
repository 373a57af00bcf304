//! What the models say: the same items side by side.

use std::collections::BTreeSet;

use super::headline::{Column, columns};
use super::html::{escape, number};
use super::run::Run;
use crate::eval::{Evaluation, Item};

/// Items shown of a set.
const SHOWN: usize = 6;

/// Some items of each set that was to be forgotten or kept.
pub(super) fn html(runs: &[Run]) -> String {
    let columns = columns(runs);
    // what is still known is asked of a model that still says something, where there is one
    let results = || columns.iter().filter(|column| column.is_result);
    let Some(lead) = results().find(|column| !column.has_collapsed).or(results().next()) else { return String::new() };
    let mut sets: Vec<(&String, &Vec<Item>)> =
        lead.evaluation.items.iter().filter(|(set, _)| set.contains("forget") || set.contains("retain")).collect();
    // the same questions may stand in several sets; those that the model answered in words say most
    let speaks = |items: &[Item]| items.iter().any(|item| item.generation.is_some());
    if sets.iter().any(|(_, items)| speaks(items)) {
        sets.retain(|(_, items)| speaks(items));
    }
    sets.sort_by_key(|(set, _)| (!set.contains("forget"), *set));
    let mut text = String::new();
    for (set, items) in sets.into_iter().take(4) {
        let before = columns.iter().find(|column| column.title == "before");
        let chosen = choose(items, before.and_then(|column| column.evaluation.items.get(set)), set.contains("forget"));
        let cards: String = chosen.iter().map(|(item, why)| card(item, why, set, &columns)).collect();
        let first = if set.contains("forget") { " open=\"open\"" } else { "" };
        text += &format!(
            "<details{first}><summary>{}: {} of {} items</summary><div class=\"cards\">{cards}</div></details>\n",
            escape(&set.replace('_', " ")),
            chosen.len(),
            items.len()
        );
    }
    text
}

/// Items over the whole set, and the worst ones: of a forget set those still known best, of a retain set those that lost most.
fn choose<'a>(items: &'a [Item], before: Option<&Vec<Item>>, forget: bool) -> Vec<(&'a Item, &'static str)> {
    let known = |item: &Item| {
        let of = |item: &Item| {
            ["rouge_l_recall", "rouge_l_f1", "probability"].iter().find_map(|key| item.numbers.get(*key)).copied()
        };
        let start = before.and_then(|items| items.iter().find(|other| other.index == item.index)).and_then(of);
        let now = of(item)?;
        Some(if forget { now } else { start? - now })
    };
    let mut ranked: Vec<(f64, &Item)> = items.iter().filter_map(|item| Some((known(item)?, item))).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let why = if forget { "still known best" } else { "lost most" };
    let mut chosen: Vec<(&Item, &str)> = ranked.iter().take(2).map(|(_, item)| (*item, why)).collect();
    let taken: BTreeSet<usize> = chosen.iter().map(|(item, _)| item.index).collect();
    let rest: Vec<&Item> = items.iter().filter(|item| !taken.contains(&item.index)).collect();
    let every = rest.len().div_ceil(SHOWN - chosen.len()).max(1);
    chosen.extend(rest.iter().step_by(every).map(|item| (*item, "")));
    chosen
}

fn card(item: &Item, why: &str, set: &str, columns: &[Column]) -> String {
    let why = if why.is_empty() { String::new() } else { format!(" · {why}") };
    let mut text = format!(
        "<article><h4>item {}{why}</h4><dl><dt>prompt</dt><dd>{}</dd><dt>true answer</dt><dd>{}</dd>",
        item.index,
        words(&item.prompt),
        words(&item.answer)
    );
    for Column { title, evaluation, is_result, .. } in columns {
        if let Some(said) = said(evaluation, set, item) {
            let class = if *is_result { " class=\"result\"" } else { "" };
            text += &format!("<dt{class}>{}</dt><dd{class}>{said}</dd>", escape(title));
        }
    }
    text + "</dl></article>\n"
}

/// What a model made of the same item. None: it was not asked, or of another item.
fn said(evaluation: &Evaluation, set: &str, item: &Item) -> Option<String> {
    let same = |other: &&Item| other.index == item.index && other.prompt == item.prompt;
    let other = evaluation.items.get(set)?.iter().find(same)?;
    let number = |key: &str, label: &str| Some(format!("{label} {}", number(*other.numbers.get(key)?)));
    let rouge = number("rouge_l_recall", "ROUGE-L").or_else(|| number("rouge_l_f1", "ROUGE-L F1"));
    let numbers: Vec<String> = number("probability", "probability").into_iter().chain(rouge).collect();
    let numbers = format!("<span class=\"quiet\">{}</span>", numbers.join(", "));
    Some(match &other.generation {
        Some(generation) if generation.trim().is_empty() => format!("<em>says nothing</em> {numbers}"),
        Some(generation) => format!("{} {numbers}", words(generation)),
        None => numbers,
    })
}

/// A text in its own line breaks, cut where it is long.
fn words(text: &str) -> String {
    const MOST: usize = 600;
    let text = text.trim();
    if text.chars().count() <= MOST {
        return escape(text);
    }
    let start: String = text.chars().take(MOST).collect();
    format!("{}… <span class=\"quiet\">({} characters)</span>", escape(&start), text.chars().count())
}
