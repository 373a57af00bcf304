//! What one rank of a mesh that is not there would send, against the formulas.

use std::collections::BTreeMap;

use dunlearn::bench::{StepBench, step};
use dunlearn::config;
use dunlearn::dist::wire::{Record, summarise};
use dunlearn::dist::{Mesh, World, run_threads};
use dunlearn::model::architecture::Packing;
use dunlearn::model::{Architecture, Rope, Scaling};
use tch::Device;

const HIDDEN: i64 = 64;
const LAYERS: usize = 3;

fn architecture() -> Architecture {
    Architecture {
        family: "test",
        hidden: HIDDEN,
        num_layers: LAYERS,
        num_heads: 8,
        num_kv_heads: 8,
        head_dim: 8,
        intermediate: 128,
        vocab: 512,
        norm_eps: 1e-5,
        rope: Rope { theta: 1e4, dim: 8, scaling: Scaling::None },
        tied: false,
        qkv_bias: false,
        qk_norm: false,
        windows: vec![None; LAYERS],
        packing: Packing::Separate,
        max_positions: 1024,
        initializer_range: 0.02,
    }
}

/// A step of a small model.
fn bench(mesh: Mesh, sequence_parallel: bool, zero: bool) -> StepBench {
    StepBench {
        arch: architecture(),
        parallel: config::Parallel { tp: mesh.tp, sequence_parallel, zero, ..config::Parallel::default() },
        train: config::Train {
            epochs: None,
            steps: None,
            global_batch: 4,
            micro_batch_tokens: 100_000,
            precision: config::Precision::Bf16,
            grad_dtype: config::Float::F32,
            recompute: config::Recompute::None,
            logits_mib: 256.0,
        },
        optimizer: config::Optimizer {
            name: config::OptimizerName::Adamw,
            lr: 1e-5,
            betas: None,
            eps: None,
            momentum: None,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            state_dtype: None,
            in_backward: false,
        },
        device: Device::Cpu,
        length: 32,
        scored: 1.0,
        steps: 1,
        trace: false,
    }
}

/// Bytes of the tensors of one step by axis and operation, and calls.
fn traffic(mesh: Mesh, sequence_parallel: bool, zero: bool) -> BTreeMap<(&'static str, &'static str), (usize, f64)> {
    traffic_of(mesh, bench(mesh, sequence_parallel, zero))
}

fn traffic_of(mesh: Mesh, bench: StepBench) -> BTreeMap<(&'static str, &'static str), (usize, f64)> {
    let record = Record::default();
    let world = World::planned(mesh, &record);
    let mut calls = Vec::new();
    tch::no_grad(|| step(&bench, &world, |_| calls = record.take())).unwrap();
    let sums = summarise(&calls).into_iter();
    sums.map(|sum| ((sum.axis, sum.op), (sum.calls, sum.bytes as f64))).collect()
}

#[test]
fn tensor_parallel_traffic_is_four_sums_a_layer() {
    let found = traffic(Mesh { rank: 0, tp: 4, dp: 1 }, false, true);
    let (calls, bytes) = found[&("tp", "all-reduce")];
    // forward and backward of attention and MLP, the embedding, the head's rows, and three small ones: the norm's squares and
    // nothing else on the device
    let large = 4 * LAYERS + 2;
    assert!((large..=large + 1).contains(&calls), "{found:?}");
    let (gathers, statistics) = found[&("tp", "all-gather")];
    assert_eq!(gathers, 1, "the statistics of the head's rows");
    // 16 bytes a row from each rank
    let rows = statistics / 16.0 / 4.0;
    let tokens = bytes / (large as f64 * HIDDEN as f64 * 2.0);
    assert!((tokens / rows - 1.0).abs() < 0.1, "{tokens} tokens and {rows} rows: {found:?}");
    assert!(!found.keys().any(|(axis, _)| *axis == "dp"), "{found:?}");

    // sequence parallelism sends the same bytes by other operations: 3 gathers and 2 scatters more or less a half block
    let spread = traffic(Mesh { rank: 1, tp: 4, dp: 1 }, true, true);
    assert_eq!(spread[&("tp", "reduce-scatter")].0, 4 * LAYERS + 1, "{spread:?}");
}

