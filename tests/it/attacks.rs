//! Attacks on a model's knowledge: closed forms, and the same on every layout.

use std::collections::BTreeMap;
use std::path::Path;

use dunlearn::dist::{World, run_threads};
use dunlearn::eval::attack::{Code, NF4_LEVELS, Quantisation, quantise};
use dunlearn::eval::probe::{Component, Models, depth, krs};
use serde_json::Value;
use tch::Kind;

use crate::program::{dunlearn, mpirun};
use crate::tiny::{self, Spread};
use crate::{layouts, runs};

const SCHEMES: [Quantisation; 6] = [
    Quantisation::INT8,
    Quantisation::INT4,
    Quantisation::NF4,
    // groups that no shard's edge respects: 40 and 48 columns over 2 and 4 ranks
    Quantisation { code: Code::Int8, group: Some(7) },
    Quantisation { code: Code::Int4, group: Some(16) },
    Quantisation { code: Code::Nf4, group: Some(7) },
];

/// Whole tensors of the quantised model by Hugging Face name, put together from all ranks.
fn quantised(tp: usize, dp: usize, kind: Kind, how: Quantisation) -> BTreeMap<String, Vec<f32>> {
    let arch = layouts::architecture(false);
    let said = run_threads(tp, dp, |world: World| {
        tch::no_grad(|| {
            let (decoder, parameters) = tiny::model(&arch, &world, Spread::default(), kind, 0);
            let weights = quantise(&decoder, &parameters.weights, how);
            let pieces = decoder.table.params.iter().enumerate().flat_map(|(id, param)| {
                let weights = &weights;
                param.pieces.iter().map(move |piece| {
                    let values = weights.get(id).narrow(0, piece.row, piece.size[0]).to_kind(Kind::Float);
                    (piece.clone(), Vec::<f32>::try_from(values.contiguous().view([-1])).unwrap())
                })
            });
            pieces.collect::<Vec<_>>()
        })
    });
    let mut whole = BTreeMap::<String, Vec<f32>>::new();
    for (piece, values) in said.into_iter().flatten() {
        let (row, columns) = (piece.shape.get(1).copied().unwrap_or(1), piece.size.get(1).copied().unwrap_or(1));
        let first = piece.offset.get(1).copied().unwrap_or(0);
        let total = piece.shape.iter().product::<i64>() as usize;
        let target = whole.entry(piece.name.clone()).or_insert_with(|| vec![f32::NAN; total]);
        for (i, value) in values.into_iter().enumerate() {
            let (r, c) = (piece.offset[0] + i as i64 / columns, first + i as i64 % columns);
            target[(r * row + c) as usize] = value;
        }
    }
    whole
}

/// Each weight is the nearest of the numbers that its group can hold, spelled out one by one.
#[test]
fn quantised_weights_are_the_nearest_codes() {
    let arch = layouts::architecture(false);
    let (decoder, parameters) = tiny::model(&arch, &World::solo(), Spread::default(), Kind::Float, 0);
    for how in SCHEMES {
        let levels: Vec<f64> = match how.code {
            Code::Int8 => (-127..=127).map(|i| f64::from(i) / 127.0).collect(),
            Code::Int4 => (-7..=7).map(|i| f64::from(i) / 7.0).collect(),
            Code::Nf4 => NF4_LEVELS.iter().map(|&level| f64::from(level)).collect(),
        };
        let got = quantised(1, 1, Kind::Float, how);
        let mut moved = 0;
        for (id, param) in decoder.table.params.iter().enumerate() {
            for piece in &param.pieces {
                let values = parameters.weights.get(id).narrow(0, piece.row, piece.size[0]).contiguous().view([-1]);
                let values = Vec::<f32>::try_from(values).unwrap();
                if !piece.name.contains("proj.weight") {
                    assert_eq!(got[&piece.name], values, "{} is no matrix of a layer", piece.name);
                    continue;
                }
                let columns = piece.shape[1] as usize;
                let group = how.group.unwrap_or(columns);
                // a piece may be some rows of a fused tensor
                let rows = got[&piece.name].chunks(columns).skip(piece.offset[0] as usize);
                for (row, got) in values.chunks(columns).zip(rows) {
                    for (part, got) in row.chunks(group).zip(got.chunks(group)) {
                        let scale = part.iter().fold(0.0f64, |most, &x| most.max(f64::from(x).abs()));
                        for (&x, &got) in part.iter().zip(got) {
                            let error = |level: &&f64| (**level * scale - f64::from(x)).abs();
                            let best = levels.iter().min_by(|a, b| error(a).total_cmp(&error(b))).unwrap() * scale;
                            let (best, x, got) = ((best - f64::from(x)).abs(), f64::from(x), f64::from(got));
                            assert!((got - x).abs() <= best + 1e-6 * scale, "{how:?} {}: {x} became {got}", piece.name);
                            let held = levels.iter().any(|level| (level * scale - got).abs() <= 1e-6 * scale);
                            assert!(held, "{how:?} {}: {got} is no level of {scale}", piece.name);
                            moved += usize::from(x != got);
                        }
                    }
                }
            }
        }
        assert!(moved > 1000, "{how:?} moved {moved} weights");
    }
}

