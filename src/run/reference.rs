//! What the model before training says of the samples, computed once and kept in the run folder.
//!
//! NPO needs one number per scored forget token. A KL term needs distributions: the rows after the final norm are kept and
//! multiplied with a copy of the head, so no second model is ever in memory.

use std::path::Path;

use tch::{Kind, Tensor};

use super::RunError;
use crate::abi::slices::slice;
use crate::abi::upload::upload;
use crate::checkpoint::{Reader, Spec, Writer};
use crate::data::{Dataset, Item, MicroBatch, RowsOf, Stream, pack};
use crate::dist::World;
use crate::eval::{self, ForwardOptions};
use crate::model::{Decoder, Keep, ReferenceHead, Weights};
use crate::telemetry::Console;
use crate::train::Reference;

/// The parts of the reference that a method needs.
#[derive(Default)]
pub struct ReferenceCache {
    /// Log-probabilities of the scored tokens of each forget sample.
    logprobs: Vec<Vec<f32>>,
    divergence: Option<DivergenceCache>,
}

struct DivergenceCache {
    head: ReferenceHead,
    file: Reader,
    /// First row of each retain sample in the file; None where this rank never meets it.
    first_row: Vec<Option<i64>>,
    lengths: Vec<i64>,
}

/// Everything that decides what the numbers are. A cache with another identity is stale.
pub struct Identity<'a> {
    pub model: &'a str,
    pub data: &'a str,
    pub precision: &'a str,
}

impl Identity<'_> {
    fn digest(&self, extra: &str) -> String {
        let text = [env!("CARGO_PKG_VERSION"), self.model, self.data, self.precision, extra].join("\n");
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }
}

/// Where and with what the reference is computed.
pub struct ReferenceOptions<'a> {
    pub folder: &'a Path,
    pub forward: ForwardOptions,
    pub world: &'a World,
    pub console: &'a Console,
}

impl ReferenceCache {
    /// Log-probabilities of all forget samples, from the run folder where they are fresh. All ranks call it.
    pub fn load_logprobs(
        &mut self,
        decoder: &Decoder,
        weights: &Weights,
        forget: &Dataset,
        identity: &Identity,
        options: &ReferenceOptions,
    ) -> Result<(), RunError> {
        let path = options.folder.join("reference_logprobs.safetensors");
        let digest = identity.digest("logprobs");
        let total: usize = forget.samples.iter().map(|sample| sample.scored.len()).sum();
        // one rank looks, all follow: ranks must not disagree on whether to compute
        let fresh = options.world.is_first() && is_fresh(&path, &digest);
        if options.world.world.broadcast_bytes(&[u8::from(fresh)], 0) == [1] {
            let flat = Reader::open(&path)?.tensor("logprobs")?;
            self.logprobs = cut(slice::<f32>(&flat), forget);
            tracing::info!("reference log-probabilities: read from {}", path.display());
            return Ok(());
        }
        let all: Vec<usize> = (0..forget.samples.len()).collect();
        let share = all.len().div_ceil(options.world.mesh.dp) as u64;
        let mut bar = options.console.progress("reference", share, "samples");
        let scores = eval::per_sample(decoder, weights, forget, &all, options.forward, options.world, |n| {
            bar.advance(n as u64, "");
        });
        self.logprobs = scores.into_iter().map(|score| score.logprobs).collect();
        if options.world.is_first() {
            let spec = Spec { name: "logprobs".to_owned(), kind: Kind::Float, shape: vec![total as i64] };
            let mut writer = Writer::create(&path, &[spec], &[("identity", &digest)])?;
            writer.append(&Tensor::from_slice(&self.logprobs.concat()))?;
            writer.finish()?;
        }
        Ok(())
    }

    /// Rows of the retain samples that this rank's data-parallel row will meet, and a copy of the head. All ranks call it.
    ///
    /// `samples`: ascending; the same on all ranks of a tensor-parallel group.
    pub fn load_divergence(
        &mut self,
        decoder: &Decoder,
        weights: &Weights,
        retain: &Dataset,
        samples: &[usize],
        identity: &Identity,
        options: &ReferenceOptions,
    ) -> Result<(), RunError> {
        let world = options.world;
        let path = options.folder.join(format!("reference_rows_{:05}.safetensors", world.mesh.dp_rank()));
        let names: Vec<String> = samples.iter().map(usize::to_string).collect();
        let digest = identity.digest(&format!("rows {}", names.join(" ")));
        let fresh = world.tp.is_first() && is_fresh(&path, &digest);
        if world.tp.broadcast_bytes(&[u8::from(fresh)], 0) != [1] {
            compute_rows(decoder, weights, retain, samples, &path, &digest, options)?;
        }
        // the file was written by another rank of the group: only now is it there for all
        world.world.barrier();
        let mut first_row = vec![None; retain.samples.len()];
        let lengths: Vec<i64> = retain.samples.iter().map(|sample| sample.tokens.len() as i64).collect();
        let mut next = 0;
        for &sample in samples {
            first_row[sample] = Some(next);
            next += lengths[sample];
        }
        let head = ReferenceHead { weight: weights.get(decoder.table.head).copy() };
        self.divergence = Some(DivergenceCache { head, file: Reader::open(&path)?, first_row, lengths });
        Ok(())
    }

