//! A Hugging Face folder from a run's checkpoint, without the run: tensor by tensor, from the slices.

use std::path::Path;

use tch::{Kind, Tensor};

use super::parallel::{Destination, agree, write_parallel};
use super::state::StateFiles;
use super::tensor_file::Spec;
use super::{CheckpointError, ExportOptions, Folder, Saved};
use crate::dist::World;
use crate::model::sharding::ADAPTER_PREFIX;

/// Writes the model of a checkpoint, whose digests are checked first. All ranks call it; each reads, assembles and writes its share of
/// the tensors, rank 0 the rest at the end.
///
/// `order`: the tensors with their shapes in model order. What was not trained comes from the model that the run read,
/// `options.source`, which must still be that model; low-rank adapters are added to their matrices. The bytes are those of the run's
/// own export at that step. Needs the memory of the largest tensor in f32 and in the kind that is written. `progress` is called after
/// each tensor of this rank.
///
/// # Errors
/// On all ranks when one of them could not.
pub fn convert(
    saved: &Saved,
    order: &[(&str, &[i64])],
    options: &ExportOptions,
    world: &World,
    mut progress: impl FnMut(),
) -> Result<(), CheckpointError> {
    agree(world, &saved.folder, saved.verify(world.mesh.rank, world.mesh.world()))?;
    let files = saved.state()?;
    check(saved, &files, order)?;
    let scope = &saved.manifest.config["scope"];
    let lora = scope["lora"]["alpha"].as_f64().zip(scope["lora"]["r"].as_f64());
    let base = if order.iter().all(|(name, _)| files.tensors().contains_key(name)) {
        None
    } else {
        Some(Folder::open(options.source)?)
    };
    let merge = Merge { files: &files, base, scale: lora.map(|(alpha, r)| alpha / r) };
    let specs: Vec<Spec> = order
        .iter()
        .map(|(name, shape)| Spec { name: (*name).to_owned(), kind: options.kind, shape: shape.to_vec() })
        .collect();
    let to = Destination {
        target: options.target,
        model: Some((options.source, options.kind)),
        max_shard_bytes: options.max_shard_bytes,
        metadata: &[("format", "pt")],
    };
    write_parallel(&to, &specs, world, |index| {
        let (name, shape) = order[index];
        let values = merge.tensor(name, shape)?.to_kind(options.kind).contiguous();
        progress();
        Ok(values)
    })
}

/// Where a tensor of the model comes from.
struct Merge<'a> {
    files: &'a StateFiles,
    /// The model that the run read, where the checkpoint does not hold all of it.
    base: Option<Folder>,
    /// Of the adapters.
    scale: Option<f64>,
}

impl Merge<'_> {
    /// The whole tensor, f32.
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, CheckpointError> {
        let known = self.files.tensors();
        let mut values = match &self.base {
            Some(base) if !known.contains_key(name) => base.whole(name, shape)?.to_kind(Kind::Float),
            _ => self.files.weights(name, shape)?,
        };
        let of = |which: &str| format!("{ADAPTER_PREFIX}{}.lora_{which}.weight", name.trim_end_matches(".weight"));
        let (a, b) = (of("A"), of("B"));
        if let (Some(scale), Some(shape_a), Some(shape_b)) = (self.scale, known.get(a.as_str()), known.get(b.as_str()))
        {
            let product = self.files.weights(&b, shape_b)?.matmul(&self.files.weights(&a, shape_a)?);
            // not in place: what comes from the model's file is a view of it
            values = &values + product * scale;
        }
        Ok(values)
    }
}

/// The checkpoint has the model's tensors, each whole, and no others; what the run did not train may be missing.
fn check(saved: &Saved, files: &StateFiles, order: &[(&str, &[i64])]) -> Result<(), CheckpointError> {
    let have = files.tensors();
    let mut list = String::new();
    let trained_all = trains_everything(saved);
    for (name, shape) in order {
        match have.get(name) {
            None if !trained_all => {}
            None => list += &format!("\n  missing      {name} {shape:?}"),
            Some(found) if found != shape => {
                list += &format!("\n  wrong shape  {name}: found {found:?}, expected {shape:?}")
            }
            Some(_) => {}
        }
    }
    for (name, shape) in &have {
        if !order.iter().any(|(known, _)| known == name) && !name.starts_with(ADAPTER_PREFIX) {
            list += &format!("\n  unexpected   {name} {shape:?}");
        }
    }
    if list.is_empty() {
        files.check_coverage()
    } else {
        Err(CheckpointError::Mismatch { folder: saved.folder.clone(), list })
    }
}

/// Whether the run of a checkpoint trained all of its model, so that the checkpoint holds all of it.
pub fn trains_everything(saved: &Saved) -> bool {
    let config = &saved.manifest.config;
    config["scope"].is_null() && config["method"]["update"].is_null()
}

/// How one tensor differs between two checkpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorDifference {
    pub name: String,
    /// L2 norm of the difference, and of the first checkpoint's tensor.
    pub norm: f64,
    pub size: f64,
    /// Elements that differ, and all.
    pub changed: usize,
    pub elements: usize,
}

/// Compares the weights of two checkpoints tensor by tensor, in the memory of two tensors.
///
/// # Errors
/// Tensors that only one of them has, or of other shapes.
pub fn difference(first: &Path, second: &Path) -> Result<Vec<TensorDifference>, CheckpointError> {
    let open = |path: &Path| {
        let saved = Saved::open(path)?;
        saved.verify(0, 1)?;
        saved.state()
    };
    let (a, b) = (open(first)?, open(second)?);
    let (names, others) = (a.tensors(), b.tensors());
    if names != others {
        let odd = names.iter().find(|(name, shape)| others.get(*name) != Some(shape));
        let odd = odd.or_else(|| others.iter().find(|(name, _)| !names.contains_key(*name)));
        let name = odd.map_or("", |(name, _)| name);
        let reason = format!("is not the same tensor in {}", first.display());
        return Err(CheckpointError::Tensor { path: second.to_owned(), name: name.to_owned(), reason });
    }
    let mut list = Vec::new();
    for (name, shape) in names {
        let (x, y) = (a.weights(name, shape)?, b.weights(name, shape)?);
        let norm = |t: &tch::Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
        list.push(TensorDifference {
            name: name.to_owned(),
            norm: norm(&(&x - &y)),
            size: norm(&x),
            changed: usize::try_from(x.ne_tensor(&y).sum(Kind::Int64).int64_value(&[])).unwrap_or(0),
            elements: x.numel(),
        });
    }
    Ok(list)
}
