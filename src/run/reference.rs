//! What the model before training says of the samples, computed once and kept in the run folder.
//!
//! NPO and its like need one number per scored token. A KL term or UNDIAL needs distributions: the rows after the final norm are
//! kept and multiplied with a copy of the head. An embedding difference needs the rows of one layer. So no second model is ever in
//! memory.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::RunError;
use crate::abi::slices::slice;
use crate::abi::upload::{upload, upload_tensor};
use crate::checkpoint::{Reader, Spec, Writer};
use crate::data::{Dataset, Item, MicroBatch, RowsOf, Sample, Stream, Text, pack};
use crate::dist::World;
use crate::eval::{self, Asked, ForwardOptions};
use crate::model::{Decoder, Keep, ReferenceHead, Weights};
use crate::telemetry::Console;
use crate::train::Reference;

/// The parts of the reference that a method needs.
#[derive(Default)]
pub struct ReferenceCache {
    /// Log-probabilities of the scored tokens of each forget sample's answer, and of its preferred answer.
    answers: Vec<Vec<f32>>,
    preferred: Vec<Vec<f32>>,
    head: Option<ReferenceHead>,
    rows: Vec<(Kept, RowsCache)>,
}

/// Which rows of a stream's samples are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    pub stream: Stream,
    /// Rows that enter this layer; None: rows after the final norm.
    pub edge: Option<usize>,
    pub rows: RowsOf,
}

impl Kept {
    fn file(self, dp_rank: usize) -> String {
        match (self.stream, self.edge) {
            (Stream::Retain, None) => format!("reference_rows_{dp_rank:05}.safetensors"),
            (Stream::Forget, None) => format!("reference_forget_rows_{dp_rank:05}.safetensors"),
            (Stream::Retain, Some(_)) => format!("reference_hidden_{dp_rank:05}.safetensors"),
            (Stream::Forget, Some(_)) => format!("reference_forget_hidden_{dp_rank:05}.safetensors"),
        }
    }

    fn len(self, sample: &Sample) -> usize {
        if self.rows == RowsOf::Every { sample.tokens.len() } else { sample.scored.len() }
    }
}

struct RowsCache {
    file: Reader,
    device: Device,
    /// First row of each sample in the file; None where this rank never meets it.
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
    /// Log-probabilities of one text of all forget samples, from the run folder where they are fresh. All ranks call it.
    pub fn load_logprobs(
        &mut self,
        decoder: &Decoder,
        weights: &Weights,
        forget: &Dataset,
        text: Text,
        identity: &Identity,
        options: &ReferenceOptions,
    ) -> Result<(), RunError> {
        let companions = (text == Text::Preferred).then(|| forget.companions());
        let forget = companions.as_ref().unwrap_or(forget);
        let (file, word) = match text {
            Text::Answer => ("reference_logprobs.safetensors", "logprobs"),
            Text::Preferred => ("reference_preferred.safetensors", "preferred logprobs"),
        };
        let (path, digest) = (options.folder.join(file), identity.digest(word));
        let total: usize = forget.samples.iter().map(|sample| sample.scored.len()).sum();
        // one rank looks, all follow: ranks must not disagree on whether to compute
        let fresh = options.world.is_first() && is_fresh(&path, &digest);
        if options.world.world.broadcast_bytes(&[u8::from(fresh)], 0) == [1] {
            let flat = Reader::open(&path)?.tensor("logprobs")?;
            *self.logprobs_of(text) = cut(slice::<f32>(&flat), forget);
            tracing::info!("reference log-probabilities: read from {}", path.display());
            return Ok(());
        }
        let share = forget.samples.len().div_ceil(options.world.mesh.dp) as u64;
        let mut bar = options.console.progress("reference", share, "samples");
        let model = Asked { decoder, weights, world: options.world, forward: options.forward };
        let scores = eval::per_sample(model, forget, |n| bar.advance(n as u64, ""));
        let logprobs: Vec<Vec<f32>> = scores.into_iter().map(|score| score.logprobs).collect();
        if options.world.is_first() {
            let spec = Spec { name: "logprobs".to_owned(), kind: Kind::Float, shape: vec![total as i64] };
            let mut writer = Writer::create(&path, &[spec], &[("identity", &digest)])?;
            writer.append(&Tensor::from_slice(&logprobs.concat()))?;
            writer.finish()?;
        }
        *self.logprobs_of(text) = logprobs;
        Ok(())
    }

