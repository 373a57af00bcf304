//! A whole unlearning step, losses and every gradient, against transformers' autograd in f64.

use std::collections::BTreeMap;

use dunlearn::config;
use dunlearn::data::{Item, MicroBatch, RowsOf, Sample, Stream, Text};
use dunlearn::dist::World;
use dunlearn::model::sharding::Class;
use dunlearn::model::{Keep, ReferenceHead};
use dunlearn::train::{
    GradientBuffers, GradientOptions, Losses, Optimizer, Reference, Schedule, StepWork, Totals, Trainer,
    TrainerOptions, Update,
};
use dunlearn::unlearn;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::tiny::{self, Spread};

/// The sequences of one golden step.
pub struct Golden {
    pub tensors: BTreeMap<String, Tensor>,
    pub json: Value,
    pub forget: Vec<Sample>,
    pub retain: Vec<Sample>,
}

impl Golden {
    pub fn read(case: &str) -> Self {
        let folder = tiny::golden(case);
        let tensors = tiny::read(&folder.join("step.safetensors"));
        let json = serde_json::from_str(&std::fs::read_to_string(folder.join("step.json")).unwrap()).unwrap();
        let samples = |stream: &str, count: usize| -> Vec<Sample> {
            let prompts = Vec::<i64>::try_from(&tensors[&format!("{stream}.prompt_len")]).unwrap();
            (0..count)
                .map(|i| {
                    let ids = Vec::<i64>::try_from(&tensors[&format!("{stream}.{i}.input_ids")]).unwrap();
                    let scored = (prompts[i] as u32..ids.len() as u32).collect();
                    Sample { tokens: ids.iter().map(|&id| id as i32).collect(), scored }
                })
                .collect()
        };
        let (forget, retain) = (samples("forget", 2), samples("retain", 3));
        Self { tensors, json, forget, retain }
    }

    fn sample(&self, item: Item) -> &Sample {
        match item.stream {
            Stream::Forget => &self.forget[item.sample],
            Stream::Retain => &self.retain[item.sample],
        }
    }

    /// The step as one rank's work, its items cut into micro-batches as `cuts` says (index of the item to its micro-batch).
    fn work(&self, cuts: impl Fn(usize) -> usize, divergence: bool) -> StepWork {
        let each = |stream, samples: &[Sample]| -> Vec<Item> {
            samples.iter().enumerate().map(|(sample, s)| Item { stream, sample, len: s.tokens.len() }).collect()
        };
        let items = [each(Stream::Forget, &self.forget), each(Stream::Retain, &self.retain)].concat();
        let mut groups = BTreeMap::<usize, Vec<Item>>::new();
        for (index, item) in items.iter().enumerate() {
            groups.entry(cuts(index)).or_default().push(*item);
        }
        let rows = |stream| if divergence && stream == Stream::Retain { RowsOf::Every } else { RowsOf::Scored };
        let micro_batches =
            groups.values().map(|items| MicroBatch::new(items, |item| self.sample(item), rows)).collect();
        let scored = |samples: &[Sample]| samples.iter().map(|s| s.scored.len()).sum::<usize>();
        let tokens = |samples: &[Sample]| samples.iter().map(|s| s.tokens.len()).sum::<usize>();
        let retain_tokens = if divergence { tokens(&self.retain) } else { scored(&self.retain) };
        StepWork {
            epoch: 0,
            micro_batches,
            looks: Vec::new(),
            forget: Totals { sequences: 2.0, tokens: scored(&self.forget) as f64 },
            retain: Totals { sequences: 3.0, tokens: retain_tokens as f64 },
            tokens: tokens(&self.forget) + tokens(&self.retain),
            scored: (scored(&self.forget), scored(&self.retain)),
        }
    }
}

/// The reference model's numbers, computed by the engine itself from the seed-1 weights.
struct SeedOne {
    logprobs: Vec<Vec<f32>>,
    head: ReferenceHead,
    rows: Vec<Tensor>,
}

impl SeedOne {
    fn new(golden: &Golden, arch: &dunlearn::model::Architecture) -> Self {
        let (decoder, parameters) = tiny::model(arch, &World::solo(), Spread::default(), Kind::Float, 1);
        let weights = &parameters.weights;
        let rows = golden.retain.iter().map(|sample| {
            let ids: Vec<i64> = sample.tokens.iter().map(|&id| i64::from(id)).collect();
            let batch = decoder.batch(&ids, &[ids.len()]);
            let (hidden, _) = decoder.forward(weights, &batch, Keep::Nothing);
            let all = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
            decoder.rows(weights, &hidden, &all, 1e9).normed()
        });
        let rows = rows.collect();
        let logprobs = (0..golden.forget.len())
            .map(|i| {
                Vec::<f32>::try_from(golden.tensors[&format!("forget.{i}.ref_logp")].to_kind(Kind::Float)).unwrap()
            })
            .collect();
        Self { logprobs, head: ReferenceHead { weight: weights.get(decoder.table.head).copy() }, rows }
    }
}

