//! The work of each step: what this rank runs through the model, and the denominators of the whole step.

use crate::config::{self, Config};
use crate::data::{Dataset, Item, MicroBatch, Order, RowsOf, Sample, Stream, Text, Texts, pack, share};
use crate::dist::Mesh;

use super::method::{Cut, Forget, Method, Retain};
use super::objective::Totals;

/// The samples of a run and how they are cut.
pub struct Batches<'a> {
    pub order: Order,
    /// Samples to forget, or to train on.
    pub anchors: &'a Dataset,
    pub retain: Option<&'a Dataset>,
    pub cuts: Cuts,
    /// Unit: tokens.
    pub budget: usize,
}

/// What a method makes of the samples.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cuts {
    pub forget: Cut,
    pub retain: Cut,
    /// Texts of forget samples that go through the model once more at the start of a step.
    pub look: Option<Texts>,
    /// Count padding into the tokens, as programs that pad do: forget samples x (longest - 1), retain samples x longest.
    pub pad_forget: bool,
    pub pad_retain: bool,
}

impl Cuts {
    /// What `method` needs; `pad_retain` for a divergence over padded batches.
    pub fn of(method: &Method, pad_retain: bool) -> Self {
        Self {
            forget: method.cut(Stream::Forget),
            retain: method.cut(Stream::Retain),
            look: method.looks_at(),
            pad_forget: matches!(method.forget, Forget::Distribution(on) if on.over_padding),
            pad_retain,
        }
    }

    fn stream(&self, stream: Stream) -> Cut {
        if stream == Stream::Retain { self.retain } else { self.forget }
    }
}

/// One step as one rank sees it.
#[derive(Clone, Debug)]
pub struct StepWork {
    pub epoch: usize,
    /// The same on all ranks of a tensor-parallel group.
    pub micro_batches: Vec<MicroBatch>,
    /// What [`super::Objective::look`] is given, in the same way.
    pub looks: Vec<MicroBatch>,
    /// Of the whole step, over all ranks.
    pub forget: Totals,
    pub retain: Totals,
    /// Tokens of the whole step that go through the model, padding of sequence parallelism not counted.
    pub tokens: usize,
    /// Scored tokens of the whole step: forget and retain.
    pub scored: (usize, usize),
}

impl<'a> Batches<'a> {
    /// As a configuration says.
    pub fn of(config: &Config, method: &Method, anchors: &'a Dataset, retain: Option<&'a Dataset>) -> Self {
        let retain = retain.filter(|_| config.method.retain != config::Retain::None);
        let partners = retain.map_or(0, |set| set.samples.len());
        let (seed, shuffle) = (config.run.seed, config.data.shuffle);
        let openunlearning = config.method.compat == Some(config::Compat::OpenUnlearning);
        Self {
            order: Order::new(seed, shuffle, anchors.samples.len(), partners, config.train.global_batch),
            anchors,
            retain,
            cuts: Cuts::of(method, matches!(method.retain, Retain::Divergence) && openunlearning),
            budget: config.train.micro_batch_tokens,
        }
    }
}

