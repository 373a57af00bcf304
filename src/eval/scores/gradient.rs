//! How hard a text pulls at the model: the length of its loss's gradient, one text at a time.

use std::rc::Rc;

use tch::Tensor;

use super::{Asked, Text};
use crate::abi::upload::upload;
use crate::data::{Item, Stream, share};
use crate::dist::{Group, Reduce};
use crate::kernels::reduce::sum_of_squares;
use crate::model::sharding::{ParamId, Table};
use crate::model::{Decoder, Gradients, Keep, Weights};
use crate::train::{GradientBuffers, GradientOptions, Layout};

/// Of each text the mean over the model's tensors of the L2 norm of the gradient of its mean negative log-likelihood (GradNorm,
/// arXiv 2402.17012, as OpenUnlearning computes it: an end-of-text token is left out). None of a text without an answer.
///
/// The tensors are those of the exported model, whether they are trained or not. The gradients of one half block are held at a time,
/// those of a tied head till the end. All ranks call it and get all of them; `progress` is called with the number of texts that this
/// rank has done.
pub fn gradient_norms(model: Asked, texts: &[&Text], mut progress: impl FnMut(usize)) -> Vec<Option<f64>> {
    let item = |(sample, text): (usize, &&Text)| Item { stream: Stream::Forget, sample, len: text.tokens.len() };
    let items: Vec<Item> = texts.iter().enumerate().map(item).collect();
    let Asked { decoder, weights, world, forward } = model;
    let mine = share(&items, world.mesh.dp).swap_remove(world.mesh.dp_rank());
    let mut tensors = Tensors::new(decoder);
    let mut bytes = Vec::new();
    for item in mine {
        if let Some(norm) = tensors.of(decoder, weights, texts[item.sample], forward.logits_bytes) {
            bytes.extend((item.sample as u64).to_le_bytes());
            bytes.extend(norm.to_le_bytes());
        }
        progress(1);
    }
    let mut norms = vec![None; texts.len()];
    for part in world.dp.gather_bytes(&bytes) {
        for [sample, norm] in part.as_chunks::<8>().0.as_chunks::<2>().0 {
            norms[u64::from_le_bytes(*sample) as usize] = Some(f64::from_le_bytes(*norm));
        }
    }
    norms
}

/// Takes the gradients of one text: each half block's are summed over the tensor-parallel ranks, squared and dropped.
struct Tensors {
    /// Nothing of it is frozen.
    table: Table,
    layout: Layout,
    gradients: GradientBuffers,
    tp: Rc<Group>,
    /// Of each parameter the tensor that each of its pieces belongs to.
    places: Vec<Vec<usize>>,
    /// Of each tensor the squares of this rank's part.
    squares: Vec<Tensor>,
}

impl Tensors {
    fn new(decoder: &Decoder) -> Self {
        let tp = &decoder.tp;
        let table = Table::new(&decoder.arch, tp.size(), tp.rank(), decoder.sequence_parallel)
            .expect("invariant: the decoder has such a table");
        // a bucket a half block
        let layout = Layout::new(&table, 1, 1, 0);
        let options = GradientOptions { release: true, ..GradientOptions::f32(decoder.device) };
        let alone = Rc::new(Group::solo("dp"));
        let gradients = GradientBuffers::new(&table, &layout, tp, &alone, options);
        let names = table.tensors();
        let place = |name: &str| names.iter().position(|(other, _)| *other == name).expect("invariant: it is listed");
        let places =
            table.params.iter().map(|param| param.pieces.iter().map(|piece| place(&piece.name)).collect()).collect();
        let squares = (0..names.len()).map(|_| Tensor::zeros([1], (tch::Kind::Double, decoder.device))).collect();
        Self { table, layout, gradients, tp: Rc::clone(tp), places, squares }
    }

    fn of(&mut self, decoder: &Decoder, weights: &Weights, text: &Text, logits_bytes: f64) -> Option<f64> {
        let answer = &text.targets[..text.targets.len() - usize::from(text.ended)];
        if answer.is_empty() {
            return None;
        }
        self.gradients.begin();
        self.gradients.last_micro_batch();
        self.squares.iter_mut().for_each(|sum| _ = sum.zero_());
        let device = decoder.device;
        let ids: Vec<i64> = text.tokens.iter().map(|&id| i64::from(id)).collect();
        let batch = decoder.batch(&ids, &[ids.len()]);
        let (hidden, tape) = decoder.forward(weights, &batch, Keep::Everything);
        let positions = upload(&answer.iter().map(|target| i64::from(target.after)).collect::<Vec<i64>>(), device);
        let targets = upload(&answer.iter().map(|target| i64::from(target.token)).collect::<Vec<i64>>(), device);
        let rows = decoder.rows(weights, &hidden, &positions, logits_bytes);
        let scores = decoder.scores(weights, &rows, &targets, true);
        let weight = scores.logprob.full_like(-1.0 / answer.len() as f64);
        let mut grad = hidden.zeros_like();
        let _ = grad.index_add_(0, &positions, &decoder.scores_backward(weights, &rows, scores, &weight, self));
        self.complete(self.table.num_units() - 1);
        decoder.backward(weights, &batch, tape, grad, self);
        let mut squares = Tensor::cat(&self.squares, 0);
        self.tp.all_reduce(&mut squares, Reduce::Sum);
        Some(squares.sqrt().mean(tch::Kind::Double).double_value(&[]))
    }

    /// Adds the squares of a half block, from its whole gradient on this rank.
    fn take(&mut self, bucket: usize, gradient: &Tensor) {
        for (id, range) in &self.layout.buckets[bucket].params {
            let param = &self.table.params[*id];
            // what is the same on all tensor-parallel ranks is counted by the first
            if param.class.is_replicated() && !self.tp.is_first() {
                continue;
            }
            let columns = param.shape.get(1).copied().unwrap_or(1);
            for (piece, &tensor) in param.pieces.iter().zip(&self.places[*id]) {
                let (start, len) = (range.start as i64 + piece.row * columns, piece.size.iter().product());
                self.squares[tensor] += sum_of_squares(&gradient.narrow(0, start, len));
            }
        }
    }
}

impl Gradients for Tensors {
    fn product(&mut self, param: ParamId, dy: &Tensor, x: &Tensor) {
        // adapters are no tensors of the exported model
        if param < self.table.own {
            self.gradients.product(param, dy, x);
        }
    }

    fn vector(&mut self, param: ParamId, grad: &Tensor) {
        self.gradients.vector(param, grad);
    }

    fn rows(&mut self, param: ParamId, rows: &Tensor, grad: &Tensor) {
        self.gradients.rows(param, rows, grad);
    }

    fn complete(&mut self, unit: usize) {
        while self.gradients.start_one(unit) {
            while let Some((bucket, gradient)) = self.gradients.next_summed(true) {
                self.take(bucket, &gradient);
            }
        }
    }
}