#[test]
fn quantised_weights_are_the_same_on_every_layout() {
    for how in SCHEMES {
        for kind in [Kind::Float, Kind::BFloat16] {
            let one = quantised(1, 1, kind, how);
            for (tp, dp) in [(2, 1), (4, 1), (2, 2)] {
                assert_eq!(quantised(tp, dp, kind, how), one, "{how:?} {kind:?} tp {tp} dp {dp}");
            }
        }
    }
}

/// The levels are quantiles of a normal distribution: 8 above zero and 7 below, evenly spaced in probability between 1/2 and
/// 0.9677083, in units of the largest (QLoRA's appendix E, bitsandbytes' `create_normal_map`).
#[test]
fn nf4_levels_are_normal_quantiles() {
    let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    // Simpson's rule from 0
    let probability = |x: f64| {
        let (n, h) = (2000, x / 2000.0);
        let inner: f64 = (1..n).map(|i| if i % 2 == 1 { 4.0 } else { 2.0 } * density(f64::from(i) * h)).sum();
        0.5 + (density(0.0) + inner + density(x)) * h / 3.0
    };
    let last = 0.967_708_3;
    let (mut low, mut high) = (1.0, 3.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if probability(middle) < last { low = middle } else { high = middle }
    }
    for (at, &level) in NF4_LEVELS.iter().enumerate() {
        let steps = if at < 7 { (at as f64 - 7.0) / 7.0 } else { (at as f64 - 7.0) / 8.0 };
        let want = 0.5 + steps * (last - 0.5);
        let got = probability(f64::from(level) * low);
        assert!((got - want).abs() < 1e-6, "level {at}: {level} has {got}, expected {want}");
    }
}

/// `body` on every rank with a decoder and the weights of seed 0, those whose name holds a word of `changed` of seed 1 in the second
/// model, and all of seed 1 in the third.
fn with_models<T: Send + PartialEq + std::fmt::Debug>(
    (tp, dp, sequence_parallel): (usize, usize, bool),
    changed: &[&str],
    body: impl Fn(&dunlearn::model::Decoder, [&dunlearn::model::Weights; 3], &World) -> T + Sync,
) -> T {
    let arch = layouts::architecture(false);
    let mut all = run_threads(tp, dp, |world: World| {
        tch::no_grad(|| {
            let spread = Spread { sequence_parallel, ..Spread::default() };
            let model = |seed_of: &dyn Fn(&str) -> u64| {
                tiny::model_from(&arch, &world, spread, Kind::Float, |piece| tiny::weights(piece, seed_of(&piece.name)))
            };
            let (decoder, original) = model(&|_| 0);
            let (_, second) = model(&|name| u64::from(changed.iter().any(|word| name.contains(word))));
            let (_, third) = model(&|_| 1);
            body(&decoder, [&original.weights, &second.weights, &third.weights], &world)
        })
    });
    let first = all.remove(0);
    assert!(all.iter().all(|other| *other == first), "ranks disagree");
    first
}