impl Batches<'_> {
    /// The work of step `step` (from 0) for the rank at `mesh`. A pure function.
    pub fn step(&self, step: usize, mesh: Mesh) -> StepWork {
        let (epoch, items) = self.items(step);
        let micro_batches = pack(&own_share(&items, mesh), self.budget)
            .iter()
            .map(|items| self.micro_batch(items, |stream| self.cuts.stream(stream).texts))
            .collect();
        let of = |stream| items.iter().copied().filter(move |item| item.stream == stream);
        let (forget, retain): (Vec<Item>, Vec<Item>) = (of(Stream::Forget).collect(), of(Stream::Retain).collect());
        let scored = |items: &[Item]| items.iter().flat_map(|&item| self.texts(item)).map(|t| t.scored.len()).sum();
        StepWork {
            epoch,
            micro_batches,
            looks: self.looks(&forget, mesh),
            forget: self.totals(&forget, self.cuts.forget, self.cuts.pad_forget.then_some(1)),
            retain: self.totals(&retain, self.cuts.retain, self.cuts.pad_retain.then_some(0)),
            tokens: items.iter().map(|item| item.len).sum(),
            scored: (scored(&forget), scored(&retain)),
        }
    }

    /// Samples of a stream that steps `0..steps` bring to the data-parallel row of `mesh`, each once, ascending.
    pub fn visited(&self, stream: Stream, steps: usize, mesh: Mesh) -> Vec<usize> {
        let mut seen = std::collections::BTreeSet::new();
        for step in 0..steps {
            let share = own_share(&self.items(step).1, mesh);
            seen.extend(share.iter().filter(|item| item.stream == stream).map(|item| item.sample));
        }
        seen.into_iter().collect()
    }

    /// Epoch and samples of a step, over all ranks.
    fn items(&self, step: usize) -> (usize, Vec<Item>) {
        let batch = self.order.batch(step);
        let forget = batch.anchors.iter().map(|&sample| self.item(Stream::Forget, sample, self.cuts.forget.texts));
        let retain = batch.partners.iter().map(|&sample| self.item(Stream::Retain, sample, self.cuts.retain.texts));
        (batch.epoch, forget.chain(retain).collect())
    }

    /// This rank's share of the look at the forget samples.
    fn looks(&self, forget: &[Item], mesh: Mesh) -> Vec<MicroBatch> {
        let Some(texts) = self.cuts.look else { return Vec::new() };
        let items: Vec<Item> = forget.iter().map(|item| self.item(Stream::Forget, item.sample, texts)).collect();
        pack(&own_share(&items, mesh), self.budget).iter().map(|items| self.micro_batch(items, |_| texts)).collect()
    }

    fn micro_batch(&self, items: &[Item], texts: impl Fn(Stream) -> Texts) -> MicroBatch {
        let sample = |item: Item, text| self.dataset(item.stream).text(item.sample, text);
        MicroBatch::with_texts(items, texts, sample, |stream| self.cuts.stream(stream).rows)
    }

    /// Denominators of one stream. `padding`: count padded positions, so many fewer than the longest sample has tokens.
    fn totals(&self, items: &[Item], cut: Cut, padding: Option<usize>) -> Totals {
        let lengths = || items.iter().map(|item| item.len);
        let counted = |&item: &Item| {
            let text = self.texts(item).next().expect("invariant: a sample has a text");
            let rows = if cut.counted == RowsOf::Scored { text.scored.len() } else { text.tokens.len() };
            rows.saturating_sub(cut.skip + cut.tail)
        };
        let tokens = match padding {
            Some(fewer) => items.len() * lengths().max().unwrap_or(0).saturating_sub(fewer),
            None => items.iter().map(counted).sum(),
        };
        Totals { sequences: items.len() as f64, tokens: tokens as f64 }
    }

    fn item(&self, stream: Stream, sample: usize, texts: Texts) -> Item {
        let dataset = self.dataset(stream);
        let len = texts.each().iter().map(|&text| dataset.text(sample, text).tokens.len()).sum();
        Item { stream, sample, len }
    }

    /// The texts of a sample that take part in the step.
    fn texts(&self, item: Item) -> impl Iterator<Item = &Sample> {
        let texts: &[Text] = self.cuts.stream(item.stream).texts.each();
        texts.iter().map(move |&text| self.dataset(item.stream).text(item.sample, text))
    }

    fn dataset(&self, stream: Stream) -> &Dataset {
        match stream {
            Stream::Forget => self.anchors,
            Stream::Retain => self.retain.expect("invariant: retain items come from a retain data set"),
        }
    }
}

fn own_share(items: &[Item], mesh: Mesh) -> Vec<Item> {
    share(items, mesh.dp).swap_remove(mesh.dp_rank())
}
