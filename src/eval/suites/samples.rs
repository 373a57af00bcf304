//! Samples of a data set as texts to score, with prompt and answer in words.

use super::Reading;
use super::aggregate::give;
use super::questions::digest;
use super::requests::Seen;
use crate::data::{Dataset, Sample};
use crate::eval::record::Item;
use crate::eval::scores::{Floor, Text, TextScore};

/// Samples of one set.
pub(super) struct Samples {
    pub(super) set: String,
    pub(super) texts: Vec<Text>,
    /// Prompt and answer of each, as the model reads them.
    pub(super) words: Vec<(String, String)>,
    pub(super) digest: String,
    floor: Floor,
}

impl Samples {
    /// The first `limit` samples; 0 means all.
    pub(super) fn new(set: &str, dataset: &Dataset, limit: usize, reading: Reading) -> Self {
        let count = if limit == 0 { dataset.samples.len() } else { limit.min(dataset.samples.len()) };
        let chosen = &dataset.samples[..count];
        let words = |sample: &Sample| {
            let first = sample.scored.first().map_or(0, |&at| at as usize);
            let scored: Vec<i32> = sample.scored.iter().map(|&at| sample.tokens[at as usize]).collect();
            (reading.encoder.decode(&sample.tokens[..first]), reading.encoder.decode(&scored))
        };
        let text = |sample: &Sample| {
            Text::of(sample, sample.tokens.last().is_some_and(|&token| reading.encoder.is_special(token)))
        };
        let words: Vec<(String, String)> = chosen.iter().map(words).collect();
        // of the answers alone: the prompts hold the template's words, and another template is told as such
        let digest = digest(words.iter().map(|(_, answer)| answer.trim()));
        let texts = chosen.iter().map(text).collect();
        Self { set: set.to_owned(), texts, words, digest, floor: reading.floor }
    }

    /// One item a sample with what every suite measures of it.
    pub(super) fn items(&self, seen: &Seen) -> Vec<Item> {
        let item = |(index, (text, (prompt, answer))): (usize, (&Text, &(String, String)))| {
            let mut item = Item { index, prompt: prompt.clone(), answer: answer.clone(), ..Item::default() };
            basics(&mut item, seen.score(text), self.floor);
            item
        };
        self.texts.iter().zip(&self.words).enumerate().map(item).collect()
    }
}

/// Numbers of an answer that need nothing but its own scores.
pub(super) fn basics(item: &mut Item, score: &TextScore, floor: Floor) {
    give(item, "loss", score.nll());
    give(item, "probability", score.probability());
    give(item, "extraction_strength", score.extraction_strength(floor));
    give(item, "exact_memorisation", score.exact_memorisation());
    let correct = score.correct.iter().filter(|&&correct| correct).count();
    give(item, "tokens", Some(score.logprobs.len() as f64));
    let broken = score.logprobs.iter().any(|x| x.is_nan());
    give(item, "correct_tokens", Some(if broken { f64::NAN } else { correct as f64 }));
}
