//! Probes of the inside: KRS and the unlearning depth score, which need several models at once.

use super::{Gathered, LABEL, Target};
use crate::config::{Attack, Config, Template, TemplateName};
use crate::data::{Content, DataError, Dataset, Encoder, Record, Sample, rows};
use crate::eval::probe::{Component, Models, depth, krs};
use crate::eval::{Better, Curve, Item, Metric};
use crate::run::frozen::{Frozen, facts};
use crate::run::{Context, RunError};

/// Says what a probe that is asked for lacks.
///
/// # Errors
/// A model that is needed and not there.
pub(super) fn check(settings: &Attack, targets: &[Target]) -> Result<(), RunError> {
    let needed = [
        (settings.krs.is_some(), "krs", "original"),
        (settings.depth.is_some(), "depth", "original"),
        (settings.depth.is_some(), "depth", "retrained"),
    ];
    let lacking = |(asked, _, name): &&(bool, &str, &str)| *asked && !targets.iter().any(|target| target.name == *name);
    match needed.iter().find(lacking) {
        Some((_, key, name)) => Err(RunError::Refused(format!(
            "eval.attack.{key} needs the {name} model, another one than that under attack; write eval.{name} = \"DIR\""
        ))),
        None => Ok(()),
    }
}

/// Runs the probes that are asked for. All ranks call it.
///
/// # Errors
/// A model that a probe needs and that is not there, or has another shape.
pub(super) fn probe(
    config: &Config,
    settings: &Attack,
    targets: &[Target],
    context: &Context,
    all: &mut Gathered,
) -> Result<(), RunError> {
    if settings.krs.is_none() && settings.depth.is_none() {
        return Ok(());
    }
    // every rank looks at the states of all tokens
    let mut config = config.clone();
    config.parallel.sequence_parallel = false;
    let world = &context.world;
    let load = |name: &str| -> Result<Frozen, RunError> {
        let target = targets.iter().find(|target| target.name == name).expect("invariant: checked before");
        let model = facts(&target.folder, &config, world)?;
        Frozen::load(model, &config, world, context.device, &context.console)
    };
    let template = config.data.template.clone().unwrap_or(Template::Named(TemplateName::Chat));
    let encoder = Encoder::from_folder(&targets[0].folder, &template, config.data.system.as_deref())?;
    let key = if settings.krs.is_some() { "krs" } else { "depth" };
    let (unlearned, original) = (load("unlearned")?, load("original")?);
    same_shape(&unlearned, &original, key)?;
    let most = if config.eval.max_samples == 0 { usize::MAX } else { config.eval.max_samples };
    let source = config.data.forget.as_ref().expect("invariant: the configuration was validated");
    let out = all.out.as_mut().expect("invariant: the unlearned model was measured");
    if let Some(window) = settings.krs {
        let set = Dataset::load("data.forget", source, &encoder, config.data.max_length)?;
        let samples = &set.samples[..set.samples.len().min(most)];
        let mut bar = context.console.progress("krs", samples.len().div_ceil(world.mesh.dp) as u64, "samples");
        let found = krs(&unlearned.decoder, &unlearned.weights, &original.weights, samples, window, world, || {
            bar.advance(1, "")
        });
        drop(bar);
        let mut points = Vec::new();
        for layer in 0..found.len() / Component::ALL.len() {
            let here = found.iter().filter(|one| one.first_layer == layer);
            let scores = here.filter_map(|one| Some((one.component.name().to_owned(), one.score?)));
            points.push(scores.chain([("layer".to_owned(), layer as f64)]).collect());
        }
        out.curves.insert(format!("{LABEL}.krs"), Curve { x: "layer".to_owned(), points });
        for component in Component::ALL {
            let scores = found.iter().filter(|one| one.component == component).filter_map(|one| one.score);
            match scores.reduce(f64::max) {
                Some(best) => {
                    let metric = Metric::new(best, samples.len(), Better::Lower);
                    out.put(&format!("{LABEL}.krs.{}.score", component.name()), None, metric);
                }
                None => out.warn("krs: the unlearned and the original model have the same logits".to_owned()),
            }
        }
    }
    if let Some(field) = &settings.depth {
        let retrained = load("retrained")?;
        same_shape(&unlearned, &retrained, "depth")?;
        let (samples, words) = spans(&config, field, most, &encoder)?;
        let mut bar = context.console.progress("depth", samples.len().div_ceil(world.mesh.dp) as u64, "samples");
        let models =
            Models { original: &original.weights, retrained: &retrained.weights, unlearned: &unlearned.weights };
        let scores = depth(&unlearned.decoder, models, &samples, world, || bar.advance(1, ""));
        drop(bar);
        let known: Vec<f64> = scores.iter().flatten().copied().collect();
        let items = scores.iter().zip(words).enumerate().map(|(index, (score, (prompt, answer)))| {
            let numbers = score.iter().map(|&score| ("depth".to_owned(), score)).collect();
            Item { index, prompt, answer, numbers, ..Item::default() }
        });
        out.items.insert("depth".to_owned(), items.collect());
        if known.len() < scores.len() {
            let without = scores.len() - known.len();
            out.warn(format!(
                "depth: in {without} of {} samples no layer has the knowledge; they do not count",
                scores.len()
            ));
        }
        if !known.is_empty() {
            let mean = known.iter().sum::<f64>() / known.len() as f64;
            out.put(&format!("{LABEL}.depth.score"), Some("depth"), Metric::new(mean, known.len(), Better::Higher));
        }
    }
    Ok(())
}

