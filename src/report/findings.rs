//! What a careful reader would say of the numbers, in plain words. One function a rule; a rule that lacks its numbers is silent.

use super::html::{number, p_value};
use super::run::Run;
use crate::eval::statistics::mean;
use crate::eval::{Evaluation, Item};

/// One remark about a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Something to act on, as opposed to something to know.
    pub is_warning: bool,
    pub text: String,
}

/// A run's start, end, and what it is held against.
struct Case<'a> {
    run: &'a Run,
    before: Option<&'a Evaluation>,
    after: Option<&'a Evaluation>,
    retrained: Option<&'a Evaluation>,
}

type Rule = fn(&Case) -> Option<Finding>;

/// In the order in which they are told.
const RULES: [Rule; 14] = [
    unfinished,
    not_a_number,
    collapse,
    retain_loss,
    nothing_forgotten,
    gibberish,
    silence,
    distinguishable,
    overshoot,
    shallow,
    quantisation,
    diverging,
    few_items,
    no_retrained,
];

/// All remarks about a run: the rules', then the warnings that it wrote down itself.
pub fn findings(run: &Run) -> Vec<Finding> {
    let case = Case { run, before: run.before(), after: run.after(), retrained: run.retrained.as_ref() };
    let mut found: Vec<Finding> = RULES.iter().filter_map(|rule| rule(&case)).collect();
    let own = run.fact("/warnings").and_then(serde_json::Value::as_array).into_iter().flatten();
    let own = own.filter_map(|text| text.as_str()).map(str::to_owned);
    let evaluations = run.evaluations.last().into_iter().flat_map(|one| one.warnings.iter().cloned());
    for text in own.chain(evaluations) {
        let finding = Finding { is_warning: true, text };
        if !found.contains(&finding) {
            found.push(finding);
        }
    }
    found
}

/// Whether a run lost what it was to keep together with what it was to forget: its low forget numbers are then no success.
pub(super) fn has_collapsed(run: &Run) -> bool {
    collapse(&Case { run, before: run.before(), after: run.after(), retrained: None }).is_some()
}

fn warning(text: String) -> Option<Finding> {
    Some(Finding { is_warning: true, text })
}

fn note(text: String) -> Option<Finding> {
    Some(Finding { is_warning: false, text })
}

/// A metric of one set, by the start of its name: `rouge` finds `rouge_l_recall`.
fn value(evaluation: Option<&Evaluation>, set: &str, metric: &str) -> Option<f64> {
    let evaluation = evaluation?;
    let of = |exact: bool| {
        evaluation.metrics.iter().find(|(name, _)| {
            let Some((its_set, its_metric)) = name.rsplit_once('.') else { return false };
            (if exact { its_set == set } else { its_set.contains(set) }) && its_metric.starts_with(metric)
        })
    };
    of(true).or_else(|| of(false)).map(|(_, metric)| metric.value)
}

/// A metric before and after.
fn change(case: &Case, set: &str, metric: &str) -> Option<(f64, f64)> {
    Some((value(case.before, set, metric)?, value(case.after, set, metric)?))
}

/// What tells most of how much of a set a model still knows.
const KNOWLEDGE: [(&str, &str); 3] =
    [("rouge", "ROUGE-L"), ("probability", "answer probability"), ("token_accuracy", "token accuracy")];

/// The measure of a set that lost the largest share, if it lost the half of it or more.
fn halved(case: &Case, set: &str) -> Option<(&'static str, f64, f64)> {
    let lost = KNOWLEDGE.iter().filter_map(|(metric, words)| {
        let (before, after) = change(case, set, metric)?;
        (before > 0.05 && after <= 0.5 * before).then_some((*words, before, after))
    });
    lost.min_by(|a, b| (a.2 / a.1).total_cmp(&(b.2 / b.1)))
}

fn unfinished(case: &Case) -> Option<Finding> {
    if case.run.summary.is_some() || case.run.steps.is_empty() {
        return None;
    }
    warning(format!("The run has not come to its end: {} steps so far.", case.run.steps.len()))
}

