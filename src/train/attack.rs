//! The inner maximisation of latent adversarial unlearning (LAU, arXiv 2408.10682, and its code): a perturbation of the hidden
//! states that helps the model to remember, found by a few steps of normalised gradient descent.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::abi::upload::{upload, upload_tensor};
use crate::data::{MicroBatch, Stream};
use crate::model::init::Stream as Draw;
use crate::model::sharding::ParamId;
use crate::model::{Batch, Decoder, Gradients, Keep, Scores, Weights};

/// How the forget samples are perturbed.
///
/// Each sample has a perturbation of its own, over all its tokens and dimensions: it starts in a random direction with a length
/// uniform in [0, radius), and takes `steps` steps of length radius / steps down the gradient of the sample's negative
/// log-likelihood. After each step it is brought back into the ball, and the perturbed rows into the range of the clean ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adversary {
    /// Rows that enter this layer are perturbed.
    pub edge: usize,
    /// Largest L2 norm of a sample's perturbation.
    pub radius: f64,
    pub steps: usize,
}

/// What an attack runs on.
pub(super) struct Target<'a> {
    pub decoder: &'a Decoder,
    pub weights: &'a Weights,
    pub batch: &'a Batch,
    pub micro_batch: &'a MicroBatch,
    /// `[rows]`: token positions and ids of the forget samples' scored tokens.
    pub positions: &'a Tensor,
    pub targets: &'a Tensor,
    pub logits_bytes: f64,
}

impl Adversary {
    /// Pass 1 over the scored tokens of a micro-batch of forget samples, with the perturbation that makes them likeliest.
    ///
    /// `key`: names the draw. All ranks of the tensor-parallel group call it.
    pub fn scores(
        &self,
        decoder: &Decoder,
        weights: &Weights,
        micro_batch: &MicroBatch,
        logits_bytes: f64,
        seed: u64,
        key: &str,
    ) -> Scores {
        let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
        let (positions, targets) =
            (upload(&micro_batch.positions, decoder.device), upload(&micro_batch.targets, decoder.device));
        let x = decoder.enter(weights, &batch);
        let (x, _) = decoder.through(weights, &batch, x, 0..self.edge, Keep::Nothing);
        let target = Target {
            decoder,
            weights,
            batch: &batch,
            micro_batch,
            positions: &positions,
            targets: &targets,
            logits_bytes,
        };
        let x = &x + self.perturb(&target, &x, seed, key);
        let (y, _) = decoder.through(weights, &batch, x, self.edge..decoder.arch.num_layers, Keep::Nothing);
        let rows = decoder.rows(weights, &decoder.all_tokens(&y), &positions, logits_bytes);
        decoder.scores(weights, &rows, &targets, false)
    }

    /// The perturbation of this rank's part of the rows, in their kind; 0 where no forget sample is.
    ///
    /// `x`: this rank's rows that enter the layer. `key`: names the draw. All ranks of a tensor-parallel group call it.
    pub(super) fn perturb(&self, target: &Target, x: &Tensor, seed: u64, key: &str) -> Tensor {
        let Target { decoder, weights, batch, .. } = target;
        let clean = decoder.all_tokens(x).to_kind(Kind::Float);
        let spans = spans(target.micro_batch);
        let delta = clean.zeros_like();
        for (sample, span) in &spans {
            let mut part = rows(&delta, span);
            let start = self.start(part.size(), seed, &format!("{key} {sample}"));
            part.copy_(&upload_tensor(&start.contiguous(), part.device()));
        }
        let ranges: Vec<(Tensor, Tensor)> =
            spans.iter().map(|(_, s)| (rows(&clean, s).min(), rows(&clean, s).max())).collect();
        let layers = self.edge..decoder.arch.num_layers;
        for _ in 0..self.steps {
            let perturbed = decoder.own_tokens(&(&clean + &delta).to_kind(x.kind())).copy();
            let (y, tape) = decoder.through(weights, batch, perturbed, layers.clone(), Keep::Inputs);
            let y = decoder.all_tokens(&y);
            let head = decoder.rows(weights, &y, target.positions, target.logits_bytes);
            let scores = decoder.scores(weights, &head, target.targets, true);
            let weight = scores.logprob.full_like(-1.0);
            let d_rows = decoder.scores_backward(weights, &head, scores, &weight, &mut Discard);
            let mut d_y = y.zeros_like();
            let _ = d_y.index_copy_(0, target.positions, &d_rows);
            let mut grad = decoder.own_tokens(&d_y).copy();
            decoder.back_through(weights, batch, tape, layers.clone(), &mut grad, &mut Discard);
            let grad = decoder.all_tokens(&grad).to_kind(Kind::Float);
            for ((_, span), (least, most)) in spans.iter().zip(&ranges) {
                let (mut part, clean) = (rows(&delta, span), rows(&clean, span));
                let grad = rows(&grad, span);
                let moved = &part - &grad * (self.radius / self.steps as f64) / grad.norm().clamp_min(TINY);
                let inside = &moved * (self.radius / moved.norm().clamp_min(TINY)).clamp_max(1.0);
                part.copy_(&((&clean + inside).clamp_tensor(Some(least), Some(most)) - &clean));
            }
        }
        decoder.own_tokens(&delta.to_kind(x.kind()))
    }

    /// A random direction with a random length below the radius, the same on every layout.
    fn start(&self, size: Vec<i64>, seed: u64, key: &str) -> Tensor {
        let draw = Draw::new(seed, key);
        let count: i64 = size.iter().product();
        let values: Vec<f32> = (1..=count as u64).map(|i| draw.normal(i) as f32).collect();
        let direction = Tensor::from_slice(&values).view(size.as_slice());
        let length = f64::from(draw.symmetric(0) + 1.0) / 2.0 * self.radius;
        &direction * length / direction.norm().clamp_min(TINY)
    }
}

const TINY: f64 = 1e-30;

/// Sample and tokens of each forget sequence.
fn spans(micro_batch: &MicroBatch) -> Vec<(usize, Range<usize>)> {
    let mut start = 0;
    let mut spans = Vec::new();
    for sequence in &micro_batch.sequences {
        if sequence.stream == Stream::Forget {
            spans.push((sequence.sample, start..start + sequence.len));
        }
        start += sequence.len;
    }
    spans
}

fn rows(x: &Tensor, span: &Range<usize>) -> Tensor {
    x.narrow(0, span.start as i64, span.len() as i64)
}

/// A direction of steering: uniform in [0, 1) in every dimension, scaled to length 1; `[hidden]` f32 on `like`'s device.
pub(super) fn direction(hidden: i64, seed: u64, like: &Tensor) -> Tensor {
    let draw = Draw::new(seed, "rmu direction");
    let values: Vec<f32> = (0..hidden as u64).map(|i| (draw.symmetric(i) + 1.0) / 2.0).collect();
    let u = Tensor::from_slice(&values);
    upload_tensor(&(&u / u.norm()), like.device())
}

/// Gradients of the weights that nobody wants.
pub(super) struct Discard;

impl Gradients for Discard {
    fn product(&mut self, _: ParamId, _: &Tensor, _: &Tensor) {}
    fn vector(&mut self, _: ParamId, _: &Tensor) {}
    fn rows(&mut self, _: ParamId, _: &Tensor, _: &Tensor) {}
    fn complete(&mut self, _: usize) {}
}
