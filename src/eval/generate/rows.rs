//! The sequences that one rank writes at a time.

use std::collections::VecDeque;

use tch::{Device, Kind, Tensor};

use super::stop::Stops;
use super::{Ended, GenerateOptions};
use crate::abi::slices::slice;
use crate::abi::upload::upload;
use crate::model::{Decoder, Keep, KvCache, Weights};

/// A prompt and its place among all of them.
pub(super) struct Task {
    pub(super) index: usize,
    pub(super) prompt: Vec<i32>,
}

/// The batch of one rank: rows come in groups and leave one by one.
///
/// All ranks of a tensor-parallel group see the same tokens, so they take the same decisions without a word.
pub(super) struct Rows<'a> {
    decoder: &'a Decoder,
    weights: &'a Weights,
    options: &'a GenerateOptions,
    stops: &'a Stops<'a>,
    waiting: VecDeque<Task>,
    /// In the order of the cache's rows.
    open: Vec<Row>,
    cache: Option<KvCache>,
    /// Rows at a time.
    most: usize,
}

struct Row {
    task: Task,
    written: Vec<i32>,
}

/// Prompt tokens that are read at a time, unless a single prompt has more.
const READ_AT_ONCE: usize = 8192;

impl<'a> Rows<'a> {
    /// `tasks`: longest first.
    pub(super) fn new(
        decoder: &'a Decoder,
        weights: &'a Weights,
        options: &'a GenerateOptions,
        stops: &'a Stops<'a>,
        tasks: Vec<Task>,
    ) -> Self {
        let longest = tasks.first().map_or(0, |task| task.prompt.len());
        let capacity = (longest + options.max_new_tokens).max(1);
        let kind = weights.get(decoder.table.embedding).kind();
        let fitting = options.cache_bytes / KvCache::row_bytes(decoder, capacity, kind).max(1);
        let most = options.rows.min(fitting).min(tasks.len()).max(1);
        let cache = (options.cached && !tasks.is_empty()).then(|| KvCache::new(decoder, most, capacity, kind));
        Self { decoder, weights, options, stops, waiting: tasks.into(), open: Vec::new(), cache, most }
    }

    /// Writes one token of every row; gives the sequences that have ended with it, and None when there is nothing more to write.
    pub(super) fn step(&mut self) -> Option<Vec<(usize, Vec<i32>, Ended)>> {
        if self.options.max_new_tokens == 0 && !self.waiting.is_empty() {
            return Some(self.waiting.drain(..).map(|task| (task.index, Vec::new(), Ended::Length)).collect());
        }
        let free = self.most - self.open.len();
        let from = self.open.len();
        // few at a time would read all weights for little
        if self.open.is_empty() || free >= self.most.div_ceil(4) {
            self.take(free);
        }
        let hidden = if self.open.len() > from { self.read(from) } else { self.read_next()? };
        let from = if self.open.len() > from { from } else { 0 };
        self.write(from, &hidden);
        Some(self.leave())
    }

    /// Takes waiting prompts into the batch.
    fn take(&mut self, most: usize) {
        let mut tokens = 0;
        for _ in 0..most {
            let Some(task) = self.waiting.front() else { break };
            tokens += task.prompt.len();
            if tokens > READ_AT_ONCE && tokens > task.prompt.len() {
                break;
            }
            let task = self.waiting.pop_front().expect("invariant: just seen");
            self.open.push(Row { task, written: Vec::new() });
        }
    }

    /// Hidden states behind the prompts of the rows from `first` on.
    fn read(&mut self, first: usize) -> Tensor {
        let rows = &self.open[first..];
        let tokens: Vec<i64> = rows.iter().flat_map(|row| row.task.prompt.iter().map(|&id| i64::from(id))).collect();
        let lengths: Vec<usize> = rows.iter().map(|row| row.task.prompt.len()).collect();
        match &mut self.cache {
            Some(cache) => self.decoder.read(self.weights, &tokens, &lengths, cache),
            None => self.read_again(first),
        }
    }

    /// Hidden states behind what every row has written last; None where there is no row.
    fn read_next(&mut self) -> Option<Tensor> {
        if self.open.is_empty() {
            return None;
        }
        let last = |row: &Row| i64::from(*row.written.last().expect("invariant: a row writes a token a step"));
        let tokens: Vec<i64> = self.open.iter().map(last).collect();
        Some(match &mut self.cache {
            Some(cache) => self.decoder.read_next(self.weights, &tokens, cache),
            None => self.read_again(0),
        })
    }

    /// Hidden states behind the rows from `first` on, from their whole texts.
    fn read_again(&self, first: usize) -> Tensor {
        let texts = self.open[first..].iter().map(|row| row.task.prompt.iter().chain(&row.written));
        let texts: Vec<Vec<i64>> = texts.map(|text| text.map(|&id| i64::from(id)).collect()).collect();
        let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
        let batch = self.decoder.batch(&texts.concat(), &lengths);
        let (hidden, _) = self.decoder.forward(self.weights, &batch, Keep::Nothing);
        let ends = lengths.iter().scan(0, |end, &len| {
            *end += len as i64;
            Some(*end - 1)
        });
        hidden.index_select(0, &upload(&ends.collect::<Vec<_>>(), self.decoder.device))
    }

    /// Chooses the next token of each row from `first` on.
    fn write(&mut self, first: usize, hidden: &Tensor) {
        let sampling = &self.options.sampling;
        let rows = &mut self.open[first..];
        if sampling.is_greedy() {
            let choices = self.decoder.first_choices(self.weights, hidden).to_device(Device::Cpu);
            for (row, &choice) in rows.iter_mut().zip(slice::<i64>(&choices)) {
                row.written.push(choice as i32);
            }
            return;
        }
        let logits = self.decoder.all_logits(self.weights, hidden);
        let logits = logits.to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
        let places: Vec<(usize, usize)> = rows.iter().map(|row| (row.task.index, row.written.len())).collect();
        for (row, choice) in rows.iter_mut().zip(sampling.choose(slice::<f32>(&logits), &places)) {
            row.written.push(choice);
        }
    }

    /// Takes the rows that have ended out of the batch.
    fn leave(&mut self) -> Vec<(usize, Vec<i32>, Ended)> {
        let mut left = Vec::new();
        for at in (0..self.open.len()).rev() {
            let Some(ended) = self.stops.ended(&self.open[at].written, self.options.max_new_tokens) else { continue };
            let Row { task, mut written } = self.open.swap_remove(at);
            if let Some(cache) = &mut self.cache {
                cache.swap_remove(at);
            }
            if ended == Ended::Eos {
                written.pop();
            }
            left.push((task.index, written, ended));
        }
        left
    }
}