impl Reference for SeedOne {
    fn logprobs(&self, sample: usize, _: Text) -> &[f32] {
        &self.logprobs[sample]
    }

    fn head(&self) -> &ReferenceHead {
        &self.head
    }

    fn rows(&self, _: Stream, sample: usize) -> Tensor {
        self.rows[sample].shallow_clone()
    }

    fn hidden(&self, _: Stream, _: usize) -> Tensor {
        unreachable!("no hidden rows in these tests")
    }
}

fn method(name: &str, json: &Value) -> config::Method {
    let (objective, retain) = match name {
        "npo_nll" => (config::Objective::Npo, config::Retain::Nll),
        "ga_nll" => (config::Objective::Ga, config::Retain::Nll),
        "npo_kl" => (config::Objective::Npo, config::Retain::Kl),
        other => panic!("no method {other}"),
    };
    let mut method = config::Method::new(objective, retain);
    method.retain_weight = json["retain_weight"].as_f64();
    method
}

/// One step's losses, norm and gradients by Hugging Face name.
fn run(
    case: &str,
    total: &str,
    keep: Keep,
    logits_bytes: f64,
    cuts: impl Fn(usize) -> usize,
) -> (Losses, f64, BTreeMap<String, Tensor>) {
    let golden = Golden::read(case);
    let arch = tiny::architecture(case);
    let world = World::solo();
    let (decoder, parameters) = tiny::model(&arch, &world, Spread::default(), Kind::Float, 0);
    let optimizer: config::Optimizer = serde_json::from_str(r#"{"name": "sgd", "lr": 0.1}"#).unwrap();
    let reference = SeedOne::new(&golden, &arch);
    let mut trainer = Trainer {
        gradients: GradientBuffers::new(
            &decoder.table,
            &parameters.layout,
            &world.tp,
            &world.dp,
            GradientOptions::f32(Device::Cpu),
        ),
        optimizer: Optimizer::new(&optimizer, &decoder.table, &parameters),
        schedule: Schedule::new(&config::Schedule::default(), 0.1, 1, 1),
        method: unlearn::method(&method(total, &golden.json["totals"][total]), 0, 1),
        options: TrainerOptions { keep, logits_bytes, max_grad_norm: 0.0, in_backward: false },
        broken: Trainer::whole(decoder.device),
        decoder,
        parameters,
    };
    let work = golden.work(cuts, total == "npo_kl");
    let (losses, _) = trainer.accumulate(&work, Some(&reference), &world);
    let norm = f64::try_from(trainer.gradients.finish().norm).unwrap();
    let table = &trainer.decoder.table;
    let mut grads = BTreeMap::new();
    for (id, param) in table.params.iter().enumerate() {
        for piece in &param.pieces {
            let part = trainer.gradients.view(id).narrow(0, piece.row, piece.size[0]).copy();
            grads.insert(piece.name.clone(), part);
        }
    }
    (losses, norm, grads)
}

#[test]
fn losses_and_every_gradient_match_autograd() {
    for case in ["llama_gqa", "llama_tied", "qwen3"] {
        let golden = Golden::read(case);
        for total in ["npo_nll", "ga_nll", "npo_kl"] {
            let (losses, norm, grads) = run(case, total, Keep::Everything, 1e9, |_| 0);
            let want = &golden.json["totals"][total];
            for (got, key) in [
                (losses.total, "loss"),
                (losses.forget, "forget_loss"),
                (losses.retain, "retain_loss"),
                (norm, "grad_norm"),
            ] {
                let want = want[key].as_f64().unwrap();
                assert!((got / want - 1.0).abs() < 1e-5, "{case} {total} {key}: {got} instead of {want}");
            }
            let mut worst = 0.0f64;
            for (name, got) in &grads {
                let error = tiny::relative(got, &golden.tensors[&format!("{total}.{name}")]);
                worst = worst.max(error);
                assert!(error < 1e-5, "{case} {total} {name}: {error:e}");
            }
            let prefix = format!("{total}.");
            assert_eq!(grads.len(), golden.tensors.keys().filter(|key| key.starts_with(&prefix)).count());
            println!("{case:12} {total:8} worst relative gradient error {worst:.1e}");
        }
    }
}

/// Recomputing, chunking the head and accumulating micro-batches change nothing but rounding.
#[test]
fn recompute_chunks_and_accumulation_change_nothing() {
    for total in ["npo_nll", "npo_kl"] {
        let (losses, norm, grads) = run("qwen3", total, Keep::Everything, 1e9, |_| 0);
        let variants: [(&str, Keep, f64, fn(usize) -> usize); 4] = [
            ("recompute", Keep::Inputs, 1e9, |_| 0),
            ("chunks", Keep::Everything, 2000.0, |_| 0),
            ("accumulation", Keep::Everything, 1e9, |index| index % 3),
            ("all", Keep::Inputs, 1.0, |index| index),
        ];
        for (what, keep, logits_bytes, cuts) in variants {
            let (other, other_norm, others) = run("qwen3", total, keep, logits_bytes, cuts);
            assert!((other.total / losses.total - 1.0).abs() < 1e-6, "{total} {what}");
            assert!((other_norm / norm - 1.0).abs() < 1e-6, "{total} {what}");
            for (name, got) in &others {
                let error = tiny::relative(got, &grads[name]);
                assert!(error < 2e-6, "{total} {what} {name}: {error:e}");
                assert!(what != "recompute" || error == 0.0, "{name}: recompute is not bit-equal");
            }
        }
    }
}

/// Both optimizers against torch.optim in f64, with clipping: the gradients come four times too large and are scaled back.
/// What stands in a norm's place has no weight decay.
#[test]
fn optimizers_follow_torch() {
    let text = std::fs::read_to_string(tiny::golden("adamw.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let numbers = |json: &Value| Tensor::from_slice(&serde_json::from_value::<Vec<f64>>(json.clone()).unwrap());
    for name in ["adamw", "sgd"] {
        let want = &golden[name];
        let get = |key: &str| want[key].as_f64();
        let betas = || serde_json::from_value(want["betas"].clone()).unwrap();
        let config = config::Optimizer {
            name: if name == "sgd" { config::OptimizerName::Sgd } else { config::OptimizerName::Adamw },
            lr: get("lr").unwrap(),
            betas: (name == "adamw").then(betas),
            eps: get("eps"),
            momentum: get("momentum"),
            weight_decay: get("weight_decay").unwrap(),
            max_grad_norm: 1.0,
            state_dtype: None,
            in_backward: false,
        };
        let arch = tiny::architecture("llama_gqa");
        let (decoder, parameters) = tiny::model(&arch, &World::solo(), Spread::default(), Kind::Float, 0);
        let table = &decoder.table;
        let matrix = parameters.layout.buckets[0].class(table, Class::Matrix).start as i64;
        let vector = parameters.layout.buckets[0].class(table, Class::Vector).start as i64;
        let start = numbers(&golden["start"]);
        for at in [matrix, vector] {
            parameters.masters[0].narrow(0, at, 7).copy_(&start);
        }
        let mut optimizer = Optimizer::new(&config, &decoder.table, &parameters);
        for (step, gradients) in golden["gradients"].as_array().unwrap().iter().enumerate() {
            let all: Vec<Tensor> = parameters.masters.iter().map(Tensor::zeros_like).collect();
            for at in [matrix, vector] {
                all[0].narrow(0, at, 7).copy_(&(numbers(gradients) * 4.0));
            }
            let quarter = Tensor::from_slice(&[0.25f32]);
            let update =
                Update { lr: config.lr, scale: &|_| quarter.shallow_clone(), skip: &Tensor::from_slice(&[0.0f32]) };
            optimizer.begin();
            for (bucket, grad) in all.iter().enumerate() {
                optimizer.update(&parameters, bucket, grad, &update);
            }
            let got = parameters.masters[0].narrow(0, matrix, 7);
            let error = tiny::difference(&got, &numbers(&want["after"][step]));
            assert!(error < 1e-6, "{name} step {}: {error:e}", step + 1);
        }
        let undecayed = parameters.masters[0].narrow(0, vector, 7);
        // the last element never had a gradient
        assert_eq!(undecayed.double_value(&[6]) as f32, start.double_value(&[6]) as f32);
        assert!(tiny::difference(&undecayed, &parameters.masters[0].narrow(0, matrix, 7)) > 1e-5);
    }
}
