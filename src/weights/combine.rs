//! Sums, differences and mixtures of whole folders.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::WeightsError;
use crate::checkpoint::{Destination, Folder, Spec, write_parallel};
use crate::dist::World;
use crate::model::init;
use crate::model::sharding::{Piece, matches};

/// Where a result goes.
pub struct Output<'a> {
    pub target: &'a Path,
    /// Kind of a written model; None keeps each tensor's own. Tasks are always f32.
    pub kind: Option<Kind>,
    /// Largest file. Unit: bytes.
    pub max_shard_bytes: usize,
}

/// What task matrices are counted from.
pub enum Start<'a> {
    /// A model.
    Folder(&'a Folder),
    /// Values drawn for each tensor by name: normal with standard deviation `std`.
    Random { seed: u64, std: f64 },
}

/// `tuned - start` of the tensors of `tuned` that match one of `patterns` (`*` stands for anything), as a folder of f32 tensors by
/// Hugging Face name. All ranks call it.
///
/// # Errors
/// A pattern that matches nothing, a tensor that the start has not or has in another shape, numbers that are not finite.
pub fn difference(
    tuned: &Folder,
    start: &Start,
    patterns: &[String],
    output: &Output,
    world: &World,
    progress: impl FnMut(),
) -> Result<(), WeightsError> {
    let names = select(tuned, patterns)?;
    let others: Vec<&Folder> = match start {
        Start::Folder(folder) => vec![folder],
        Start::Random { .. } => Vec::new(),
    };
    write_task(tuned, &others, &names, output, world, progress, |name, tensors| match start {
        Start::Folder(_) => Ok(&tensors[0] - &tensors[1]),
        Start::Random { seed, std } => {
            let shape = tensors[0].size();
            let piece =
                Piece { name: name.to_owned(), offset: vec![0; shape.len()], size: shape.clone(), shape, row: 0 };
            let drawn = init::fill(&piece, &|stream, index| (stream.normal(index) * std) as f32, *seed);
            Ok(&tensors[0] - drawn)
        }
    })
}

/// `model + strength x task`: a model folder in which the tensors of `task` are moved and the others are the same bytes (where the
/// kind stays). All ranks call it.
///
/// # Errors
/// A tensor of the task that the model has not or has in another shape, numbers that are not finite.
pub fn add(
    model: &Folder,
    task: &Folder,
    strength: f64,
    output: &Output,
    world: &World,
    progress: impl FnMut(),
) -> Result<(), WeightsError> {
    let names = task.specs()?.into_iter().map(|spec| spec.name).collect::<Vec<_>>();
    write_model(model, &[task], &names, output, world, progress, |_, tensors| Ok(&tensors[0] + &tensors[1] * strength))
}

/// `(1 - weight) x model + weight x other` of the tensors that match one of `patterns`; exactly the one or the other at weight 0 and
/// 1. All ranks call it.
///
/// # Errors
/// As [`difference`].
pub fn mix(
    model: &Folder,
    other: &Folder,
    weight: f64,
    patterns: &[String],
    output: &Output,
    world: &World,
    progress: impl FnMut(),
) -> Result<(), WeightsError> {
    let names = select(model, patterns)?;
    write_model(model, &[other], &names, output, world, progress, |_, tensors| Ok(tensors[0].lerp(&tensors[1], weight)))
}

/// Writes the model with `change` in place of the named tensors. It is given the name and f32 values, of the model first.
fn write_model(
    model: &Folder,
    others: &[&Folder],
    names: &[String],
    output: &Output,
    world: &World,
    mut progress: impl FnMut(),
    change: impl Fn(&str, &[Tensor]) -> Result<Tensor, WeightsError>,
) -> Result<(), WeightsError> {
    for name in names {
        check_same(model, others, name)?;
    }
    let mut specs = model.specs()?;
    if let Some(kind) = output.kind {
        specs.iter_mut().for_each(|spec| spec.kind = kind);
    }
    // wider elements first: all of them are aligned
    specs.sort_by_key(|spec| std::cmp::Reverse(spec.kind.elt_size_in_bytes()));
    let to = Destination {
        target: output.target,
        model: Some((model.path(), output.kind.unwrap_or_else(|| model.kind()))),
        max_shard_bytes: output.max_shard_bytes,
        metadata: &[("format", "pt")],
    };
    write_parallel(&to, &specs, world, |index| {
        let spec = &specs[index];
        progress();
        if !names.contains(&spec.name) {
            return Ok(model.tensor(&spec.name)?.to_kind(spec.kind));
        }
        let result = change(&spec.name, &values(model, others, &spec.name)?)?;
        finite(&result, model, others, &spec.name, spec.kind)
    })
}

