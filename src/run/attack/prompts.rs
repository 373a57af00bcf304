//! The forget questions asked in other ways: paraphrased, and behind other questions of the same set with their answers.

use crate::config::{Attack, Config};
use crate::data::{Content, DataError, Dataset, Encoder, Wanted, read};
use crate::run::RunError;

/// The sets of `[data]`, and `paraphrase` and `in_context` where they are asked for.
pub(super) fn sets(
    config: &Config,
    settings: &Attack,
    encoder: &Encoder,
) -> Result<Vec<(&'static str, Dataset)>, RunError> {
    let max_length = config.data.max_length;
    let mut sets = Vec::new();
    for (key, source) in config.data.sources() {
        sets.push((key.trim_start_matches("data."), Dataset::load(key, source, encoder, max_length)?));
    }
    let forget = config.data.forget.as_ref().expect("invariant: the configuration was validated");
    if let Some(field) = &settings.paraphrase {
        let mut source = forget.clone();
        source.fields.question = Some(field.clone());
        sets.push(("paraphrase", Dataset::load("eval.attack.paraphrase", &source, encoder, max_length)?));
    }
    if settings.in_context > 0 {
        let records = read("data.forget", forget, Wanted::Nothing)?;
        let pairs = records.iter().filter_map(|record| match &record.content {
            Content::Qa { question, answer } => Some((question.as_str(), answer.as_str())),
            _ => None,
        });
        let pairs: Vec<(&str, &str)> = pairs.collect();
        let shown = settings.in_context.min(pairs.len() - 1);
        let one = |at: usize| {
            // the ones just before it: in such data they are of the same author or subject
            let before = (1..=shown).rev().map(|back| pairs[(at + pairs.len() - back) % pairs.len()]);
            let (question, answer) = pairs[at];
            let sample = encoder.behind(&before.collect::<Vec<_>>(), question, answer, max_length);
            let line = records[at].line;
            sample.map_err(|source| DataError::Sample { path: forget.path.clone(), line, source: Box::new(source) })
        };
        let samples = (0..pairs.len()).map(one).collect::<Result<Vec<_>, _>>()?;
        sets.push(("in_context", Dataset::from_samples("eval.attack.in_context", samples)));
    }
    Ok(sets)
}
