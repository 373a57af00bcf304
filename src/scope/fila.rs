//! FILA: adapters that start as the part of each matrix that matters most to the forget samples (arXiv 2408.06621).
//!
//! With the Fisher information F of each weight (mean squared batch gradient), R = F_f / (F_r + 1e-5) and q_i the root of row i's sum of
//! R: U S V^T is the rank-r SVD of diag(q) W, `scale B A = diag(1 / (q + 1e-5)) U S V^T`, and W loses that product, so the model stays
//! the same. As the authors' code has it.

use tch::{Device, Kind, Tensor};

use super::elements::{Elements, each};
use super::{ScopeError, Sets, gradient};
use crate::abi::slices::slice;
use crate::config::{Config, Lora, Mask};
use crate::dist::{Reduce, World};
use crate::model::sharding::{Adapter, ParamId, Table};
use crate::train::{GradientBuffers, GradientOptions, Layout, Trainer};

/// Starts all adapters so. `whole`: the table of this rank with nothing frozen; `layout`: of it, with the matrices of `names` alone
/// trained. All ranks call it, before the first step.
///
/// # Errors
/// Gradients that are no numbers.
pub fn fila(
    trainer: &mut Trainer,
    config: &Config,
    names: &[String],
    mut whole: Table,
    layout: impl Fn(&Table) -> Layout,
    sets: Sets,
    world: &World,
) -> Result<(), ScopeError> {
    let lora = config.scope.lora.as_ref().expect("invariant: there are adapters");
    whole.freeze(|param| param.pieces.iter().any(|piece| names.contains(&piece.name)));
    let layout = layout(&whole);
    let importance = importance(trainer, lora, names, &whole, &layout, sets, world)?;
    let layers = trainer.decoder.table.layers.clone();
    let adapters = layers.iter().flat_map(|layer| &layer.adapters);
    for (index, (adapter, q)) in adapters.zip(importance).enumerate() {
        start(trainer, adapter, &q, lora, config.run.seed, index, world);
    }
    let parameters = &mut trainer.parameters;
    for index in (0..parameters.layout.buckets.len()).rev() {
        if let Some(mut own) = parameters.rounded(index) {
            own.copy_(&parameters.masters[index]);
        }
        parameters.gather(index, &world.dp);
    }
    parameters.frozen_moved = true;
    tracing::info!(
        "before: adapters start from the {} directions of each matrix that matter most to the forget samples",
        lora.r
    );
    Ok(())
}

/// For each adapted tensor, in the order of the adapters, the importance of each of its rows.
fn importance(
    trainer: &mut Trainer,
    lora: &Lora,
    names: &[String],
    whole: &Table,
    layout: &Layout,
    sets: Sets,
    world: &World,
) -> Result<Vec<Vec<f64>>, ScopeError> {
    let elements = Elements::new(whole, layout, names, world);
    let retain = sets.retain.expect("invariant: the configuration was validated");
    let samples = sets.forget.set.samples.len().min(retain.set.samples.len());
    let buffers =
        GradientBuffers::new(whole, layout, &world.tp, &world.dp, GradientOptions::f32(trainer.decoder.device));
    // for as long as it takes, the matrices are trained and there are no adapters
    let gradients = std::mem::replace(&mut trainer.gradients, buffers);
    let table = std::mem::replace(&mut trainer.decoder.table, whole.clone());
    let batch = lora.fila_batch.unwrap_or(Lora::FILA_BATCH);
    let mut squares = |look: gradient::Look| {
        gradient::mean_square(
            trainer,
            gradient::Look { samples: look.samples.min(samples.max(1)), ..look },
            batch,
            world,
        )
    };
    let forget = squares(gradient::Look { samples: sets.forget.set.samples.len(), ..sets.forget });
    let retain = squares(gradient::Look { samples, ..retain });
    trainer.gradients = gradients;
    trainer.decoder.table = table;
    let (forget, retain) = (forget?, retain?);
    let mut sums: Vec<Vec<f64>> = elements.tensors.iter().map(|tensor| vec![0.0; tensor.rows]).collect();
    for run in elements.runs.iter().filter(|run| run.counts) {
        let part = |of: &[Tensor]| slice::<f32>(&of[run.bucket])[run.own.clone()].to_vec();
        let (f, r) = (part(&forget), part(&retain));
        each(&run.place, |at, row, _| sums[run.tensor][row] += f64::from(f[at]) / (f64::from(r[at]) + Mask::FILA_EPS));
    }
    for sums in &mut sums {
        Elements::sum(sums, world);
        sums.iter_mut().for_each(|sum| *sum = sum.sqrt());
    }
    let stems = trainer.decoder.table.layers.iter().flat_map(|layer| &layer.adapters);
    let of = |adapter: &Adapter| {
        let name = adapted(&trainer.decoder.table, adapter);
        let at = elements.tensors.iter().position(|tensor| tensor.name == name);
        sums[at.expect("invariant: adapted tensors are named")].clone()
    };
    Ok(stems.map(of).collect())
}

