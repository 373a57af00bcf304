//! Perplexity on running text, such as WikiText-2: whether the model still writes language.

use super::requests::{Requests, Seen};
use super::samples::Samples;
use super::{Reading, Suite};
use crate::config::Perplexity;
use crate::data::{self, Content, Dataset, Record, Wanted};
use crate::eval::error::EvalError;
use crate::eval::likelihood::summarise;
use crate::eval::record::{Better, Evaluation, Metric};

const SET: &str = "perplexity";

/// Windows of running text.
pub(super) struct PerplexitySuite {
    samples: Samples,
    /// Of the whole text. Unit: bytes.
    bytes: usize,
}

impl PerplexitySuite {
    pub(super) fn read(config: &Perplexity, reading: Reading) -> Result<Self, EvalError> {
        let records = data::read("eval.perplexity.source", &config.source, Wanted::Nothing)?;
        let texts = records.iter().filter_map(|record| match &record.content {
            Content::Text(text) => Some(text.as_str()),
            _ => None,
        });
        let texts: Vec<&str> = texts.collect();
        let bytes = texts.iter().map(|text| text.len()).sum();
        let joined = [Record::plain(1, Content::Text(texts.join("\n\n")))];
        let records = if config.join { &joined[..] } else { &records[..] };
        let mut samples = Vec::new();
        for record in records {
            samples.extend(reading.encoder.encode(record, reading.max_length)?.samples);
        }
        let dataset = Dataset::from_samples("eval.perplexity", samples);
        Ok(Self { samples: Samples::new(SET, &dataset, 0, reading), bytes })
    }
}

impl Suite for PerplexitySuite {
    fn name(&self) -> &'static str {
        "perplexity"
    }

    fn sets(&self) -> Vec<(String, String)> {
        vec![(SET.to_owned(), self.samples.digest.clone())]
    }

    fn ask<'a>(&'a self, requests: &mut Requests<'a>) {
        self.samples.texts.iter().for_each(|text| requests.score(text, false));
    }

    fn tell(&self, seen: &Seen, out: &mut Evaluation) {
        out.items.insert(SET.to_owned(), self.samples.items(seen));
        let scores = summarise(self.samples.texts.iter().map(|text| seen.score(text)));
        out.put("perplexity.per_token", Some(SET), Metric::new(scores.nll.exp(), scores.samples, Better::Lower));
        let bits = scores.nll * scores.tokens as f64 / std::f64::consts::LN_2 / self.bytes as f64;
        out.put("perplexity.bits_per_byte", Some(SET), Metric::new(bits, scores.samples, Better::Lower));
    }
}