fn not_a_number(case: &Case) -> Option<Finding> {
    let bad = case.run.steps.iter().find(|line| !line.contains_key("loss") || !line.contains_key("grad_norm"))?;
    let step = bad.get("step").copied().unwrap_or(0.0);
    warning(format!("At step {step} the loss or the gradient norm was not a number."))
}

/// Forgetting the forget set together with everything else.
fn collapse(case: &Case) -> Option<Finding> {
    let (before, after) = change(case, "forget", "probability")?;
    if before < 0.05 || after > 0.1 * before {
        return None;
    }
    let (words, kept_before, kept_after) = halved(case, "retain")?;
    warning(format!(
        "Collapse: the forget set's answer probability fell from {} to {}, but the retain set's {words} fell from {} to {} as well. The model \
         lost what it was to keep, so its forget numbers say little.",
        number(before),
        number(after),
        number(kept_before),
        number(kept_after)
    ))
}

/// Keeping less, short of a collapse.
fn retain_loss(case: &Case) -> Option<Finding> {
    if collapse(case).is_some() {
        return None;
    }
    let lost = KNOWLEDGE.iter().find_map(|(metric, words)| {
        let (before, after) = change(case, "retain", metric)?;
        (before > 0.05 && after < 0.8 * before).then_some((*words, before, after))
    });
    let (words, before, after) = lost?;
    warning(format!(
        "The retain set lost {:.0}% of its {words}: {} before, {} after.",
        100.0 * (1.0 - after / before),
        number(before),
        number(after)
    ))
}

fn nothing_forgotten(case: &Case) -> Option<Finding> {
    let (before, after) = change(case, "forget", "probability")?;
    if case.run.setting(&["method", "objective"]).as_deref() == Some("finetune")
        || before < 0.05
        || after < 0.9 * before
    {
        return None;
    }
    warning(format!(
        "Nothing was forgotten: the forget set's answer probability was {} and is {}.",
        number(before),
        number(after)
    ))
}

/// Items of the sets that were to be forgotten, with something that the model wrote.
fn written<'a>(case: &'a Case) -> Vec<&'a Item> {
    let sets = case.after.into_iter().flat_map(|one| &one.items).filter(|(set, _)| set.contains("forget"));
    sets.flat_map(|(_, items)| items).filter(|item| item.generation.is_some()).collect()
}

fn gibberish(case: &Case) -> Option<Finding> {
    let repeated: Vec<f64> = written(case).iter().filter_map(|item| item.numbers.get("repetition").copied()).collect();
    let repetition = mean(&repeated).ok();
    let variety = value(case.before, "", "variety").zip(value(case.after, "", "variety"));
    if let Some(repetition) = repetition.filter(|x| *x > 0.5) {
        return warning(format!(
            "The answers repeat themselves: {:.0}% of their word pairs occurred before in the same answer. A model that writes gibberish \
             passes most forget metrics.",
            100.0 * repetition
        ));
    }
    let (before, after) = variety.filter(|(before, after)| *after < 0.7 * before)?;
    warning(format!(
        "The answers are far less varied than before (n-gram variety {} before, {} after): look at them below.",
        number(before),
        number(after)
    ))
}

fn silence(case: &Case) -> Option<Finding> {
    let written = written(case);
    let empty =
        written.iter().filter(|item| item.generation.as_ref().is_some_and(|text| text.trim().is_empty())).count();
    if empty == 0 || empty * 10 < written.len() {
        return None;
    }
    warning(format!(
        "{empty} of {} answers about the forget set are empty: ROUGE counts them as forgotten, an attacker as a sign.",
        written.len()
    ))
}

/// Forget quality below the usual bar.
fn distinguishable(case: &Case) -> Option<Finding> {
    let log10 = case.after?.value("tofu.log10_forget_quality")?;
    if log10 >= 0.05f64.log10() {
        return note(format!(
            "Forget quality p = {}: the test does not tell the model from the retrained one.",
            number(10f64.powf(log10))
        ));
    }
    warning(format!(
        "Forget quality p = {}, below 0.05: by its truth ratios the model can be told from one that never saw the forget set.",
        p_value(10f64.powf(log10), log10)
    ))
}