/// The Hugging Face name of the tensor that an adapter adds to.
fn adapted(table: &Table, adapter: &Adapter) -> String {
    let mut pieces = table.params[adapter.of].pieces.iter();
    let piece = pieces.find(|piece| adapter.rows.contains(&piece.row));
    piece.expect("invariant: an adapter has rows of its matrix").name.clone()
}

/// Starts one adapter and takes its product out of the matrix.
fn start(trainer: &mut Trainer, adapter: &Adapter, q: &[f64], lora: &Lora, seed: u64, index: usize, world: &World) {
    let table = &trainer.decoder.table;
    let name = adapted(table, adapter);
    let pieces: Vec<_> = table.params[adapter.of].pieces.iter().filter(|piece| piece.name == name).cloned().collect();
    let shape = pieces[0].shape.clone();
    let (rank, r) = (lora.r as i64, lora.r.min(shape[0].min(shape[1]) as usize) as i64);
    // every tensor-parallel rank puts its boxes into the whole matrix
    let mut matrix = Tensor::zeros(&shape, (Kind::Float, Device::Cpu));
    let weight = trainer.parameters.weights.get(adapter.of).shallow_clone();
    for piece in &pieces {
        let part = weight.narrow(0, piece.row, piece.size[0]).to_kind(Kind::Float).to_device(Device::Cpu);
        matrix.narrow(0, piece.offset[0], piece.size[0]).narrow(1, piece.offset[1], piece.size[1]).copy_(&part);
    }
    world.tp.all_reduce(&mut matrix, Reduce::Sum);
    let mut b = Tensor::zeros([shape[0], rank], (Kind::Float, Device::Cpu));
    let mut a = Tensor::zeros([rank, shape[1]], (Kind::Float, Device::Cpu));
    let owner = index % world.mesh.world();
    if world.mesh.rank == owner {
        let q = Tensor::from_slice(q).to_kind(Kind::Float);
        let (u, s, v) = low_rank(&(q.unsqueeze(1) * &matrix), r, seed, &name);
        let root = (s / lora.scale()).sqrt();
        a.narrow(0, 0, r).copy_(&(v * &root).tr());
        b.narrow(1, 0, r).copy_(&(u * &root / (q + 1e-5).unsqueeze(1)));
    }
    world.world.broadcast(&mut a, owner);
    world.world.broadcast(&mut b, owner);
    put(trainer, adapter.a, &a);
    put(trainer, adapter.b, &b);
    for piece in &pieces {
        let rows = b.narrow(0, piece.offset[0], piece.size[0]);
        let columns = a.narrow(1, piece.offset[1], piece.size[1]);
        let mut part = weight.narrow(0, piece.row, piece.size[0]);
        let product = (rows.matmul(&columns) * lora.scale()).to_device(part.device());
        let left = part.to_kind(Kind::Float) - product;
        part.copy_(&left);
    }
}

/// Writes this rank's own part of a parameter's masters from the whole tensor.
fn put(trainer: &mut Trainer, id: ParamId, whole: &Tensor) {
    let parameters = &trainer.parameters;
    let (index, start) = parameters.layout.places[id].expect("invariant: adapters are trained");
    let param = &trainer.decoder.table.params[id];
    let range = start..start + param.num_elements() as usize;
    for (place, own) in parameters.layout.buckets[index].runs(param, &range) {
        let boxed = whole.narrow(0, place.offset[0], place.size[0]).narrow(1, place.offset[1], place.size[1]);
        let part = boxed.reshape([-1]).narrow(0, place.start, place.len);
        parameters.masters[index].narrow(0, own.start as i64, place.len).copy_(&part);
    }
}

/// The `r` largest singular triples: U `[rows, r]`, S `[r]`, V `[columns, r]`. Exact for small matrices; for large ones by a random
/// projection with two power iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4), drawn from seed and name.
fn low_rank(matrix: &Tensor, r: i64, seed: u64, name: &str) -> (Tensor, Tensor, Tensor) {
    let (rows, columns) = matrix.size2().expect("invariant: a matrix");
    let cut = |(u, s, v): (Tensor, Tensor, Tensor)| (u.narrow(1, 0, r), s.narrow(0, 0, r), v.narrow(1, 0, r));
    let wide = r + 16;
    if rows.min(columns) <= 4 * wide {
        return cut(matrix.svd(true, true));
    }
    let stream = crate::model::init::Stream::new(seed, &format!("projection of {name}"));
    let draws: Vec<f32> = (0..columns * wide).map(|i| stream.normal(i as u64) as f32).collect();
    let basis = |y: Tensor| Tensor::linalg_qr(&y, "reduced").0;
    let mut q = basis(matrix.matmul(&Tensor::from_slice(&draws).view([columns, wide])));
    for _ in 0..2 {
        q = basis(matrix.matmul(&basis(matrix.tr().matmul(&q))));
    }
    let (u, s, v) = cut(q.tr().matmul(matrix).svd(true, true));
    (q.matmul(&u), s, v)
}
