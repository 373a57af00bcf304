//! What all suites ask of a model, each text and prompt once, and what it answered.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use crate::data::Encoder;
use crate::eval::error::EvalError;
use crate::eval::generate::{GenerateOptions, generate};
use crate::eval::scores::{Asked, Text, TextScore, gradient_norms, score};
use crate::telemetry::Console;

/// A prompt that the model is to continue greedily.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Prompt {
    pub tokens: Vec<i32>,
    pub max_new_tokens: usize,
    /// Texts at which the continuation ends.
    pub stop: &'static [&'static str],
}

/// Texts and prompts in the order in which they were first asked for.
#[derive(Default)]
pub struct Requests<'a> {
    texts: Vec<(&'a Text, bool)>,
    places: HashMap<&'a Text, usize>,
    gradients: Vec<&'a Text>,
    pulled: HashSet<&'a Text>,
    prompts: Vec<&'a Prompt>,
    known: HashMap<&'a Prompt, usize>,
}

/// What the model answered.
pub struct Seen<'a> {
    scores: HashMap<&'a Text, TextScore>,
    gradient_norms: HashMap<&'a Text, Option<f64>>,
    continuations: HashMap<&'a Prompt, String>,
}

impl<'a> Requests<'a> {
    /// Asks for the log-probabilities of a text's targets; with `moments` also for mean and variance over the vocabulary.
    pub fn score(&mut self, text: &'a Text, moments: bool) {
        let place = *self.places.entry(text).or_insert_with(|| {
            self.texts.push((text, false));
            self.texts.len() - 1
        });
        self.texts[place].1 |= moments;
    }

    /// Asks for the norm of the gradient of a text's loss.
    pub fn gradient(&mut self, text: &'a Text) {
        if self.pulled.insert(text) {
            self.gradients.push(text);
        }
    }

    /// Asks for a continuation.
    pub fn continue_greedily(&mut self, prompt: &'a Prompt) {
        self.known.entry(prompt).or_insert_with(|| {
            self.prompts.push(prompt);
            self.prompts.len() - 1
        });
    }

    /// Asks the model. All ranks call it with the same requests and get the same.
    pub(super) fn answer(
        self,
        model: Asked,
        encoder: &Encoder,
        console: &Console,
        seconds: &mut BTreeMap<String, f64>,
    ) -> Result<Seen<'a>, EvalError> {
        self.check(model)?;
        let started = Instant::now();
        let dp = model.world.mesh.dp;
        let mut scores = HashMap::with_capacity(self.texts.len());
        let mut bar = console.progress("scores", self.texts.len().div_ceil(dp) as u64, "texts");
        for moments in [false, true] {
            let texts: Vec<&Text> =
                self.texts.iter().filter(|(_, spread)| *spread == moments).map(|(text, _)| *text).collect();
            if texts.is_empty() {
                continue;
            }
            let all = score(model, &texts, moments, |n| bar.advance(n as u64, ""));
            scores.extend(texts.into_iter().zip(all));
        }
        drop(bar);
        seconds.insert("scores".to_owned(), started.elapsed().as_secs_f64());
        let gradient_norms = self.gradient_norms(model, console, seconds);
        let continuations = self.continuations(model, encoder, console, seconds)?;
        Ok(Seen { scores, gradient_norms, continuations })
    }

    fn gradient_norms(
        &self,
        model: Asked,
        console: &Console,
        seconds: &mut BTreeMap<String, f64>,
    ) -> HashMap<&'a Text, Option<f64>> {
        if self.gradients.is_empty() {
            return HashMap::new();
        }
        let started = Instant::now();
        let mut bar = console.progress("gradients", self.gradients.len().div_ceil(model.world.mesh.dp) as u64, "texts");
        let norms = gradient_norms(model, &self.gradients, |n| bar.advance(n as u64, ""));
        seconds.insert("gradients".to_owned(), started.elapsed().as_secs_f64());
        self.gradients.iter().copied().zip(norms).collect()
    }

    /// Refuses what the model has no tokens or positions for.
    fn check(&self, model: Asked) -> Result<(), EvalError> {
        let arch = &model.decoder.arch;
        let texts = self.texts.iter().map(|(text, _)| text.tokens.as_slice());
        let longest = texts.clone().map(<[i32]>::len).max().unwrap_or(0) as i64;
        if arch.positions_are_hard() && longest > arch.max_positions {
            return Err(EvalError::Refused(format!(
                "evaluation: the longest text has {longest} tokens, the model was made for {}; set data.max_length",
                arch.max_positions
            )));
        }
        let mut all = texts.chain(self.prompts.iter().map(|prompt| prompt.tokens.as_slice())).flatten();
        match all.find(|&&id| i64::from(id) >= arch.vocab) {
            Some(id) => Err(EvalError::Refused(format!(
                "evaluation: the tokenizer gives token {id}, the model's vocabulary has {} rows; they do not belong together",
                arch.vocab
            ))),
            None => Ok(()),
        }
    }

    fn continuations(
        &self,
        model: Asked,
        encoder: &Encoder,
        console: &Console,
        seconds: &mut BTreeMap<String, f64>,
    ) -> Result<HashMap<&'a Prompt, String>, EvalError> {
        let started = Instant::now();
        let mut kinds: Vec<(usize, &'static [&'static str])> =
            self.prompts.iter().map(|prompt| (prompt.max_new_tokens, prompt.stop)).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let mut all = HashMap::with_capacity(self.prompts.len());
        if kinds.is_empty() {
            return Ok(all);
        }
        let mut bar = console.progress("answers", self.prompts.len().div_ceil(model.world.mesh.dp) as u64, "prompts");
        for (max_new_tokens, stop) in kinds {
            let alike = |prompt: &&&Prompt| (prompt.max_new_tokens, prompt.stop) == (max_new_tokens, stop);
            let prompts: Vec<&'a Prompt> = self.prompts.iter().filter(alike).copied().collect();
            let tokens: Vec<Vec<i32>> = prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
            let stop = stop.iter().map(|&text| text.to_owned()).collect();
            let options = GenerateOptions { max_new_tokens, stop, ..GenerateOptions::default() };
            let Asked { decoder, weights, world, .. } = model;
            let advance = |n| bar.advance(n as u64, "");
            let written = generate(decoder, weights, encoder, &tokens, &options, world, advance)
                .map_err(|error| EvalError::Refused(format!("evaluation: {error}")))?;
            all.extend(prompts.into_iter().zip(written.into_iter().map(|generation| generation.text)));
        }
        seconds.insert("answers".to_owned(), started.elapsed().as_secs_f64());
        Ok(all)
    }
}

impl Seen<'_> {
    /// The scores of a text that was asked for.
    pub fn score(&self, text: &Text) -> &TextScore {
        self.scores.get(text).expect("invariant: a suite asked for it")
    }

    /// The norm of the gradient of a text that it was asked for; None of a text without an answer.
    pub fn gradient_norm(&self, text: &Text) -> Option<f64> {
        *self.gradient_norms.get(text).expect("invariant: a suite asked for it")
    }

    /// How the model went on.
    pub fn continuation(&self, prompt: &Prompt) -> &str {
        self.continuations.get(prompt).expect("invariant: a suite asked for it")
    }
}
