//! One data file as tokens, with its identity and everything a user should know about how it was read.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::num::NonZero;
use std::path::PathBuf;
use std::thread;

use serde::Serialize;

use super::encode::{Encoded, Encoder, Sample};
use super::error::DataError;
use super::pack::Text;
use super::record::{self, Content, Record, Wanted};
use super::refusals::Refusals;
use crate::config::Source;

/// The samples of one source, in file order.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Configuration key of the source, such as `data.forget`.
    pub name: String,
    pub path: PathBuf,
    pub samples: Vec<Sample>,
    /// For each sample the same prompt with the answer that is to take its answer's place; empty where none was asked for.
    pub preferred: Vec<Sample>,
    /// For each sample its line in the file, counted from 1; the windows of one text share a line.
    pub lines: Vec<usize>,
    /// BLAKE3 over tokens and scored positions in order, preferred answers included, in hexadecimal.
    pub digest: String,
    pub stats: Stats,
    max_length: usize,
}

/// Counts of one data set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Lines that hold a sample.
    pub records: usize,
    /// Sequences: more than `records` where texts were split.
    pub samples: usize,
    pub tokens: usize,
    pub scored: usize,
    /// Longest sample. Unit: tokens.
    pub longest: usize,
    /// Records cut at `max_length`, and the tokens they lost.
    pub truncated: Tally,
    pub tokens_lost: usize,
    /// Texts split into windows, and the windows they became.
    pub split: Tally,
    pub windows: usize,
    /// Records in which one token holds the end of the prompt and the beginning of the answer.
    pub straddling: Tally,
    /// Records whose prompt the chat template writes otherwise once the answer is there.
    pub prefix_broken: Tally,
    /// Records that begin with two begin-of-text tokens.
    pub doubled_bos: Tally,
    /// Samples equal to an earlier one of the same file.
    pub duplicates: Tally,
}

/// How many, and the first line of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    pub count: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_line: Option<usize>,
}

impl Tally {
    fn add(&mut self, happened: bool, line: usize) {
        if happened {
            self.count += 1;
            self.first_line.get_or_insert(line);
        }
    }
}

const STRADDLING: &str = "have a token that holds both the end of the prompt and the beginning of the answer; it is \
    scored, but a model that is asked gets the prompt without it; a space at the end of the prompt or a line break at \
    the beginning of the answer does this";
const PREFIX_BROKEN: &str = "have a prompt that the chat template writes in one way before an answer and in another \
    with it; the model is trained on the second and asked with the first";
const DOUBLED_BOS: &str =
    "begin with two begin-of-text tokens: the tokenizer adds one, so leave it out of the template";

impl Dataset {
    /// Reads and tokenises a source, on all cores. The result depends on nothing but file, encoder and `max_length`.
    ///
    /// `name` is the source's configuration key, used in errors and warnings; `max_length` counts tokens.
    ///
    /// # Errors
    /// Those of [`record::read`] and [`Encoder::encode`]; samples whose prompt alone fills `max_length`.
    pub fn load(name: &str, source: &Source, encoder: &Encoder, max_length: usize) -> Result<Self, DataError> {
        Self::load_pairs(name, source, encoder, max_length, Wanted::Nothing, &Refusals::own(0))
    }

