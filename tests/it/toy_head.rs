//! Losses on whole distributions on the toy batch of `tests/golden/toy.py`: published values, and gradients by the logits that were
//! found by finite differences; on one rank and with the vocabulary cut over two.

use dunlearn::dist::{Fault, World, run_threads_with};
use dunlearn::eval::TextScore;
use dunlearn::eval::scores::Floor;
use dunlearn::model::sharding::ParamId;
use dunlearn::model::{Decoder, Distribution, Gradients, ReferenceHead, Weights};
use dunlearn::train::Parameters;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::tiny::{self, Spread};

const ROWS: usize = 2;
const POSITIONS: usize = 6;
const VOCAB: usize = 7;
/// Square of the length of every hidden row.
const SQUARE: f64 = 100.0;

/// A head that gives back the logits which its rows are made of.
struct Toy {
    json: Value,
    decoder: Decoder,
    parameters: Parameters,
}

impl Toy {
    fn new(world: &World) -> Self {
        let json = serde_json::from_str(&std::fs::read_to_string(tiny::golden("toy.json")).unwrap()).unwrap();
        let width = VOCAB as i64 + 1;
        let mut arch = tiny::architecture("llama_gqa");
        (arch.vocab, arch.hidden, arch.norm_eps) = (VOCAB as i64, width, 0.0);
        let options = (Kind::Float, Device::Cpu);
        let (decoder, parameters) =
            tiny::model_from(&arch, world, Spread::default(), Kind::Float, |piece| match piece.name.as_str() {
                "model.norm.weight" => Tensor::full(&piece.size, (SQUARE / width as f64).sqrt(), options),
                "lm_head.weight" => {
                    Tensor::eye_m(VOCAB as i64, width, options).narrow(0, piece.offset[0], piece.size[0]).copy()
                }
                _ => Tensor::zeros(&piece.size, options),
            });
        Self { json, decoder, parameters }
    }

    fn weights(&self) -> &Weights {
        &self.parameters.weights
    }

    /// `[rows * positions, hidden]`: what the final norm turns into the logits; a last element gives all rows the same length.
    fn hidden(&self, stream: &str, which: &str) -> Tensor {
        let of: Vec<f64> = serde_json::from_value(self.json["coefficients_abcd"][stream][which].clone()).unwrap();
        let logit = |row: usize, at: usize, token: usize| {
            2.0 * (of[0] + of[1] * row as f64 + of[2] * at as f64 + of[3] * token as f64).sin()
        };
        let mut values = Vec::new();
        for (row, at) in (0..ROWS).flat_map(|row| (0..POSITIONS).map(move |at| (row, at))) {
            let logits: Vec<f64> = (0..VOCAB).map(|token| logit(row, at, token)).collect();
            let rest = SQUARE - logits.iter().map(|x| x * x).sum::<f64>();
            values.extend(logits.iter().chain(&[rest.sqrt()]).map(|&x| x as f32));
        }
        Tensor::from_slice(&values).view([-1, VOCAB as i64 + 1])
    }

    /// Rows of the head and ids of the forget labels: at the row before a label, or at the label's own (as one program has it).
    fn labels(&self, shifted: bool) -> (Vec<i64>, Vec<i64>) {
        let labels: Vec<Vec<i64>> = serde_json::from_value(self.json["labels"]["forget"].clone()).unwrap();
        let places = labels.iter().enumerate().flat_map(|(row, labels)| {
            let labelled = labels.iter().enumerate().filter(|(_, label)| **label >= 0);
            labelled.map(move |(at, &label)| ((row * POSITIONS + at - usize::from(shifted)) as i64, label))
        });
        places.unzip()
    }

    fn head(&self) -> ReferenceHead {
        ReferenceHead { weight: self.weights().get(self.decoder.table.head).copy() }
    }
}

/// Keeps the gradients of the logits.
#[derive(Default)]
struct Logits(Vec<Tensor>);

impl Gradients for Logits {
    fn product(&mut self, _: ParamId, dy: &Tensor, _: &Tensor) {
        self.0.push(dy.copy());
    }
    fn vector(&mut self, _: ParamId, _: &Tensor) {}
    fn rows(&mut self, _: ParamId, _: &Tensor, _: &Tensor) {}
    fn complete(&mut self, _: usize) {}
}

fn list(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).contiguous().view([-1])).unwrap()
}