#[test]
fn data_parallel_traffic_is_the_parameters_once_down_and_once_up() {
    for tp in [1, 2] {
        let each = architecture().num_parameters() as f64 / tp as f64;
        let found = traffic(Mesh { rank: 0, tp, dp: 2 }, false, true);
        let (_, down) = found[&("dp", "reduce-scatter")];
        let (_, up) = found[&("dp", "all-gather")];
        // f32 gradients, bf16 weights; norms are on every tensor-parallel rank, and buckets are padded
        assert!((down / (4.0 * each) - 1.0).abs() < 0.02, "{down} of {}", 4.0 * each);
        assert!((up / (2.0 * each) - 1.0).abs() < 0.02, "{up} of {}", 2.0 * each);
        let plain = traffic(Mesh { rank: 0, tp, dp: 2 }, false, false);
        let (_, bytes) = plain[&("dp", "all-reduce")];
        assert!((bytes / (4.0 * each) - 1.0).abs() < 0.02, "{bytes} of {}", 4.0 * each);
        // a sum in bf16 is half of that
        let mesh = Mesh { rank: 0, tp, dp: 2 };
        let mut half = bench(mesh, false, true);
        half.parallel.reduce_dtype = config::Float::Bf16;
        let (_, down) = traffic_of(mesh, half)[&("dp", "reduce-scatter")];
        assert!((down / (2.0 * each) - 1.0).abs() < 0.02, "{down} of {}", 2.0 * each);
    }
}

/// Half blocks are computed again from their inputs up to their last product: no sum is done twice.
#[test]
fn recomputing_sends_nothing_more() {
    let mesh = Mesh { rank: 0, tp: 4, dp: 1 };
    for sequence_parallel in [false, true] {
        let mut again = bench(mesh, sequence_parallel, true);
        again.train.recompute = config::Recompute::HalfBlock;
        let (kept, again) = (traffic(mesh, sequence_parallel, true), traffic_of(mesh, again));
        assert_eq!(kept[&("tp", "all-reduce")], again[&("tp", "all-reduce")]);
        if sequence_parallel {
            assert_eq!(kept[&("tp", "reduce-scatter")], again[&("tp", "reduce-scatter")]);
        }
    }
}

/// A timeline has every rank's parts and each of its gradient sums, under way before it is waited for.
#[test]
fn a_timeline_shows_computing_and_sums() {
    let traces = run_threads(1, 2, |world| {
        let mut bench = StepBench { trace: true, ..bench(world.mesh, false, true) };
        bench.parallel.bucket_mib = 0.1;
        tch::no_grad(|| step(&bench, &world, |_| ())).unwrap().trace.unwrap()
    });
    assert_eq!(traces[0].events, traces[1].events);
    let of = |rank: i64, tracks: &[i64]| -> Vec<(String, f64, f64)> {
        let mine = traces[0].events.iter().filter(|event| event["ph"] == "X" && event["pid"] == rank);
        let mine = mine.filter(|event| tracks.contains(&event["tid"].as_i64().unwrap()));
        let number = |event: &serde_json::Value, key: &str| event[key].as_f64().unwrap();
        mine.map(|e| (e["name"].as_str().unwrap().to_owned(), number(e, "ts"), number(e, "dur"))).collect()
    };
    for rank in 0..2 {
        let parts = of(rank, &[0]);
        assert_eq!(parts.iter().filter(|(name, ..)| name == "attention").count(), 2 * LAYERS, "forward and backward");
        let (under_way, waited) = (of(rank, &[1, 3]), of(rank, &[2]));
        // two half blocks a layer at most, with embedding and head
        assert!((LAYERS..=2 * LAYERS + 2).contains(&waited.len()) && waited.len() == under_way.len());
        for ((name, start, lasts), (other, wait, _)) in under_way.iter().zip(&waited) {
            assert!(name == other && (start + lasts - wait).abs() < 1.0, "{name}: {start} + {lasts}, {wait}");
        }
        // the first sum starts while backward still runs
        let last_part = parts.iter().filter(|(name, ..)| name == "attention").map(|(_, at, _)| *at).fold(0.0, f64::max);
        assert!(under_way[0].1 < last_part, "{under_way:?} {last_part}");
    }
}