    /// As [`Self::load`] with the answers that are `wanted` in place of the samples' own. A sample with several of them becomes
    /// as many samples, one a preferred answer; one without a refusal of its own gets one of `refusals`.
    ///
    /// # Errors
    /// Those of [`Self::load`]; samples that have no such answer.
    pub fn load_pairs(
        name: &str,
        source: &Source,
        encoder: &Encoder,
        max_length: usize,
        wanted: Wanted,
        refusals: &Refusals,
    ) -> Result<Self, DataError> {
        if max_length < 2 {
            return Err(DataError::MaxLength { found: max_length });
        }
        let (records, preferred) = pairs(record::read(name, source, wanted)?, wanted, refusals);
        let mut dataset = Self {
            name: name.to_owned(),
            path: source.path.clone(),
            samples: Vec::with_capacity(records.len()),
            preferred: Vec::with_capacity(preferred.len()),
            lines: Vec::with_capacity(records.len()),
            digest: String::new(),
            stats: Stats::default(),
            max_length,
        };
        let mut refused = Refused::default();
        for (record, encoded) in records.iter().zip(encode_all(&records, encoder, max_length)) {
            let encoded = encoded.map_err(|error| error.in_sample(&dataset.path, record.line))?;
            refused.see(record.line, &encoded);
            dataset.push(record.line, encoded);
        }
        for (record, encoded) in preferred.iter().zip(encode_all(&preferred, encoder, max_length)) {
            let encoded = encoded.map_err(|error| error.in_sample(&dataset.path, record.line))?;
            refused.see(record.line, &encoded);
            dataset.stats.longest = dataset.stats.longest.max(encoded.len - encoded.lost);
            dataset.preferred.extend(encoded.samples);
        }
        refused.into_result(&dataset.path, records.len(), max_length)?;
        dataset.stats.duplicates = dataset.duplicates();
        dataset.digest = digest(dataset.samples.iter().chain(&dataset.preferred));
        Ok(dataset)
    }

    /// A data set made in memory.
    pub fn from_samples(name: &str, samples: Vec<Sample>) -> Self {
        let stats = Stats {
            records: samples.len(),
            samples: samples.len(),
            tokens: samples.iter().map(|sample| sample.tokens.len()).sum(),
            scored: samples.iter().map(|sample| sample.scored.len()).sum(),
            longest: samples.iter().map(|sample| sample.tokens.len()).max().unwrap_or(0),
            ..Stats::default()
        };
        let (digest, lines, max_length) = (digest(samples.iter()), (1..=samples.len()).collect(), stats.longest);
        let (name, path, preferred) = (name.to_owned(), PathBuf::new(), Vec::new());
        Self { name, path, samples, preferred, lines, digest, stats, max_length }
    }

    /// The preferred answers as a data set of their own.
    pub fn companions(&self) -> Self {
        Self::from_samples(&self.name, self.preferred.clone())
    }

    /// One of a sample's texts.
    pub fn text(&self, sample: usize, text: Text) -> &Sample {
        match text {
            Text::Answer => &self.samples[sample],
            Text::Preferred => &self.preferred[sample],
        }
    }

    /// What a user should know before training on this, in plain words; empty if all is well.
    pub fn warnings(&self) -> Vec<String> {
        let Stats { records, samples, tokens_lost, windows, .. } = self.stats;
        let Stats { truncated, split, straddling, prefix_broken, doubled_bos, duplicates, .. } = self.stats;
        let limit = format!("longer than data.max_length = {}", self.max_length);
        let warn = |tally: Tally, of: usize, what: &str, said: &str| {
            let line = tally.first_line?;
            Some(format!("{}: {} of {of} {what} {said} (first: line {line})", self.name, tally.count))
        };
        let warnings = [
            warn(
                truncated,
                records,
                "samples",
                &format!("are {limit}; {tokens_lost} tokens at their ends are cut off"),
            ),
            warn(split, records, "texts", &format!("are {limit} and became {windows} windows")),
            warn(straddling, records, "samples", STRADDLING),
            warn(prefix_broken, records, "samples", PREFIX_BROKEN),
            warn(doubled_bos, records, "samples", DOUBLED_BOS),
            warn(duplicates, samples, "samples", "are equal to an earlier one"),
        ];
        warnings.into_iter().flatten().collect()
    }

    fn push(&mut self, line: usize, encoded: Encoded) {
        let stats = &mut self.stats;
        stats.records += 1;
        stats.tokens_lost += encoded.lost;
        stats.truncated.add(encoded.lost > 0, line);
        stats.split.add(encoded.samples.len() > 1, line);
        stats.windows += if encoded.samples.len() > 1 { encoded.samples.len() } else { 0 };
        stats.straddling.add(encoded.straddles, line);
        stats.prefix_broken.add(encoded.prefix_broken, line);
        stats.doubled_bos.add(encoded.doubled_bos, line);
        for sample in encoded.samples {
            stats.samples += 1;
            stats.tokens += sample.tokens.len();
            stats.scored += sample.scored.len();
            stats.longest = stats.longest.max(sample.tokens.len());
            self.samples.push(sample);
            self.lines.push(line);
        }
    }