#[test]
fn the_divergence_is_the_published_one() {
    let toy = Toy::new(&World::solo());
    let all = Tensor::arange((ROWS * POSITIONS) as i64, (Kind::Int64, Device::Cpu));
    for logits_bytes in [1e9, 100.0] {
        let before = toy.decoder.rows(toy.weights(), &toy.hidden("retain", "reference"), &all, logits_bytes).normed();
        let now = toy.decoder.rows(toy.weights(), &toy.hidden("retain", "current"), &all, logits_bytes);
        let kl = toy.decoder.divergence(toy.weights(), &now, &toy.head(), &before).kl;
        let mean = f64::try_from(kl.mean(Kind::Double)).unwrap();
        let published = toy.json["published"]["kl_retain_all_positions"].as_f64().unwrap();
        assert!((mean - published).abs() < 1e-6, "{mean} instead of {published}");
    }
}

/// Values that official code gives for exact memorisation, extraction strength, Min-k and Min-k++, through the head on one rank and
/// with the vocabulary cut over two.
#[test]
fn memorisation_and_membership_scores_are_the_published_ones() {
    let want = [
        [0.284_740_763_6, 2.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0, 3.032_633_65, 2.157_432_74],
        [0.315_983_871_0, 0.75, 0.25, 0.0, 2.800_443_58, 1.678_862_69],
    ];
    for (tp, logits_bytes) in [(1, 1e9), (1, 30.0), (2, 1e9), (2, 30.0)] {
        let run = |world: World| tch::no_grad(|| item_scores(&world, logits_bytes));
        for said in run_threads_with(Fault::None, tp, 1, run) {
            for (score, want) in said.iter().zip(want) {
                let got = [
                    score.probability(),
                    score.exact_memorisation(),
                    score.extraction_strength(Floor::OneToken),
                    score.extraction_strength(Floor::Zero),
                    score.min_k(0.4),
                    score.min_k_plus_plus(0.4),
                ]
                .map(Option::unwrap);
                assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 2e-6), "{got:?} instead of {want:?} on {tp}");
            }
        }
    }
}

/// Scores of the labels of each row of the batch; the last one ends the text.
fn item_scores(world: &World, logits_bytes: f64) -> Vec<TextScore> {
    let toy = Toy::new(world);
    let labels = [[-1, -1, 1, 4, 3, 3], [-1, 0, 4, 3, 4, 2]];
    let places = (0..ROWS).flat_map(|row| (1..POSITIONS).map(move |at| (row, at)));
    let places = places.filter(|&(row, at)| labels[row][at] >= 0);
    let (at, ids): (Vec<i64>, Vec<i64>) =
        places.map(|(row, at)| ((row * POSITIONS + at - 1) as i64, labels[row][at])).unzip();
    let (rows, ids) = (Tensor::from_slice(&at), Tensor::from_slice(&ids));
    let rows = toy.decoder.rows(toy.weights(), &toy.hidden("forget", "current"), &rows, logits_bytes);
    let (scores, moments) = toy.decoder.scores_and_moments(toy.weights(), &rows, &ids);
    let (logprobs, correct, moments) = (list(&scores.logprob), list(&scores.correct), list(&moments));
    let of = |row: usize| {
        let mine = (0..at.len()).filter(|&i| at[i] as usize / POSITIONS == row);
        let mut score = TextScore { ended: true, ..TextScore::default() };
        for i in mine {
            score.logprobs.push(logprobs[i] as f32);
            score.correct.push(correct[i] != 0.0);
            score.moments.push([moments[i], moments[at.len() + i]]);
        }
        score
    };
    (0..ROWS).map(of).collect()
}

/// Losses of the rows, and the gradient of their mean by each logit, `[rows, vocab]`.
fn distribution(
    world: &World,
    kind: Distribution,
    shifted: bool,
    skip: usize,
    logits_bytes: f64,
) -> (Vec<f64>, Vec<f64>) {
    let toy = Toy::new(world);
    let (mut at, mut ids) = toy.labels(shifted);
    if skip > 0 {
        // the first label of each row of the batch
        let first: Vec<bool> =
            at.iter().map(|a| !at.iter().any(|b| b / POSITIONS as i64 == a / POSITIONS as i64 && b < a)).collect();
        let kept = |values: &[i64]| values.iter().zip(&first).filter(|(_, first)| !**first).map(|(x, _)| *x).collect();
        (at, ids) = (kept(&at), kept(&ids));
    }
    let (at, ids) = (Tensor::from_slice(&at), Tensor::from_slice(&ids));
    let (decoder, weights) = (&toy.decoder, toy.weights());
    let rows = decoder.rows(weights, &toy.hidden("forget", "current"), &at, logits_bytes);
    let before = decoder.rows(weights, &toy.hidden("forget", "reference"), &at, 1e9).normed();
    let head = toy.head();
    let reference = Some((&head, &before));
    let of = decoder.distribution(weights, &rows, &ids, kind, reference);
    let loss = list(&of.loss);
    let weight = Tensor::full([rows.len()], 1.0 / rows.len() as f64, (Kind::Float, Device::Cpu));
    let mut sink = Logits::default();
    let _ = decoder.distribution_backward(weights, &rows, of, &weight, reference, &mut sink);
    let mine = Tensor::cat(&sink.0, 0).narrow(0, 0, rows.len());
    (loss, list(&mine))
}