/// Less known than by a model that never saw it.
fn overshoot(case: &Case) -> Option<Finding> {
    let retrained = value(case.retrained, "forget", "probability")?;
    let after = value(case.after, "forget", "probability")?;
    if retrained < 1e-3 || after > 0.1 * retrained {
        return None;
    }
    warning(format!(
        "More than forgotten: the forget set's answer probability is {}, that of the retrained model {}. Answers that are less likely than \
         chance show what was removed.",
        number(after),
        number(retrained)
    ))
}

/// The share of what was forgotten that an attack's curve brings back.
fn recovered(case: &Case, attack: &str) -> Option<(f64, String)> {
    let (curve_name, curve) = case.after?.curves.iter().find(|(name, _)| name.contains(attack))?;
    let metric = ["forget.probability", "forget.rouge_l_recall", "forget.extraction_strength"]
        .into_iter()
        .find(|metric| curve.points.iter().any(|point| point.contains_key(*metric)))?;
    let before = case.before?.value(metric)?;
    let values: Vec<f64> = curve.points.iter().filter_map(|point| point.get(metric).copied()).collect();
    let first = *values.first()?;
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // what the same attack makes of the retrained model is learnt, not recovered
    let learnt = case.retrained.and_then(|one| {
        let values = one.curves.get(curve_name)?.points.iter().filter_map(|point| point.get(metric).copied());
        values.reduce(f64::max)
    });
    let most = most - learnt.map_or(0.0, |learnt| (learnt - first).max(0.0));
    (before - first > 0.05).then(|| ((most - first) / (before - first), metric.to_owned()))
}

fn shallow(case: &Case) -> Option<Finding> {
    let (share, metric) = recovered(case, "relearn")?;
    if share < 0.5 {
        return None;
    }
    warning(format!(
        "Hidden, not removed: relearning brings back {:.0}% of what was forgotten ({}).",
        100.0 * share.min(1.0),
        super::names::words(&metric)
    ))
}

fn quantisation(case: &Case) -> Option<Finding> {
    let evaluation = case.after?;
    let (before, after) = change(case, "forget", "probability")?;
    let (name, metric) = evaluation
        .metrics
        .iter()
        .find(|(name, _)| (name.contains("quanti") || name.contains("nf4")) && name.ends_with("forget.probability"))?;
    let share = (metric.value - after) / (before - after);
    if before - after <= 0.05 || share < 0.3 {
        return None;
    }
    warning(format!(
        "Rounding the weights brings back {:.0}% of what was forgotten ({}): the changes to them are smaller than the rounding.",
        100.0 * share.min(1.0),
        super::names::words(name)
    ))
}

fn diverging(case: &Case) -> Option<Finding> {
    let norms: Vec<f64> = case.run.steps.iter().filter_map(|line| line.get("grad_norm").copied()).collect();
    let tenth = norms.len() / 10;
    let (first, last) = (mean(&norms[..tenth]).ok()?, mean(&norms[norms.len() - tenth..]).ok()?);
    if !(first > 0.0 && last > 10.0 * first) {
        return None;
    }
    note(format!(
        "The gradient norm rose from {} to {}: training was not settling. A lower learning rate or fewer steps may do better.",
        number(first),
        number(last)
    ))
}

fn few_items(case: &Case) -> Option<Finding> {
    let metric =
        case.after?.metrics.iter().find(|(name, _)| name.starts_with("tofu.") && name.contains("forget_quality"));
    let n = metric?.1.n;
    if n >= 200 || n == 0 {
        return None;
    }
    note(format!("Forget quality is from {n} items: with fewer items p is higher. Compare it only at the same number."))
}

fn no_retrained(case: &Case) -> Option<Finding> {
    if case.retrained.is_some()
        || case.after.is_none()
        || case.run.setting(&["method", "objective"]).as_deref() == Some("finetune")
    {
        return None;
    }
    note(
        "No retrained model to compare with: how low the forget numbers should be is not known. Train one on the retain set alone and \
         name it in eval.retrained."
            .to_owned(),
    )
}
