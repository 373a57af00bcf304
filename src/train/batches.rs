//! The work of each step: what this rank runs through the model, and the denominators of the whole step.

use crate::data::{Dataset, Item, MicroBatch, Order, RowsOf, Sample, Stream, pack, share};
use crate::dist::Mesh;

use super::objective::Totals;

/// The samples of a run and how they are cut.
pub struct Batches<'a> {
    pub order: Order,
    /// Samples to forget, or to train on.
    pub anchors: &'a Dataset,
    pub retain: Option<&'a Dataset>,
    /// Rows of retain samples in the head: every position for a divergence.
    pub retain_rows: RowsOf,
    /// Count padding into the retain tokens, as programs that pad do: samples x longest sample.
    pub count_padding: bool,
    /// Unit: tokens.
    pub budget: usize,
}

/// One step as one rank sees it.
#[derive(Clone, Debug)]
pub struct StepWork {
    pub epoch: usize,
    /// The same on all ranks of a tensor-parallel group.
    pub micro_batches: Vec<MicroBatch>,
    /// Of the whole step, over all ranks.
    pub forget: Totals,
    pub retain: Totals,
    /// Tokens of the whole step that go through the model, padding of sequence parallelism not counted.
    pub tokens: usize,
    /// Scored tokens of the whole step: forget and retain.
    pub scored: (usize, usize),
}

impl Batches<'_> {
    /// The work of step `step` (from 0) for the rank at `mesh`. A pure function.
    pub fn step(&self, step: usize, mesh: Mesh) -> StepWork {
        let (epoch, items) = self.items(step);
        let micro_batches = pack(&own_share(&items, mesh), self.budget)
            .iter()
            .map(|items| MicroBatch::new(items, |item| self.sample(item), |stream| self.rows(stream)))
            .collect();
        let of = |stream| items.iter().filter(move |item| item.stream == stream);
        let scored = |stream| of(stream).map(|&item| self.sample(item).scored.len()).sum();
        let scored: (usize, usize) = (scored(Stream::Forget), scored(Stream::Retain));
        StepWork {
            epoch,
            micro_batches,
            forget: Totals { sequences: of(Stream::Forget).count() as f64, tokens: scored.0 as f64 },
            retain: Totals {
                sequences: of(Stream::Retain).count() as f64,
                tokens: self.retain_tokens(&items, scored.1),
            },
            tokens: items.iter().map(|item| item.len).sum(),
            scored,
        }
    }

    /// Retain samples that steps `0..steps` bring to the data-parallel row of `mesh`, each once, ascending.
    pub fn visited_retain(&self, steps: usize, mesh: Mesh) -> Vec<usize> {
        let mut seen = std::collections::BTreeSet::new();
        for step in 0..steps {
            let share = own_share(&self.items(step).1, mesh);
            seen.extend(share.iter().filter(|item| item.stream == Stream::Retain).map(|item| item.sample));
        }
        seen.into_iter().collect()
    }

    /// Epoch and samples of a step, over all ranks.
    fn items(&self, step: usize) -> (usize, Vec<Item>) {
        let batch = self.order.batch(step);
        let forget = batch.anchors.iter().map(|&sample| self.item(Stream::Forget, sample));
        let retain = batch.partners.iter().map(|&sample| self.item(Stream::Retain, sample));
        (batch.epoch, forget.chain(retain).collect())
    }

    fn retain_tokens(&self, items: &[Item], scored: usize) -> f64 {
        let lengths = || items.iter().filter(|item| item.stream == Stream::Retain).map(|item| item.len);
        match self.retain_rows {
            RowsOf::Scored => scored as f64,
            RowsOf::Every if self.count_padding => (lengths().count() * lengths().max().unwrap_or(0)) as f64,
            RowsOf::Every => lengths().sum::<usize>() as f64,
        }
    }

    fn rows(&self, stream: Stream) -> RowsOf {
        if stream == Stream::Retain { self.retain_rows } else { RowsOf::Scored }
    }

    fn item(&self, stream: Stream, sample: usize) -> Item {
        let item = Item { stream, sample, len: 0 };
        Item { len: self.sample(item).tokens.len(), ..item }
    }

    fn sample(&self, item: Item) -> &Sample {
        match item.stream {
            Stream::Forget => &self.anchors.samples[item.sample],
            Stream::Retain => {
                let retain = self.retain.expect("invariant: retain items come from a retain data set");
                &retain.samples[item.sample]
            }
        }
    }
}

fn own_share(items: &[Item], mesh: Mesh) -> Vec<Item> {
    share(items, mesh.dp).swap_remove(mesh.dp_rank())
}
