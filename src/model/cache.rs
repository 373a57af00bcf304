//! Keys and values of what a model has read, so that each further token costs one row: prompts go in packed, then every sequence
//! grows by a token at a time. No row is ever filled up with tokens that mean nothing.

use tch::{Kind, Tensor};

use super::attention;
use super::attention_core::{self, Cached, Projections};
use super::batch::Batch;
use super::decoder::Decoder;
use super::mlp;
use super::weights::Weights;
use crate::abi::upload::upload;
use crate::telemetry::Part;

/// The sequences that are being written, one row each, with this rank's key/value heads.
pub struct KvCache {
    /// Of each layer, `[rows, kv_heads, capacity, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
    /// Tokens of each row so far.
    lengths: Vec<usize>,
    rows: usize,
    capacity: usize,
    kv_heads: usize,
    head_dim: i64,
}

impl KvCache {
    /// Room for `rows` sequences of up to `capacity` tokens each. `kind`: what the model computes in.
    pub fn new(decoder: &Decoder, rows: usize, capacity: usize, kind: Kind) -> Self {
        let (kv_heads, head_dim) = (decoder.arch.num_kv_heads / decoder.tp.size() as i64, decoder.arch.head_dim);
        let shape = [rows as i64, kv_heads, capacity as i64, head_dim];
        // zeros: what lies behind a row's end is multiplied by probability 0 where no kernel takes the tensors
        let one = || Tensor::zeros(shape, (kind, decoder.device));
        let layers = (0..decoder.arch.num_layers).map(|_| (one(), one())).collect();
        Self { layers, lengths: Vec::new(), rows, capacity, kv_heads: kv_heads as usize, head_dim }
    }

    /// Bytes of one row of `capacity` tokens on a rank.
    pub fn row_bytes(decoder: &Decoder, capacity: usize, kind: Kind) -> usize {
        let heads = decoder.arch.num_kv_heads as usize / decoder.tp.size();
        let token = 2 * decoder.arch.num_layers * heads * decoder.arch.head_dim as usize;
        token * capacity * kind.elt_size_in_bytes()
    }

    /// Sequences that are being written.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// Forgets a row; the last one takes its place, as in [`Vec::swap_remove`].
    pub fn swap_remove(&mut self, row: usize) {
        self.lengths.swap_remove(row);
        let last = self.lengths.len();
        if row < last {
            let len = self.lengths[row] as i64;
            for tensor in self.layers.iter().flat_map(|(k, v)| [k, v]) {
                let part = |row: usize| tensor.get(row as i64).narrow(1, 0, len);
                part(row).copy_(&part(last));
            }
        }
    }

    /// Keeps the keys and values of whole sequences in the rows from `first` on.
    fn store(&mut self, layer: usize, first: usize, inputs: &Projections, spans: &[(i64, i64)]) {
        let (keys, values) = &self.layers[layer];
        let heads = self.kv_heads as i64;
        for (row, &(start, len)) in (first as i64..).zip(spans) {
            for (cached, (x, column)) in [(keys, inputs.k), (values, inputs.v)] {
                let part = x.narrow(0, start, len).narrow(1, column, heads * self.head_dim);
                let part = part.unflatten(1, [heads, self.head_dim]).transpose(0, 1);
                cached.get(row).narrow(1, 0, len).copy_(&part);
            }
        }
    }

    /// Puts the keys and values of one more token a row behind those that are there. `places`: see [`Self::places`].
    fn append(&mut self, layer: usize, inputs: &Projections, places: &Tensor) {
        let (rows, heads) = (self.lengths.len() as i64, self.kv_heads as i64);
        let (keys, values) = &self.layers[layer];
        for (cached, (x, column)) in [(keys, inputs.k), (values, inputs.v)] {
            let new = x.narrow(0, 0, rows).narrow(1, column, heads * self.head_dim);
            let new = new.reshape([rows * heads, self.head_dim]);
            let _ = cached.view([-1, self.head_dim]).index_copy_(0, places, &new);
        }
    }

    /// Where the next token's heads go, counted in heads from the cache's first element on: `[rows * kv_heads]` i64.
    fn places(&self) -> Vec<i64> {
        let head = |row: usize, len: usize| {
            (0..self.kv_heads).map(move |head| ((row * self.kv_heads + head) * self.capacity + len) as i64)
        };
        self.lengths.iter().enumerate().flat_map(|(row, &len)| head(row, len)).collect()
    }
}

impl Decoder {
    /// Reads new sequences into the cache; gives the hidden state behind each one's last token, `[sequences, hidden]`, before the
    /// final norm.
    ///
    /// All ranks of the tensor-parallel group call it with the same sequences.
    ///
    /// # Panics
    /// Where the cache has no room for them.
    pub fn read(&self, weights: &Weights, tokens: &[i64], lengths: &[usize], cache: &mut KvCache) -> Tensor {
        let first = cache.len();
        assert!(first + lengths.len() <= cache.rows, "invariant: the cache has a row for each sequence");
        assert!(lengths.iter().all(|&len| len <= cache.capacity), "invariant: the sequences fit into the cache");
        let batch = self.batch(tokens, lengths);
        cache.lengths.extend(lengths);
        let hidden = self.extend(weights, &batch, &mut |layer, inputs, shape| {
            cache.store(layer, first, inputs, &batch.sequences);
            attention_core::forward(inputs, batch.attended(), shape).0
        });
        let last: Vec<i64> = batch.sequences.iter().map(|(start, len)| start + len - 1).collect();
        hidden.index_select(0, &upload(&last, self.device))
    }

    /// Reads one more token of every sequence of the cache; gives the hidden states behind them, `[sequences, hidden]`, before the
    /// final norm.
    ///
    /// All ranks of the tensor-parallel group call it with the same tokens.
    ///
    /// # Panics
    /// Where a sequence has filled its row.
    pub fn read_next(&self, weights: &Weights, tokens: &[i64], cache: &mut KvCache) -> Tensor {
        assert_eq!(tokens.len(), cache.len(), "invariant: one token a sequence");
        assert!(cache.lengths.iter().all(|&len| len < cache.capacity), "invariant: the cache has room");
        let positions: Vec<i64> = cache.lengths.iter().map(|&len| len as i64).collect();
        let batch = Batch::of_single_tokens(tokens, &positions, self.token_multiple(), &self.arch.rope, self.device);
        let places = upload(&cache.places(), self.device);
        cache.lengths.iter_mut().for_each(|len| *len += 1);
        let lengths = cache.lengths.clone();
        let hidden = self.extend(weights, &batch, &mut |layer, inputs, shape| {
            cache.append(layer, inputs, &places);
            let (keys, values) = &cache.layers[layer];
            attention_core::one_more(inputs.q, &Cached { keys, values, lengths: &lengths }, shape)
        });
        hidden.narrow(0, 0, tokens.len() as i64)
    }

    /// All layers, with attention as `attend(layer, q k v, shape)` computes it: `[tokens, hidden]` on every rank.
    fn extend(
        &self,
        weights: &Weights,
        batch: &Batch,
        attend: &mut dyn FnMut(usize, &Projections, attention_core::Shape) -> Tensor,
    ) -> Tensor {
        let mut x = self.enter(weights, batch);
        for layer in 0..self.arch.num_layers {
            let run = || attention::extend(self, weights, layer, batch, &x, attend);
            let y = self.clock.time(Part::Attention, run);
            x = self.clock.time(Part::Mlp, || mlp::forward(self, weights, layer, y, super::Keep::Nothing)).0;
        }
        self.all_tokens(&x)
    }
}
