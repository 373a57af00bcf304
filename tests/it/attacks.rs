//! Attacks on a model's knowledge: closed forms, and the same on every layout.

use std::collections::BTreeMap;

use dunlearn::dist::{World, run_threads};
use dunlearn::eval::attack::{Code, NF4_LEVELS, Quantisation, quantise};
use tch::Kind;

use crate::layouts;
use crate::tiny::{self, Spread};

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
                for (row, got) in values.chunks(columns).zip(got[&piece.name].chunks(columns)) {
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
