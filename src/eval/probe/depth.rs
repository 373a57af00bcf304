//! The unlearning depth score (arXiv 2605.24614): how deep inside the layers the knowledge of an answer's entity is gone, compared with
//! a model that never had it.
//!
//! The states behind a layer at the positions that predict the entity are put into the model that knows, once from the retrained and once
//! from the unlearned model. What the entity's mean log-probability loses by the first is the knowledge of that layer, `d1`; by the
//! second, `d2`. The score is the share of it that is erased, `sum d1 clip(d2 / d1, 0, 1) / sum d1` over the layers with
//! `d1 > 0.05`: 1 as after retraining, 0 untouched.

use tch::{Kind, Tensor};

use super::alone;
use crate::abi::upload::upload;
use crate::data::Sample;
use crate::dist::World;
use crate::model::{Decoder, Site, Weights};

/// The three models, of one shape.
#[derive(Clone, Copy)]
pub struct Models<'a> {
    /// Knows what was to be forgotten.
    pub original: &'a Weights,
    /// Never saw it.
    pub retrained: &'a Weights,
    pub unlearned: &'a Weights,
}

/// Least loss of log-probability that counts as knowledge. Unit: nats.
const LEAST: f64 = 0.05;

/// The score of each sample, None where no layer has the knowledge. `spans`: positions of the entity's tokens in each sample. All ranks
/// call it and get all of them.
///
/// `progress` is called for each sample that this rank has done.
pub fn depth(
    decoder: &Decoder,
    models: Models,
    samples: &[(Sample, Vec<u32>)],
    world: &World,
    mut progress: impl FnMut(),
) -> Vec<Option<f64>> {
    assert!(!decoder.sequence_parallel, "invariant: every rank holds the states of all tokens");
    let mut lines = String::new();
    for (index, (sample, span)) in samples.iter().enumerate().skip(world.mesh.dp_rank()).step_by(world.mesh.dp) {
        let (batch, positions) = alone(decoder, sample, span);
        let ids: Vec<i64> = span.iter().map(|&at| i64::from(sample.tokens[at as usize])).collect();
        let targets = upload(&ids, decoder.device);
        let states = |weights: &Weights| {
            let mut states = Vec::new();
            let _ = decoder.forward_changed(weights, &batch, &mut |_, site, value| {
                if site == Site::Layer {
                    states.push(value.index_select(0, &positions));
                }
                value
            });
            states
        };
        // mean log-probability of the entity, with other states behind one layer
        let mean = |put: Option<(usize, &Tensor)>| {
            let hidden = decoder.forward_changed(models.original, &batch, &mut |layer, site, value| match put {
                Some((at, state)) if site == Site::Layer && at == layer => value.index_copy(0, &positions, state),
                _ => value,
            });
            let rows = decoder.rows(models.original, &hidden, &positions, f64::INFINITY);
            let scores = decoder.scores(models.original, &rows, &targets, false);
            f64::try_from(scores.logprob.mean(Kind::Double)).expect("invariant: a mean is one number")
        };
        let full = mean(None);
        let loss = |weights: &Weights| -> Vec<f64> {
            states(weights).iter().enumerate().map(|(layer, state)| full - mean(Some((layer, state)))).collect()
        };
        let score = depth_score(&loss(models.retrained), &loss(models.unlearned));
        lines += &format!("{index} {}\n", score.map_or("none".to_owned(), |score| score.to_bits().to_string()));
        progress();
    }
    let mut all = vec![None; samples.len()];
    for part in world.dp.gather_bytes(lines.as_bytes()) {
        for line in String::from_utf8_lossy(&part).lines() {
            let (index, bits) = line.split_once(' ').expect("invariant: a rank wrote two words");
            let index: usize = index.parse().expect("invariant: a rank wrote a number");
            all[index] = bits.parse().ok().map(f64::from_bits);
        }
    }
    all
}

/// The score of one sample from what the states of the retrained (`d1`) and of the unlearned model (`d2`) cost, layer by layer.
pub fn depth_score(d1: &[f64], d2: &[f64]) -> Option<f64> {
    let known: Vec<(f64, f64)> = d1.iter().copied().zip(d2.iter().copied()).filter(|(d1, _)| *d1 > LEAST).collect();
    let total: f64 = known.iter().map(|(d1, _)| d1).sum();
    let erased: f64 = known.iter().map(|(d1, d2)| d1 * (d2 / d1).clamp(0.0, 1.0)).sum();
    (!known.is_empty()).then(|| erased / total)
}

#[cfg(test)]
mod tests {
    use super::depth_score;

    #[test]
    fn layers_without_knowledge_do_not_count() {
        // layer 0 knows nothing; layer 1 is half erased, layer 2 more than retraining would, layer 3 not at all
        let score = depth_score(&[0.04, 1.0, 2.0, 1.0], &[9.0, 0.5, 3.0, -0.2]).unwrap();
        assert!((score - (0.5 + 2.0) / 4.0).abs() < 1e-12);
        assert_eq!(depth_score(&[0.05, -1.0], &[1.0, 1.0]), None);
    }
}