/// Writes tensors that are no model, f32; else as [`write_model`].
pub(super) fn write_task(
    first: &Folder,
    others: &[&Folder],
    names: &[String],
    output: &Output,
    world: &World,
    mut progress: impl FnMut(),
    mut compute: impl FnMut(&str, &[Tensor]) -> Result<Tensor, WeightsError>,
) -> Result<(), WeightsError> {
    for name in names {
        check_same(first, others, name)?;
    }
    let mut specs: Vec<Spec> = first.specs()?.into_iter().filter(|spec| names.contains(&spec.name)).collect();
    specs.iter_mut().for_each(|spec| spec.kind = Kind::Float);
    let to = Destination {
        target: output.target,
        model: None,
        max_shard_bytes: output.max_shard_bytes,
        metadata: &[("format", "pt"), ("dunlearn", "task")],
    };
    write_parallel(&to, &specs, world, |index| {
        let name = &specs[index].name;
        progress();
        let result = compute(name, &values(first, others, name)?)?;
        finite(&result, first, others, name, Kind::Float)
    })
}

/// Names of the folder's tensors that match one of the patterns, each of which must match.
pub(super) fn select(folder: &Folder, patterns: &[String]) -> Result<Vec<String>, WeightsError> {
    let specs = folder.specs()?;
    if let Some(pattern) = patterns.iter().find(|pattern| !specs.iter().any(|spec| matches(pattern, &spec.name))) {
        let example = specs.get(specs.len() / 2).map(|spec| spec.name.clone()).unwrap_or_default();
        return Err(WeightsError::NoMatch { pattern: pattern.clone(), folder: folder.path().to_owned(), example });
    }
    let hit = |spec: &Spec| patterns.iter().any(|pattern| matches(pattern, &spec.name));
    Ok(specs.into_iter().filter(hit).map(|spec| spec.name).collect())
}

fn check_same(first: &Folder, others: &[&Folder], name: &str) -> Result<(), WeightsError> {
    let folders = || std::iter::once(first).chain(others.iter().copied());
    let known = folders().find_map(|folder| Some((folder, folder.find(name)?)));
    let (owner, (expected, other)) = known.expect("invariant: one of the folders has the tensor");
    for folder in folders() {
        match folder.find(name) {
            None => {
                return Err(WeightsError::Missing {
                    folder: folder.path().to_owned(),
                    name: name.to_owned(),
                    other: owner.path().to_owned(),
                });
            }
            Some((found, path)) if found != expected => {
                return Err(WeightsError::Shape {
                    name: name.to_owned(),
                    path: path.to_owned(),
                    found: found.to_vec(),
                    other: other.to_owned(),
                    expected: expected.to_vec(),
                });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// A tensor of every folder, f32.
fn values(first: &Folder, others: &[&Folder], name: &str) -> Result<Vec<Tensor>, WeightsError> {
    let all = std::iter::once(first).chain(others.iter().copied());
    all.map(|folder| Ok(folder.tensor(name)?.to_kind(Kind::Float))).collect()
}

/// The result in its kind, or whose fault it is that it is no number.
fn finite(result: &Tensor, first: &Folder, others: &[&Folder], name: &str, kind: Kind) -> Result<Tensor, WeightsError> {
    let good = |t: &Tensor| t.to_device(Device::Cpu).isfinite().all().to_kind(Kind::Int64).int64_value(&[]) != 0;
    let written = result.to_kind(kind);
    if good(&written) {
        return Ok(written);
    }
    for folder in std::iter::once(first).chain(others.iter().copied()) {
        if !good(&folder.tensor(name)?) {
            let path = folder.find(name).map(|(_, path)| path.to_owned()).unwrap_or_default();
            return Err(WeightsError::NotFinite { name: name.to_owned(), path });
        }
    }
    let kind = match kind {
        Kind::Half => "f16",
        Kind::BFloat16 => "bf16",
        _ => "f32",
    };
    Err(WeightsError::Overflow { name: name.to_owned(), kind })
}