/// Refuses models whose values do not fit into each other.
fn same_shape(a: &Frozen, b: &Frozen, key: &str) -> Result<(), RunError> {
    if a.decoder.arch == b.decoder.arch {
        return Ok(());
    }
    Err(RunError::Refused(format!(
        "eval.attack.{key} puts values of one model into another: {} and {} have different shapes",
        a.facts.path.display(),
        b.facts.path.display()
    )))
}

/// The forget samples with the positions of the part that is the knowledge; and question and answer of each.
#[expect(clippy::type_complexity, reason = "two lists of pairs")]
fn spans(
    config: &Config,
    field: &str,
    most: usize,
    encoder: &Encoder,
) -> Result<(Vec<(Sample, Vec<u32>)>, Vec<(String, String)>), RunError> {
    let source = config.data.forget.as_ref().expect("invariant: the configuration was validated");
    let name = |own: &Option<String>, usual: &str| own.clone().unwrap_or_else(|| usual.to_owned());
    let (question, answer) = (name(&source.fields.question, "question"), name(&source.fields.answer, "answer"));
    let (mut samples, mut words) = (Vec::new(), Vec::new());
    for row in rows(&source.path, source.split.as_deref())?.take(source.limit.unwrap_or(usize::MAX).min(most)) {
        let row = row?;
        let (question, answer, part) = (row.text(&question, "qa")?, row.text(&answer, "qa")?, row.text(field, "qa")?);
        let content = Content::Qa { question: question.clone(), answer: answer.clone() };
        let record = Record::plain(row.number, content);
        let at = |source: DataError| DataError::Sample {
            path: row.path.to_path_buf(),
            line: row.number,
            source: Box::new(source),
        };
        let positions = encoder.part_of_answer(&record, &part).map_err(at)?;
        if positions.is_empty() {
            return Err(row
                .wrong(format!("{field:?}"), format!("{part:?}"), "a part of the answer, word for word")
                .into());
        }
        let mut encoded = encoder.encode(&record, config.data.max_length).map_err(at)?;
        match encoded.samples.pop().filter(|sample| positions.iter().all(|&p| (p as usize) < sample.tokens.len())) {
            Some(sample) => {
                samples.push((sample, positions));
                words.push((question, answer));
            }
            None => {
                return Err(RunError::Refused(format!(
                    "{}:{}: {field:?} lies behind data.max_length = {}; raise it",
                    row.path.display(),
                    row.number,
                    config.data.max_length
                )));
            }
        }
    }
    Ok((samples, words))
}