#[test]
fn losses_on_distributions_and_their_gradients_are_the_golden_ones() {
    let json: Value = serde_json::from_str(&std::fs::read_to_string(tiny::golden("toy.json")).unwrap()).unwrap();
    for (name, kind, shifted, skip) in [
        ("me", Distribution::Uniform, true, 0),
        ("undial_3", Distribution::SoftTarget { beta: 3.0 }, true, 0),
        ("undial_10", Distribution::SoftTarget { beta: 10.0 }, true, 0),
        ("ce_u_0", Distribution::WithoutTarget, true, 0),
        ("ce_u_1", Distribution::WithoutTarget, true, 1),
        ("ihl", Distribution::Hinge, true, 0),
        ("pdu_unshifted", Distribution::Margin, false, 0),
    ] {
        for (tp, logits_bytes) in [(1, 1e9), (1, 30.0), (2, 1e9), (2, 30.0)] {
            let run = |world: World| tch::no_grad(|| distribution(&world, kind, shifted, skip, logits_bytes));
            let said = run_threads_with(Fault::None, tp, 1, run);
            let rows = said[0].0.len();
            let mean = said[0].0.iter().sum::<f64>() / rows as f64;
            let want = json["values"][name].as_f64().unwrap();
            assert!((mean - want).abs() < 1e-6, "{name} on {tp} ranks: {mean} instead of {want}");
            let want: Vec<Vec<f64>> = serde_json::from_value(json["dloss_dlogits"][name].clone()).unwrap();
            assert_eq!(rows, want.len());
            for (row, want) in want.iter().enumerate() {
                // each rank's columns of the row, one rank after the other
                let got: Vec<f64> = said
                    .iter()
                    .flat_map(|(_, gradient)| {
                        let width = gradient.len() / rows;
                        gradient[row * width..][..width].to_vec()
                    })
                    .collect();
                assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{name}: {got:?} instead of {want:?}");
            }
        }
    }
}

/// A model that is sure of a token, logits up to 300 apart: nothing overflows, and what CE-U and UNDIAL pull to is a distribution.
#[test]
fn sure_models_give_finite_gradients() {
    let arch = tiny::architecture("llama_gqa");
    let (decoder, parameters) = tiny::model_from(&arch, &World::solo(), Spread::default(), Kind::Float, |piece| {
        let scale = if piece.name == "lm_head.weight" { 300.0 } else { 1.0 };
        tiny::weights(piece, 0) * scale
    });
    let weights = &parameters.weights;
    let head = weights.get(decoder.table.head);
    // rows along the head's own rows of these tokens
    let ids = Tensor::from_slice(&[3i64, 50, 96]);
    let at = Tensor::arange(3, (Kind::Int64, Device::Cpu));
    let reference = ReferenceHead { weight: head.copy() };
    for kind in [Distribution::WithoutTarget, Distribution::Hinge, Distribution::SoftTarget { beta: 10.0 }] {
        let rows = decoder.rows(weights, &head.index_select(0, &ids), &at, 1e9);
        let normed = rows.normed();
        let of = decoder.distribution(weights, &rows, &ids, kind, Some((&reference, &normed)));
        assert!(list(&of.loss).iter().all(|x| x.is_finite()), "{kind:?}: {}", of.loss);
        let weight = Tensor::ones([3], (Kind::Float, Device::Cpu));
        let mut sink = Logits::default();
        let _ = decoder.distribution_backward(weights, &rows, of, &weight, Some((&reference, &normed)), &mut sink);
        // gradients of a loss that depends on the softmax alone add up to 0 in each row
        let sums = list(&sink.0[0].narrow(0, 0, 3).sum_dim_intlist(1i64, false, Kind::Double));
        assert!(sums.iter().all(|x| x.abs() < 1e-4), "{kind:?}: {sums:?}");
    }
}