/// Where one matrix was changed, putting back what it made recovers everything, and putting back anything else nothing.
#[test]
fn krs_finds_what_was_changed() {
    let samples = layouts::samples("forget", 5).samples;
    for (changed, component, layer) in [
        ("layers.1.mlp.down_proj", Component::Values, 1),
        ("layers.1.mlp.gate_up_proj", Component::Mlp, 1),
        ("layers.2.self_attn.o_proj", Component::Attention, 2),
    ] {
        for window in [1, 2] {
            let on = |layout| {
                with_models(layout, &[changed], |decoder, [original, unlearned, _], world| {
                    krs(decoder, unlearned, original, &samples, window, world, || ())
                })
            };
            let one = on((1, 1, false));
            assert_eq!(one.len(), 3 * (4 - window));
            for found in &one {
                let score = found.score.unwrap();
                let inside = (found.first_layer..found.first_layer + window).contains(&layer);
                // a later layer's values also take what the change has done to them with them
                let want = if inside && found.component == component { Some(1.0) } else { None };
                match want {
                    Some(want) => assert!((score - want).abs() < 1e-9, "{changed} {window} {found:?}"),
                    None => assert!(score < 0.999, "{changed} {window} {found:?}"),
                }
                if found.component == Component::Values && component != Component::Values {
                    assert!(score.abs() < 1e-9, "the values were not changed: {found:?}");
                }
            }
            for layout in [(2, 1, false), (2, 2, false), (4, 1, true)] {
                for (a, b) in one.iter().zip(on(layout)) {
                    assert_eq!((a.first_layer, a.component), (b.first_layer, b.component));
                    assert!((a.score.unwrap() - b.score.unwrap()).abs() < 1e-4, "{layout:?}: {a:?} {b:?}");
                }
            }
        }
    }
    let same = with_models((1, 1, false), &[], |decoder, [original, unlearned, _], world| {
        krs(decoder, unlearned, original, &samples, 1, world, || ())
    });
    assert!(same.iter().all(|found| found.score.is_none()), "equal models have nothing to recover");
}

/// A model that was not changed has depth 0, a retrained one 1, and one whose upper layers alone were retrained lies between.
#[test]
fn depth_lies_between_untouched_and_retrained() {
    let samples = layouts::samples("forget", 6).samples;
    // the last two scored tokens are the entity
    let spans: Vec<_> =
        samples.into_iter().map(|s| (s.clone(), s.scored[s.scored.len().saturating_sub(2)..].to_vec())).collect();
    let on = |layout, changed: &[&str]| {
        with_models(layout, changed, |decoder, [original, unlearned, retrained], world| {
            depth(decoder, Models { original, retrained, unlearned }, &spans, world, || ())
        })
    };
    let untouched = on((1, 1, false), &[]);
    let retrained = on((1, 1, false), &[""]);
    assert!(untouched.iter().flatten().count() >= 3, "{untouched:?}");
    assert!(untouched.iter().flatten().all(|&score| score == 0.0), "{untouched:?}");
    assert!(retrained.iter().flatten().all(|&score| score == 1.0), "{retrained:?}");
    let upper = ["layers.1", "layers.2"];
    let between = on((1, 1, false), &upper);
    let known: Vec<f64> = between.iter().flatten().copied().collect();
    assert!(known.iter().any(|score| (0.01..0.99).contains(score)), "{known:?}");
    for layout in [(2, 1, false), (2, 2, false), (4, 1, false)] {
        for (a, b) in between.iter().zip(on(layout, &upper)) {
            assert_eq!(a.is_some(), b.is_some());
            assert!((a.unwrap_or(0.0) - b.unwrap_or(0.0)).abs() < 1e-4, "{layout:?}: {a:?} {b:?}");
        }
    }
}