    fn duplicates(&self) -> Tally {
        let mut tally = Tally::default();
        let mut seen = HashSet::with_capacity(self.samples.len());
        for (index, (sample, &line)) in self.samples.iter().zip(&self.lines).enumerate() {
            tally.add(!seen.insert((sample, self.preferred.get(index))), line);
        }
        tally
    }
}

/// Pairs (forget index, retain index) of samples with the same tokens and scored positions: what is to be forgotten and
/// kept at once. A forget sample appears once, with the first retain sample that equals it.
pub fn overlap(forget: &Dataset, retain: &Dataset) -> Vec<(usize, usize)> {
    let mut first = HashMap::with_capacity(retain.samples.len());
    for (i, sample) in retain.samples.iter().enumerate() {
        first.entry(sample).or_insert(i);
    }
    forget.samples.iter().enumerate().filter_map(|(i, sample)| Some((i, *first.get(sample)?))).collect()
}

/// Each record once for each of its preferred answers, and those answers to the same questions; both as they are without any.
fn pairs(records: Vec<Record>, wanted: Wanted, refusals: &Refusals) -> (Vec<Record>, Vec<Record>) {
    if wanted == Wanted::Nothing {
        return (records, Vec::new());
    }
    let (mut samples, mut preferred) = (Vec::new(), Vec::new());
    for (index, mut record) in records.into_iter().enumerate() {
        if record.preferred.is_empty() {
            record.preferred.push(refusals.of(index).to_owned());
        }
        let Content::Qa { question, .. } = &record.content else {
            unreachable!("invariant: only questions with one answer have preferred answers");
        };
        for answer in &record.preferred {
            let content = Content::Qa { question: question.clone(), answer: answer.clone() };
            preferred.push(Record::plain(record.line, content));
            samples.push(Record::plain(record.line, record.content.clone()));
        }
    }
    (samples, preferred)
}

/// Records of which no scored token is left.
#[derive(Default)]
struct Refused {
    count: usize,
    first: Option<(usize, usize)>,
    least: usize,
    longest: usize,
}

impl Refused {
    fn see(&mut self, line: usize, encoded: &Encoded) {
        self.least = self.least.max(encoded.prompt_len + 1);
        self.longest = self.longest.max(encoded.len);
        if encoded.samples.is_empty() {
            self.count += 1;
            self.first.get_or_insert((line, encoded.prompt_len));
        }
    }

    fn into_result(self, path: &std::path::Path, samples: usize, max_length: usize) -> Result<(), DataError> {
        let Some((line, prompt)) = self.first else {
            return Ok(());
        };
        let Self { count, least, longest, .. } = self;
        Err(DataError::PromptFillsWindow {
            path: path.to_owned(),
            count,
            samples,
            line,
            prompt,
            max_length,
            least,
            longest,
        })
    }
}

/// Encodes the records in order, split evenly over the cores.
fn encode_all(records: &[Record], encoder: &Encoder, max_length: usize) -> Vec<Result<Encoded, DataError>> {
    const FEWEST_PER_THREAD: usize = 64;
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let num_threads = cores.min(records.len().div_ceil(FEWEST_PER_THREAD)).max(1);
    let share = records.len().div_ceil(num_threads).max(1);
    let encode = |records: &[Record]| -> Vec<_> { records.iter().map(|r| encoder.encode(r, max_length)).collect() };
    thread::scope(|scope| {
        let workers: Vec<_> = records.chunks(share).map(|records| scope.spawn(move || encode(records))).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("encoding does not panic")).collect()
    })
}

fn digest<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> String {
    let mut hasher = blake3::Hasher::new();
    for Sample { tokens, scored } in samples {
        hasher.update(&(tokens.len() as u64).to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        hasher.update(&(scored.len() as u64).to_le_bytes());
        for position in scored {
            hasher.update(&position.to_le_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}