    fn divergence(&self) -> &DivergenceCache {
        self.divergence.as_ref().expect("invariant: loaded for methods with a divergence")
    }
}

impl Reference for ReferenceCache {
    fn logprobs(&self, sample: usize) -> &[f32] {
        &self.logprobs[sample]
    }

    fn head(&self) -> &ReferenceHead {
        &self.divergence().head
    }

    fn rows(&self, sample: usize) -> Tensor {
        let cache = self.divergence();
        let first = cache.first_row[sample].expect("invariant: every sample that a step meets was computed");
        let all = cache.file.tensor("rows").expect("invariant: the file was checked when it was opened");
        all.narrow(0, first, cache.lengths[sample]).to_device(cache.head.weight.device())
    }
}

fn compute_rows(
    decoder: &Decoder,
    weights: &Weights,
    retain: &Dataset,
    samples: &[usize],
    path: &Path,
    digest: &str,
    options: &ReferenceOptions,
) -> Result<(), RunError> {
    let item = |&sample: &usize| Item { stream: Stream::Retain, sample, len: retain.samples[sample].tokens.len() };
    let items: Vec<Item> = samples.iter().map(item).collect();
    let total: usize = items.iter().map(|item| item.len).sum();
    let kind = weights.get(decoder.table.head).kind();
    let shape = vec![total as i64, decoder.arch.hidden];
    let spec = Spec { name: "rows".to_owned(), kind, shape };
    let first = options.world.tp.is_first();
    let mut writer = first.then(|| Writer::create(path, &[spec], &[("identity", digest)])).transpose()?;
    let mut bar = options.console.progress("reference rows", items.len() as u64, "samples");
    // written in ascending order of the samples: whole runs of them go through the model together
    for group in in_order(&items, options.forward.budget) {
        let sample = |item: Item| &retain.samples[item.sample];
        let micro_batch = MicroBatch::new(&group, sample, |_| RowsOf::Every);
        let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
        let (hidden, _) = decoder.forward(weights, &batch, Keep::Nothing);
        let positions = upload(&micro_batch.positions, decoder.device);
        let normed = decoder.rows(weights, &hidden, &positions, options.forward.logits_bytes).normed();
        let normed = normed.to_device(tch::Device::Cpu);
        let mut sequences: Vec<_> = micro_batch.sequences.iter().collect();
        sequences.sort_by_key(|sequence| sequence.sample);
        if let Some(writer) = &mut writer {
            for sequence in sequences {
                let rows = normed.narrow(0, sequence.rows.start as i64, sequence.rows.len() as i64);
                writer.append(&rows.contiguous())?;
            }
        }
        bar.advance(group.len() as u64, "");
    }
    writer.map(Writer::finish).transpose()?;
    Ok(())
}

/// Consecutive items in groups of at most `budget` tokens.
fn in_order(items: &[Item], budget: usize) -> Vec<Vec<Item>> {
    let mut groups = Vec::<Vec<Item>>::new();
    let mut tokens = 0;
    for item in items {
        match groups.last_mut() {
            Some(group) if tokens + item.len <= budget => {
                group.push(*item);
                tokens += item.len;
            }
            _ => {
                groups.push(vec![*item]);
                tokens = item.len;
            }
        }
    }
    // `pack` is for balance, this is for order; both keep the budget
    debug_assert!(groups.iter().all(|group| group.len() == 1 || pack(group, budget).len() == 1));
    groups
}

fn is_fresh(path: &Path, digest: &str) -> bool {
    match Reader::open(path) {
        Ok(reader) if reader.metadata("identity") == Some(digest) => true,
        Ok(_) => {
            tracing::info!("{} is of another model, data set or precision; computed again", path.display());
            false
        }
        Err(_) => false,
    }
}

fn cut(flat: &[f32], forget: &Dataset) -> Vec<Vec<f32>> {
    let mut rest = flat;
    forget
        .samples
        .iter()
        .map(|sample| {
            let (head, tail) = rest.split_at(sample.scored.len());
            rest = tail;
            head.to_vec()
        })
        .collect()
}