const UNLEARN: &str = r#"
[run]
dir = "{runs}/attacked"
[model]
path = "{runs}/base/model"
[data]
forget = { path = "{runs}/paraphrased.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[method]
objective = "npo"
retain = "nll"
[train]
steps = 30
global_batch = 3
precision = "f32"
[optimizer]
lr = 1e-3
[eval]
before = false
[eval.attack]
paraphrase = "asked_otherwise"
in_context = 2
latent = { layer = 1, radius = 6.0 }
relearn = { fraction = 0.5, training = { steps = 20, batch = 3, lr = 1e-3, every = 10 } }
rtt = { folds = 2, epochs = 4, batch = 3, lr = 1e-3 }
[eval.attack.benign]
source = { path = "{data}/retain.jsonl", kind = "qa", limit = 12 }
training = { steps = 4, batch = 3, lr = 1e-4, every = 2 }
"#;

/// The numbers of `eval/attack.json`: metrics and curves.
fn results(run: &Path) -> Value {
    let path = run.join("eval/attack.json");
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// On the model of the synthetic authors: each attack has its numbers, relearning brings knowledge back, and four ranks find what one
/// finds.
#[test]
fn attacks_restore_knowledge_and_are_the_same_on_every_layout() {
    let workshop = runs::trained();
    let lines = std::fs::read_to_string(workshop.path("data/forget.jsonl")).unwrap();
    let lines = lines.lines().map(|line| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["asked_otherwise"] = Value::from(format!("Please tell me: {}", row["question"].as_str().unwrap()));
        format!("{row}\n")
    });
    std::fs::write(workshop.path("paraphrased.jsonl"), lines.collect::<String>()).unwrap();
    let config = workshop.config("attacked.toml", UNLEARN);
    let done = dunlearn(&["--config", &config]);
    assert!(done.success, "{}", done.text);
    let model = workshop.path("attacked/model").display().to_string();
    let attack = |name: &str, ranks: usize, tp: usize| {
        let (dir, tp) = (format!("run.dir={}", workshop.path(name).display()), format!("parallel.tp={tp}"));
        let words = ["attack", "--config", &config, "--model", &model, "--set", &dir, "--set", &tp];
        let done = if ranks == 1 { dunlearn(&words) } else { mpirun(ranks, &words) };
        assert!(done.success, "{}", done.text);
        (results(&workshop.path(name)), done.text)
    };
    let (one, told) = attack("attack_1", 1, 1);
    println!("{told}");
    let value = |all: &Value, name: &str| {
        let found = &all["metrics"][format!("attack.{name}")]["value"];
        found.as_f64().unwrap_or_else(|| panic!("attack.{name} is {found}\n{told}"))
    };
    let (unlearned, original) =
        (value(&one, "none.forget.probability"), value(&one, "none.original.forget.probability"));
    assert!(original > 0.9 && unlearned < 0.5 * original, "{original} {unlearned}");

    // relearning: from step 0 on the way back, and further than training on what was kept
    let points = one["curves"]["attack.relearn"]["points"].as_array().unwrap();
    let curve = |name: &str| points.iter().map(|point| point[name].as_f64().unwrap()).collect::<Vec<_>>();
    assert_eq!(curve("step"), [0.0, 10.0, 20.0]);
    let (trained, held_out) = (curve("train.probability"), curve("forget.probability"));
    println!("relearn: trained {trained:?}, held out {held_out:?}");
    assert!(trained[2] > 2.0 * trained[0] && trained[2] > 0.5, "{trained:?}");
    assert!(value(&one, "latent.forget.probability") > unlearned, "an attacker of hidden states finds nothing");
    for attack in ["int8", "int4", "nf4", "paraphrase", "in_context", "benign", "rtt"] {
        for model in ["", "original."] {
            let found = value(&one, &format!("{attack}.{model}forget.probability"));
            assert!((0.0..=1.0).contains(&found), "{attack} {model} {found}");
        }
    }
    let int8 = value(&one, "int8.original.forget.probability");
    assert!((int8 / original - 1.0).abs() < 0.02 && int8 != original, "8 bits change {original} to {int8}");
    let folds = one["curves"]["attack.rtt"]["points"].as_array().unwrap();
    assert_eq!(folds.len(), 2);
    assert!(value(&one, "rtt.before.forget.probability") <= value(&one, "rtt.forget.probability"));
    // every part of RTT is measured once: its items are those of the forget set
    let n = |name: &str| one["metrics"][format!("attack.{name}.forget.probability")]["n"].as_u64().unwrap();
    assert_eq!(n("rtt"), n("none"));

    let (four, _) = attack("attack_4", 4, 2);
    let names: Vec<&String> = one["metrics"].as_object().unwrap().keys().collect();
    assert_eq!(names, four["metrics"].as_object().unwrap().keys().collect::<Vec<_>>());
    let mut compared = 0;
    for name in names.into_iter().filter(|name| name.ends_with(".probability") || name.ends_with(".loss")) {
        let [a, b] = [&one, &four].map(|all| all["metrics"][name.as_str()]["value"].as_f64().unwrap());
        let trained = ["relearn", "benign", "rtt"].iter().any(|attack| name.contains(attack));
        // training amplifies roundings, and so does the latent attack's normalised gradient
        let tolerance = if trained || name.contains("latent") { 2e-3 } else { 1e-5 };
        assert!((a - b).abs() <= 1e-6 + tolerance * a.abs(), "{name}: {a} on one rank, {b} on four");
        compared += 1;
    }
    assert!(compared > 40, "{compared} numbers were compared");
}
