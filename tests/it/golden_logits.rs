//! Logits of every family against transformers in f64 (`tests/golden/generate.py`).

use dunlearn::dist::World;
use dunlearn::model::Keep;
use tch::{Device, Kind, Tensor};

use crate::tiny::{self, Spread};

const CASES: &[&str] = &[
    "llama_2023",
    "llama_gqa",
    "llama_head_dim",
    "llama_linear_rope",
    "llama_linear_rope_2023",
    "llama_llama3_rope",
    "llama_llama3_rope_2024",
    "llama_tied",
    "mistral_full",
    "mistral_window",
    "phi3",
    "phi3_longrope",
    "phi3_longrope_2024",
    "phi3_partial_rotary",
    "phi3_window",
    "qwen2_2024",
    "qwen2_tied",
    "qwen2_window",
    "qwen2_window_2024",
    "qwen3",
];

/// Logits of the sequences in one packed batch: `[tokens, vocab]`.
fn logits(case: &str, ids: &[i64], lengths: &[usize], kind: Kind) -> Tensor {
    let arch = tiny::architecture(case);
    let (decoder, parameters) = tiny::model(&arch, &World::solo(), Spread::default(), kind, 0);
    let batch = decoder.batch(ids, lengths);
    let (hidden, _) = decoder.forward(&parameters.weights, &batch, Keep::Nothing);
    let all = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
    let rows = decoder.rows(&parameters.weights, &hidden, &all, 1e9);
    rows.normed().matmul(&parameters.weights.get(decoder.table.head).tr()).to_kind(Kind::Float)
}

fn golden(case: &str) -> (Vec<i64>, Tensor) {
    let mut tensors = tiny::read(&tiny::golden(case).join("golden.safetensors"));
    let ids = Vec::<i64>::try_from(tensors.remove("input_ids").unwrap()).unwrap();
    (ids, tensors.remove("logits").unwrap())
}

fn divergence(reference: &Tensor, logits: &Tensor) -> f64 {
    let log = |t: &Tensor| t.to_kind(Kind::Double).log_softmax(1, Kind::Double);
    let (p, q) = (log(reference), log(logits));
    let rows = (p.exp() * (&p - q)).sum_dim_intlist(1i64, false, Kind::Double);
    f64::try_from(rows.max()).unwrap()
}

#[test]
fn every_family_gives_the_logits_of_transformers() {
    for case in CASES {
        let (ids, want) = golden(case);
        let got = logits(case, &ids, &[ids.len()], Kind::Float);
        let (distance, kl) = (tiny::difference(&got, &want), divergence(&want, &got));
        println!("{case:24} max difference {distance:.1e}  KL {kl:.1e}");
        assert!(distance < 1e-4 && kl < 1e-9, "{case}: max difference {distance:e}, KL {kl:e}");
    }
}

/// Nothing is left out: every folder of golden logits is in the list.
#[test]
fn every_golden_case_is_tested() {
    let mut folders: Vec<String> = std::fs::read_dir(tiny::golden("."))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("golden.safetensors").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    folders.sort();
    assert_eq!(folders, CASES);
}

/// Sequences packed together see neither each other nor each other's positions.
#[test]
fn packed_sequences_give_what_each_gives_alone() {
    for case in ["llama_gqa", "mistral_window", "qwen3", "phi3_partial_rotary"] {
        let (ids, _) = golden(case);
        let lengths = [5, 1, 11, 7];
        let packed = logits(case, &ids, &lengths, Kind::Float);
        let mut start = 0;
        for len in lengths {
            let alone = logits(case, &ids[start..start + len], &[len], Kind::Float);
            let error = tiny::relative(&packed.narrow(0, start as i64, len as i64), &alone);
            assert!(error < 2e-6, "{case}: {error:e}");
            start += len;
        }
    }
}

/// bf16 stays within what 8 bits of mantissa over three layers explain.
#[test]
fn bf16_is_close() {
    for case in ["llama_gqa", "qwen3", "phi3"] {
        let (ids, want) = golden(case);
        let got = logits(case, &ids, &[ids.len()], Kind::BFloat16);
        let error = tiny::relative(&got, &want);
        assert!((1e-4..3e-2).contains(&error), "{case}: {error:e}");
    }
}