    /// Rows of the samples that this rank's data-parallel row will meet, and a copy of the head where they are the last ones. All
    /// ranks call it.
    ///
    /// `samples`: ascending; the same on all ranks of a tensor-parallel group.
    #[expect(clippy::too_many_arguments, reason = "what, of what, and with what")]
    pub fn load_rows(
        &mut self,
        decoder: &Decoder,
        weights: &Weights,
        dataset: &Dataset,
        samples: &[usize],
        what: Kept,
        identity: &Identity,
        options: &ReferenceOptions,
    ) -> Result<(), RunError> {
        let world = options.world;
        let path = options.folder.join(what.file(world.mesh.dp_rank()));
        let names: Vec<String> = samples.iter().map(usize::to_string).collect();
        let digest = identity.digest(&format!("{what:?} {}", names.join(" ")));
        let fresh = world.tp.is_first() && is_fresh(&path, &digest);
        if world.tp.broadcast_bytes(&[u8::from(fresh)], 0) != [1] {
            compute_rows(decoder, weights, dataset, samples, what, &path, &digest, options)?;
        }
        // the file was written by another rank of the group: only now is it there for all
        world.world.barrier();
        let mut first_row = vec![None; dataset.samples.len()];
        let lengths: Vec<i64> = dataset.samples.iter().map(|sample| what.len(sample) as i64).collect();
        let mut next = 0;
        for &sample in samples {
            first_row[sample] = Some(next);
            next += lengths[sample];
        }
        if what.edge.is_none() && self.head.is_none() {
            self.head = Some(ReferenceHead { weight: weights.get(decoder.table.head).copy() });
        }
        let cache = RowsCache { file: Reader::open(&path)?, device: decoder.device, first_row, lengths };
        self.rows.push((what, cache));
        Ok(())
    }

    fn logprobs_of(&mut self, text: Text) -> &mut Vec<Vec<f32>> {
        match text {
            Text::Answer => &mut self.answers,
            Text::Preferred => &mut self.preferred,
        }
    }

    fn kept(&self, stream: Stream, at_edge: bool, sample: usize) -> Tensor {
        let found = self.rows.iter().find(|(what, _)| what.stream == stream && what.edge.is_some() == at_edge);
        let (_, cache) = found.expect("invariant: loaded for methods that need it");
        let first = cache.first_row[sample].expect("invariant: every sample that a step meets was computed");
        let all = cache.file.tensor("rows").expect("invariant: the file was checked when it was opened");
        upload_tensor(&all.narrow(0, first, cache.lengths[sample]), cache.device)
    }
}

impl Reference for ReferenceCache {
    fn logprobs(&self, sample: usize, text: Text) -> &[f32] {
        match text {
            Text::Answer => &self.answers[sample],
            Text::Preferred => &self.preferred[sample],
        }
    }

    fn head(&self) -> &ReferenceHead {
        self.head.as_ref().expect("invariant: loaded for methods with rows of the reference")
    }

    fn rows(&self, stream: Stream, sample: usize) -> Tensor {
        self.kept(stream, false, sample)
    }

    fn hidden(&self, stream: Stream, sample: usize) -> Tensor {
        self.kept(stream, true, sample)
    }
}

#[expect(clippy::too_many_arguments, reason = "what, of what, with what, and where to")]
fn compute_rows(
    decoder: &Decoder,
    weights: &Weights,
    dataset: &Dataset,
    samples: &[usize],
    what: Kept,
    path: &Path,
    digest: &str,
    options: &ReferenceOptions,
) -> Result<(), RunError> {
    let item = |&sample: &usize| Item { stream: what.stream, sample, len: dataset.samples[sample].tokens.len() };
    let items: Vec<Item> = samples.iter().map(item).collect();
    let total: usize = samples.iter().map(|&sample| what.len(&dataset.samples[sample])).sum();
    let kind = weights.get(decoder.table.head).kind();
    let shape = vec![total as i64, decoder.arch.hidden];
    let spec = Spec { name: "rows".to_owned(), kind, shape };
    let first = options.world.tp.is_first();
    let mut writer = first.then(|| Writer::create(path, &[spec], &[("identity", digest)])).transpose()?;
    let mut bar = options.console.progress("reference rows", items.len() as u64, "samples");
    // written in ascending order of the samples: whole runs of them go through the model together
    for group in in_order(&items, options.forward.budget) {
        let sample = |item: Item| &dataset.samples[item.sample];
        let micro_batch = MicroBatch::new(&group, sample, |_| what.rows);
        let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
        let positions = upload(&micro_batch.positions, decoder.device);
        let x = decoder.enter(weights, &batch);
        let layers = 0..what.edge.unwrap_or(decoder.arch.num_layers);
        let (x, _) = decoder.through(weights, &batch, x, layers, Keep::Nothing);
        let hidden = decoder.all_tokens(&x);
        let rows = match what.edge {
            None => decoder.rows(weights, &hidden, &positions, options.forward.logits_bytes).normed(),
            Some(_) => hidden.index_select(0, &positions),
        };
        let rows = rows.to_device(Device::Cpu);
        let mut sequences: Vec<_> = micro_batch.sequences.iter().collect();
        sequences.sort_by_key(|sequence| sequence.sample);
        if let Some(writer) = &mut writer {
            for sequence in sequences {
                let rows = rows.narrow(0, sequence.rows.start as i64, sequence.rows.len() as i64);
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
