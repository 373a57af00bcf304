//! Continuing prompts: many at once, over all ranks, with a key/value cache.
//!
//! [`generate`] is what suites and verbs call. Prompts are dealt to the data-parallel ranks by length; inside a rank a row leaves
//! the batch as soon as it ends and the next prompts take the free places. What a prompt becomes depends on nothing but model,
//! prompt, its index and [`GenerateOptions`]: not on ranks, on other prompts, or on how many are written at a time.

mod rows;
mod sampling;
mod stop;

pub use sampling::Sampling;

use thiserror::Error;

use crate::data::Encoder;
use crate::dist::World;
use crate::model::{Decoder, Weights};
use rows::{Rows, Task};
use stop::Stops;

/// How prompts are continued.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// Texts at which a continuation ends; they are no part of it.
    pub stop: Vec<String>,
    /// End-of-text tokens of the model's folder end a continuation; where not, it runs to `max_new_tokens`.
    pub stop_at_eos: bool,
    /// Sequences that a rank writes at a time, at most.
    pub rows: usize,
    /// Memory for keys and values on a rank: fewer rows where they do not fit. Unit: bytes.
    pub cache_bytes: usize,
    /// Keep keys and values; where not, every step reads the whole text again. For checks.
    pub cached: bool,
}

impl Default for GenerateOptions {
    /// Greedy, 128 tokens.
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: Sampling::Greedy,
            stop: Vec::new(),
            stop_at_eos: true,
            rows: 32,
            cache_bytes: 2 << 30,
            cached: true,
        }
    }
}

/// What one prompt became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The continuation without the end-of-text token that ended it; with the tokens of a stop text that ended it.
    pub tokens: Vec<i32>,
    /// The continuation without special tokens, cut before the stop text that ended it.
    pub text: String,
    pub ended: Ended,
}

/// Why a continuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With an end-of-text token.
    Eos,
    /// With one of the stop texts.
    Stop,
    /// At `max_new_tokens`.
    Length,
}

/// A prompt that cannot be continued. Every rank finds the same.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum GenerateError {
    #[error("prompt {index} has no token; a model continues at least one")]
    EmptyPrompt { index: usize },
    #[error(
        "prompt {index} holds token {token}, the model's vocabulary has {vocab} rows; tokenizer and model do not belong together"
    )]
    UnknownToken { index: usize, token: i32, vocab: i64 },
    #[error(
        "prompt {index} has {tokens} tokens, which with {new} new ones is more than the {positions} that the model's rotary factors \
         are for; shorten it or ask for fewer new tokens"
    )]
    TooLong { index: usize, tokens: usize, new: usize, positions: i64 },
    #[error("a stop text is empty, which would end every continuation before its first token")]
    EmptyStop,
}

/// Continues the prompts, given as token ids; gives the continuations in the prompts' order. All ranks call it with the same
/// arguments and all get all of them.
///
/// `progress` is called with the number of prompts that this rank's copy of the model has finished. Data-parallel ranks need not
/// finish together: the wait for the slowest is one collective, so the watchdog's deadline has to allow for it.
///
/// # Errors
/// Before anything is computed, the same on all ranks.
pub fn generate(
    decoder: &Decoder,
    weights: &Weights,
    encoder: &Encoder,
    prompts: &[Vec<i32>],
    options: &GenerateOptions,
    world: &World,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Generation>, GenerateError> {
    check(decoder, prompts, options)?;
    let stops = Stops { encoder, texts: &options.stop, at_eos: options.stop_at_eos };
    let mut rows = Rows::new(decoder, weights, options, &stops, mine(prompts, world));
    let mut finished = Vec::new();
    while let Some(done) = rows.step() {
        progress(done.len());
        finished.extend(done);
    }
    let mut all: Vec<(usize, Generation)> =
        world.dp.gather_bytes(&encode(&finished)).iter().flat_map(|bytes| decode(bytes, &stops)).collect();
    all.sort_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, generation)| generation).collect())
}

fn check(decoder: &Decoder, prompts: &[Vec<i32>], options: &GenerateOptions) -> Result<(), GenerateError> {
    if options.stop.iter().any(String::is_empty) {
        return Err(GenerateError::EmptyStop);
    }
    let (vocab, positions, new) = (decoder.arch.vocab, decoder.arch.max_positions, options.max_new_tokens);
    for (index, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt { index });
        }
        if let Some(&token) = prompt.iter().find(|&&token| !(0..vocab).contains(&i64::from(token))) {
            return Err(GenerateError::UnknownToken { index, token, vocab });
        }
        let tokens = prompt.len();
        if decoder.arch.positions_are_hard() && (tokens + new) as i64 > positions {
            return Err(GenerateError::TooLong { index, tokens, new, positions });
        }
    }
    Ok(())
}

/// The prompts of this rank's copy of the model, longest first: dealt in the order of their lengths, so that all have similar work.
fn mine(prompts: &[Vec<i32>], world: &World) -> Vec<Task> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(prompts[index].len()));
    let mine = order.into_iter().skip(world.mesh.dp_rank()).step_by(world.mesh.dp);
    mine.map(|index| Task { index, prompt: prompts[index].clone() }).collect()
}

/// `index, how it ended, length` as u64 and the tokens as i32, little endian.
fn encode(finished: &[(usize, Vec<i32>, Ended)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, tokens, ended) in finished {
        for number in [*index, *ended as usize, tokens.len()] {
            bytes.extend((number as u64).to_le_bytes());
        }
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    }
    bytes
}

fn decode(mut bytes: &[u8], stops: &Stops) -> Vec<(usize, Generation)> {
    let mut all = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<24>() {
        let number =
            |i: usize| u64::from_le_bytes(head[8 * i..8 * i + 8].try_into().expect("invariant: 8 bytes")) as usize;
        let (tokens, rest) = rest.split_at(4 * number(2));
        let tokens: Vec<i32> = tokens.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
        let ended = [Ended::Eos, Ended::Stop, Ended::Length][number(1)];
        let text = stops.text(&tokens, ended);
        all.push((number(0), Generation { tokens, text, ended }));
        bytes = rest;
    }
    all
}
