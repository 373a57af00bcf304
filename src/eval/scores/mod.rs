//! One forward pass of a text gives everything that is computed of its tokens: log-probabilities, whether each is the model's first
//! choice, and mean and variance over the vocabulary. [`measures`] turns them into numbers an item.

mod gradient;
mod measures;
mod wire;

use tch::{Kind, Tensor};

use crate::abi::slices::slice;
use crate::abi::upload::upload;
use crate::data::{Item, MicroBatch, Sample, Sequence, Stream, pack, share};
use crate::dist::World;
use crate::model::{Decoder, Keep, Weights};

pub use gradient::gradient_norms;
pub use measures::Floor;

/// A sequence and the tokens whose log-probabilities are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Text {
    pub tokens: Vec<i32>,
    pub targets: Vec<Target>,
    /// The last target is an end-of-text token, which belongs to no answer.
    pub ended: bool,
}

/// A token that may stand behind a position; several may be asked for at one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Position of the token before it.
    pub after: u32,
    pub token: i32,
}

impl Text {
    /// The scored tokens of a sample; `ended` as in [`Text`].
    pub fn of(sample: &Sample, ended: bool) -> Self {
        let target = |&at: &u32| Target { after: at - 1, token: sample.tokens[at as usize] };
        Self { tokens: sample.tokens.clone(), targets: sample.scored.iter().map(target).collect(), ended }
    }
}

/// What the model says of a text's targets, in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextScore {
    pub logprobs: Vec<f32>,
    /// The target is the model's first choice.
    pub correct: Vec<bool>,
    /// Mean and variance of the log-probabilities over the vocabulary; empty where they were not asked for.
    pub moments: Vec<[f64; 2]>,
    pub ended: bool,
}

/// How a forward pass over texts is cut.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOptions {
    /// Tokens of one micro-batch.
    pub budget: usize,
    /// Memory for one chunk of logits. Unit: bytes.
    pub logits_bytes: f64,
}

/// A model that is asked, on this rank's part of the mesh.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub decoder: &'a Decoder,
    pub weights: &'a Weights,
    pub world: &'a World,
    pub forward: ForwardOptions,
}

/// Scores of all texts, in their order; all ranks call it and get all of them.
///
/// The texts are spread over the data-parallel ranks and packed without padding. `progress` is called with the number of texts that
/// this rank has done.
pub fn score(model: Asked, texts: &[&Text], moments: bool, mut progress: impl FnMut(usize)) -> Vec<TextScore> {
    let item = |(sample, text): (usize, &&Text)| Item { stream: Stream::Forget, sample, len: text.tokens.len() };
    let items: Vec<Item> = texts.iter().enumerate().map(item).collect();
    let mesh = model.world.mesh;
    let mine = share(&items, mesh.dp).swap_remove(mesh.dp_rank());
    let mut scores = Vec::with_capacity(mine.len());
    for items in pack(&mine, model.forward.budget) {
        let batch = lay_out(&items, texts);
        scores.extend(forward(model, &batch, texts, moments));
        progress(items.len());
    }
    let mut all: Vec<(usize, TextScore)> =
        model.world.dp.gather_bytes(&wire::encode(&scores)).iter().flat_map(|bytes| wire::decode(bytes)).collect();
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, score)| score).collect()
}

/// The texts one after the other, longest first.
fn lay_out(items: &[Item], texts: &[&Text]) -> MicroBatch {
    let mut items = items.to_vec();
    items.sort_by_key(|item| (std::cmp::Reverse(item.len), item.sample));
    let mut batch = MicroBatch::default();
    for item in items {
        let text = texts[item.sample];
        let (start, first_row) = (batch.tokens.len(), batch.positions.len());
        batch.tokens.extend(text.tokens.iter().map(|&id| i64::from(id)));
        batch.positions.extend(text.targets.iter().map(|target| (start + target.after as usize) as i64));
        batch.targets.extend(text.targets.iter().map(|target| i64::from(target.token)));
        let rows = first_row..batch.positions.len();
        let (len, text) = (text.tokens.len(), crate::data::Text::Answer);
        batch.sequences.push(Sequence { stream: Stream::Forget, sample: item.sample, text, len, rows });
    }
    batch
}

fn forward(model: Asked, micro_batch: &MicroBatch, texts: &[&Text], moments: bool) -> Vec<(usize, TextScore)> {
    let Asked { decoder, weights, .. } = model;
    let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
    let (hidden, _) = decoder.forward(weights, &batch, Keep::Nothing);
    let positions = upload(&micro_batch.positions, decoder.device);
    let targets = upload(&micro_batch.targets, decoder.device);
    let rows = decoder.rows(weights, &hidden, &positions, model.forward.logits_bytes);
    let (scores, spread) = if moments {
        let (scores, spread) = decoder.scores_and_moments(weights, &rows, &targets);
        (scores, Some(spread))
    } else {
        (decoder.scores(weights, &rows, &targets, false), None)
    };
    let host = |t: &Tensor, kind| t.to_kind(kind).to_device(tch::Device::Cpu).contiguous();
    let (logprob, correct) = (host(&scores.logprob, Kind::Float), host(&scores.correct, Kind::Float));
    let (logprob, correct) = (slice::<f32>(&logprob), slice::<f32>(&correct));
    let spread: Option<[Vec<f64>; 2]> = spread.map(|spread| {
        [0, 1].map(|row| Vec::<f64>::try_from(host(&spread.get(row), Kind::Double)).expect("invariant: a row of f64"))
    });
    let one = |sequence: &Sequence| {
        let rows = sequence.rows.clone();
        let score = TextScore {
            logprobs: logprob[rows.clone()].to_vec(),
            correct: correct[rows.clone()].iter().map(|&x| x != 0.0).collect(),
            moments: spread.iter().flat_map(|[mean, variance]| rows.clone().map(|i| [mean[i], variance[i]])).collect(),
            ended: texts[sequence.sample].ended,
        };
        (sequence.sample, score)
    };
    micro_batch.sequences.iter().map(one).collect()
}
