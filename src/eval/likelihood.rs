//! Teacher-forced scores: how probable the model finds each answer, and how many of its tokens it would have chosen.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::abi::slices::slice;
use crate::abi::upload::upload;
use crate::data::{Dataset, Item, MicroBatch, RowsOf, Stream, pack, share};
use crate::dist::World;
use crate::model::{Decoder, Keep, Weights};

/// One sample's log-probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleScore {
    pub sample: usize,
    /// Of each scored token, in order.
    pub logprobs: Vec<f32>,
    /// Scored tokens that are the model's first choice.
    pub correct: usize,
}

/// Means over a data set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LikelihoodScores {
    /// Mean over samples of `exp(mean log-probability of its scored tokens)`, as in TOFU (arXiv 2401.06121).
    pub probability: f64,
    /// Share of all scored tokens that are the model's first choice.
    pub token_accuracy: f64,
    /// Mean over scored tokens of the negative log-likelihood. Unit: nats.
    pub nll: f64,
    pub samples: usize,
    /// Scored tokens.
    pub tokens: usize,
}

/// How a forward pass over a data set is cut.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOptions {
    /// Tokens of one micro-batch.
    pub budget: usize,
    /// Memory for one chunk of logits. Unit: bytes.
    pub logits_bytes: f64,
}

/// Scores of the given samples, by sample; all ranks call it and get all of them.
///
/// `progress` is called with the number of samples that this rank has done.
pub fn per_sample(
    decoder: &Decoder,
    weights: &Weights,
    dataset: &Dataset,
    samples: &[usize],
    options: ForwardOptions,
    world: &World,
    mut progress: impl FnMut(usize),
) -> Vec<SampleScore> {
    let len = |sample: usize| dataset.samples[sample].tokens.len();
    let items: Vec<Item> = samples.iter().map(|&s| Item { stream: Stream::Forget, sample: s, len: len(s) }).collect();
    let mine = share(&items, world.mesh.dp).swap_remove(world.mesh.dp_rank());
    let mut scores = Vec::new();
    for items in pack(&mine, options.budget) {
        let sample = |item: Item| &dataset.samples[item.sample];
        let micro_batch = MicroBatch::new(&items, sample, |_| RowsOf::Scored);
        scores.extend(forward(decoder, weights, &micro_batch, options));
        progress(items.len());
    }
    let mut all: Vec<SampleScore> = world.dp.gather_bytes(&encode(&scores)).iter().flat_map(|b| decode(b)).collect();
    all.sort_by_key(|score| score.sample);
    all
}

/// Means over samples and tokens.
pub fn summarise(scores: &[SampleScore]) -> LikelihoodScores {
    let sum = |score: &SampleScore| score.logprobs.iter().map(|&x| f64::from(x)).sum::<f64>();
    let tokens: usize = scores.iter().map(|score| score.logprobs.len()).sum();
    let probability: f64 = scores.iter().map(|score| (sum(score) / score.logprobs.len() as f64).exp()).sum();
    let correct: usize = scores.iter().map(|score| score.correct).sum();
    LikelihoodScores {
        probability: probability / scores.len() as f64,
        token_accuracy: correct as f64 / tokens as f64,
        nll: -scores.iter().map(sum).sum::<f64>() / tokens as f64,
        samples: scores.len(),
        tokens,
    }
}

fn forward(
    decoder: &Decoder,
    weights: &Weights,
    micro_batch: &MicroBatch,
    options: ForwardOptions,
) -> Vec<SampleScore> {
    let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
    let (hidden, _) = decoder.forward(weights, &batch, Keep::Nothing);
    let positions = upload(&micro_batch.positions, decoder.device);
    let targets = upload(&micro_batch.targets, decoder.device);
    let rows = decoder.rows(weights, &hidden, &positions, options.logits_bytes);
    let scores = decoder.scores(weights, &rows, &targets, false);
    let host = |t: &Tensor| t.to_kind(Kind::Float).to_device(tch::Device::Cpu).contiguous();
    let (logprob, correct) = (host(&scores.logprob), host(&scores.correct));
    let (logprob, correct) = (slice::<f32>(&logprob), slice::<f32>(&correct));
    let sequences = micro_batch.sequences.iter();
    sequences
        .map(|sequence| SampleScore {
            sample: sequence.sample,
            logprobs: logprob[sequence.rows.clone()].to_vec(),
            correct: correct[sequence.rows.clone()].iter().filter(|&&x| x != 0.0).count(),
        })
        .collect()
}

/// `sample, correct, length` as u64 and the log-probabilities as f32, little endian.
fn encode(scores: &[SampleScore]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for score in scores {
        for number in [score.sample, score.correct, score.logprobs.len()] {
            bytes.extend((number as u64).to_le_bytes());
        }
        bytes.extend(score.logprobs.iter().flat_map(|x| x.to_le_bytes()));
    }
    bytes
}

fn decode(mut bytes: &[u8]) -> Vec<SampleScore> {
    let mut scores = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<24>() {
        let number =
            |i: usize| u64::from_le_bytes(head[8 * i..8 * i + 8].try_into().expect("invariant: 8 bytes")) as usize;
        let (values, rest) = rest.split_at(4 * number(2));
        let logprobs = values.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        scores.push(SampleScore { sample: number(0), correct: number(1), logprobs });
        bytes = rest;
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(sample: usize, logprobs: &[f32], correct: usize) -> SampleScore {
        SampleScore { sample, logprobs: logprobs.to_vec(), correct }
    }

    #[test]
    fn means_are_over_samples_and_over_tokens() {
        let half = 0.5f32.ln();
        let summary = summarise(&[score(0, &[half, half, half], 3), score(1, &[0.0], 0)]);
        assert!((summary.probability - 0.75).abs() < 1e-7);
        assert_eq!(summary.token_accuracy, 0.75);
        assert!((summary.nll - 0.75 * std::f64::consts::LN_2).abs() < 1e-7);
        assert_eq!((summary.samples, summary.tokens), (2, 4));
    }

    #[test]
    fn scores_survive_the_way_between_ranks() {
        let scores = vec![score(7, &[-0.5, -1.25], 1), score(1 << 40, &[], 0), score(3, &[f32::NEG_INFINITY], 0)];
        assert_eq!(decode(&encode(&scores)), scores);
    }
}
