//! Membership scores that need more than one pass over a text, against transformers' autograd in f64 and on several layouts.

use dunlearn::dist::{World, run_threads};
use dunlearn::eval::scores::{Target, gradient_norms, score};
use dunlearn::eval::{Asked, ForwardOptions, Text};
use serde_json::Value;
use tch::Kind;

use crate::tiny::{self, Spread};

/// tp, dp, sequence parallel, memory of a chunk of logits.
const LAYOUTS: [(usize, usize, bool, f64); 5] =
    [(1, 1, false, 1e9), (1, 1, false, 1.0), (2, 1, false, 1e9), (2, 2, true, 2000.0), (1, 2, false, 1e9)];

fn golden() -> Value {
    serde_json::from_str(&std::fs::read_to_string(tiny::golden("membership.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<i32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A golden text, behind the shots or alone.
fn text(golden: &Value, shots: &[Vec<i32>]) -> Text {
    let own = ids(&golden["ids"]);
    let mut tokens = own[..1].to_vec();
    shots.iter().for_each(|shot| tokens.extend(&shot[1..]));
    let first = tokens.len() - 1 + golden["prompt"].as_u64().unwrap() as usize;
    tokens.extend(&own[1..]);
    let targets = (first..tokens.len()).map(|at| Target { after: at as u32 - 1, token: tokens[at] }).collect();
    Text { tokens, targets, ended: golden["ended"].as_bool().unwrap() }
}

/// gradnorm and ReCaLL of each text, from a model of which only what matches `trained` is not frozen.
fn scores(case: &str, golden: &Value, layout: (usize, usize, bool, f64), trained: &str) -> Vec<[f64; 2]> {
    let (tp, dp, sequence_parallel, logits_bytes) = layout;
    let shots: Vec<Vec<i32>> = golden["shots"].as_array().unwrap().iter().map(ids).collect();
    let of = |shots: &[Vec<i32>]| -> Vec<Text> {
        golden["texts"].as_array().unwrap().iter().map(|one| text(one, shots)).collect()
    };
    let (alone, behind) = (of(&[]), of(&shots));
    let arch = tiny::architecture(case);
    let rank = |world: World| {
        let spread = Spread { sequence_parallel, ..Spread::default() };
        let (decoder, parameters) =
            tiny::model_training(&arch, &world, spread, Kind::Float, &[trained.to_owned()], |piece| {
                tiny::weights(piece, 0)
            });
        let forward = ForwardOptions { budget: 40, logits_bytes };
        let asked = Asked { decoder: &decoder, weights: &parameters.weights, world: &world, forward };
        let (alone, behind): (Vec<&Text>, Vec<&Text>) = (alone.iter().collect(), behind.iter().collect());
        let norms = gradient_norms(asked, &alone, |_| ());
        let (own, other) = (score(asked, &alone, false, |_| ()), score(asked, &behind, false, |_| ()));
        let recall = own.iter().zip(&other).map(|(own, other)| own.recall(other).unwrap());
        norms.into_iter().zip(recall).map(|(norm, recall)| [norm.unwrap(), recall]).collect::<Vec<_>>()
    };
    let ranks = run_threads(tp, dp, |world| tch::no_grad(|| rank(world)));
    assert!(ranks.iter().all(|other| *other == ranks[0]), "{case}: ranks disagree on {layout:?}");
    ranks.into_iter().next().unwrap()
}

#[test]
fn gradnorm_and_recall_match_autograd_on_every_layout() {
    for (case, golden) in golden().as_object().unwrap() {
        let mut one = Vec::new();
        for layout in LAYOUTS {
            // whether a tensor is trained changes nothing
            let trained = if layout.1 == 2 { "*mlp*" } else { "*" };
            let got = scores(case, golden, layout, trained);
            for (index, (got, want)) in got.iter().zip(golden["texts"].as_array().unwrap()).enumerate() {
                for (got, name) in got.iter().zip(["gradnorm", "recall"]) {
                    let want = want[name].as_f64().unwrap();
                    let error = (got - want).abs() / want.abs();
                    assert!(error < 3e-6, "{case} on {layout:?}: {name} of text {index} is {got} instead of {want}");
                }
            }
            if one.is_empty() {
                one = got;
            } else {
                let off = one.iter().flatten().zip(got.iter().flatten()).map(|(a, b)| (a - b).abs() / a.abs());
                assert!(off.clone().all(|off| off < 1e-6), "{case} on {layout:?}: off by {:?}", off.reduce(f64::max));
            }
        }
    }
}
