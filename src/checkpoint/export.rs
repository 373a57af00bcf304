//! The Hugging Face folder that a run leaves: the same names, shapes and layouts that were read.
//!
//! Tensors are assembled one at a time from the ranks' slices and written by rank 0 in model order, so the bytes do not
//! depend on the layout.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::CheckpointError;
use super::tensor_file::{Spec, Writer, publish, unfinished};
use crate::dist::World;
use crate::model::sharding::{ParamId, Piece, Table};

/// What to write and where.
pub struct ExportOptions<'a> {
    /// The model folder that was read; everything but the weights is copied from it.
    pub source: &'a Path,
    pub target: &'a Path,
    /// Kind of the written weights.
    pub kind: Kind,
    /// Largest file. Unit: bytes.
    pub max_shard_bytes: usize,
}

/// One tensor on its way out.
struct Outgoing {
    spec: Spec,
    /// The parameter that holds it on every rank.
    param: ParamId,
    /// Each rank's boxes of it, by tensor-parallel rank; those of other ranks are empty where all ranks hold the same.
    pieces: Vec<Vec<Piece>>,
}

/// Writes the model. All ranks call it.
///
/// `tables`: the sharding table of each tensor-parallel rank. `parameter(id)`: this rank's f32 values of a parameter, complete
/// over the data-parallel ranks; it is called for all parameters in model order on all ranks and may use collectives.
/// `progress` is called after each tensor.
///
/// # Errors
/// What cannot be written, and those of `parameter`.
pub fn export<E: From<CheckpointError>>(
    options: &ExportOptions,
    tables: &[Table],
    world: &World,
    mut parameter: impl FnMut(ParamId) -> Result<Tensor, E>,
    mut progress: impl FnMut(),
) -> Result<(), E> {
    let outgoing = plan(tables, 0..tables[0].own, options.kind);
    let specs: Vec<Spec> = outgoing.iter().map(|tensor| tensor.spec.clone()).collect();
    let files = split(&specs, options.max_shard_bytes);
    let partial = unfinished(options.target);
    if world.is_first() {
        let create = |source| CheckpointError::Write { path: partial.clone(), source };
        if partial.exists() {
            std::fs::remove_dir_all(&partial).map_err(create)?;
        }
        std::fs::create_dir_all(&partial).map_err(create)?;
    }
    let mut written = BTreeMap::new();
    let mut open = None::<(ParamId, Tensor)>;
    for (index, range) in files.iter().enumerate() {
        let name = file_name(index, files.len());
        let create = || Writer::create(&partial.join(&name), &specs[range.clone()], &[("format", "pt")]);
        let mut writer = world.is_first().then(create).transpose()?;
        for tensor in &outgoing[range.clone()] {
            if open.as_ref().is_none_or(|(id, _)| *id != tensor.param) {
                open = Some((tensor.param, parameter(tensor.param)?));
            }
            let (_, values) = open.as_ref().expect("invariant: just set");
            // one copy of the model is enough: the first data-parallel row gathers over its tensor-parallel ranks
            if world.mesh.dp_rank() == 0 {
                let whole = assemble(tensor, values, options.kind, world);
                if let (Some(writer), Some(whole)) = (&mut writer, whole) {
                    writer.append(&whole)?;
                    written.insert(tensor.spec.name.clone(), name.clone());
                }
            }
            progress();
        }
        writer.map(Writer::finish).transpose()?;
    }
    if world.is_first() {
        if files.len() > 1 {
            write_index(&partial, &specs, &written)?;
        }
        copy_companions(options, &partial)?;
        // what stood there before was cleared at the run's start
        publish(&partial, options.target)?;
    }
    world.world.barrier();
    Ok(())
}

/// The tensors in model order with every rank's boxes.
fn plan(tables: &[Table], ids: Range<ParamId>, kind: Kind) -> Vec<Outgoing> {
    let mut outgoing = Vec::<Outgoing>::new();
    for (id, param) in tables[0].params.iter().enumerate().filter(|(id, _)| ids.contains(id)) {
        let replicated = param.class.is_replicated();
        let mut names: Vec<&str> = param.pieces.iter().map(|piece| piece.name.as_str()).collect();
        names.dedup();
        for name in names {
            let pieces: Vec<Vec<Piece>> = tables
                .iter()
                .enumerate()
                .map(|(rank, table)| {
                    let mine = table.params[id].pieces.iter().filter(|piece| piece.name == name);
                    if replicated && rank > 0 { Vec::new() } else { mine.cloned().collect() }
                })
                .collect();
            let spec = Spec { name: name.to_owned(), kind, shape: pieces[0][0].shape.clone() };
            outgoing.push(Outgoing { spec, param: id, pieces });
        }
    }
    outgoing
}

/// Consecutive tensors a file, each file at most `max_bytes` unless a single tensor is larger.
pub(super) fn split(specs: &[Spec], max_bytes: usize) -> Vec<std::ops::Range<usize>> {
    let mut files = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, spec) in specs.iter().enumerate() {
        if index > start && bytes + spec.bytes() > max_bytes {
            files.push(start..index);
            (start, bytes) = (index, 0);
        }
        bytes += spec.bytes();
    }
    files.push(start..specs.len());
    files
}

/// The whole tensor from the ranks' boxes, on the first rank. All ranks of the tensor-parallel group call it.
fn assemble(tensor: &Outgoing, values: &Tensor, kind: Kind, world: &World) -> Option<Tensor> {
    let elements = |pieces: &[Piece]| pieces.iter().map(|piece| piece.size.iter().product::<i64>()).sum::<i64>();
    let largest = tensor.pieces.iter().map(|pieces| elements(pieces)).max().unwrap_or(0);
    let mine = Tensor::zeros([largest], (kind, Device::Cpu));
    let mut at = 0;
    for piece in &tensor.pieces[world.mesh.tp_rank()] {
        let part = values.narrow(0, piece.row, piece.size[0]).reshape([-1]);
        mine.narrow(0, at, part.size()[0]).copy_(&part);
        at += part.size()[0];
    }
    let all = world.tp.all_gather(&mine);
    if !world.is_first() {
        return None;
    }
    let whole = Tensor::empty(&tensor.spec.shape, (kind, Device::Cpu));
    for (rank, pieces) in tensor.pieces.iter().enumerate() {
        let mut at = rank as i64 * largest;
        for piece in pieces {
            let len = piece.size.iter().product::<i64>();
            let mut target = whole.shallow_clone();
            for (dim, (&start, &len)) in piece.offset.iter().zip(&piece.size).enumerate() {
                target = target.narrow(dim as i64, start, len);
            }
            target.copy_(&all.narrow(0, at, len).view(piece.size.as_slice()));
            at += len;
        }
    }
    Some(whole)
}

/// Writes the adapters of the tables in PEFT's format: `adapter_model.safetensors` and `adapter_config.json` with `settings`. All ranks call
/// it; `parameter` is as in [`export`].
///
/// # Errors
/// What cannot be written.
pub fn export_adapter(
    target: &Path,
    kind: Kind,
    settings: &Value,
    tables: &[Table],
    world: &World,
    mut parameter: impl FnMut(ParamId) -> Tensor,
) -> Result<(), CheckpointError> {
    let write = |path: &Path, source| CheckpointError::Write { path: path.to_owned(), source };
    if world.is_first() {
        std::fs::create_dir_all(target).map_err(|e| write(target, e))?;
    }
    let outgoing = plan(tables, tables[0].own..tables[0].params.len(), kind);
    let parameter = |id| Ok::<_, CheckpointError>(parameter(id));
    stream(&target.join("adapter_model.safetensors"), &outgoing, kind, world, parameter)?;
    if world.is_first() {
        let path = target.join("adapter_config.json");
        let text = serde_json::to_string_pretty(settings).expect("invariant: settings are JSON");
        std::fs::write(&path, text + "\n").map_err(|e| write(&path, e))?;
    }
    world.world.barrier();
    Ok(())
}

/// Writes the tensors called `names` as one f32 file. All ranks call it; `tables` and `parameter` are as in [`export`].
///
/// # Errors
/// What cannot be written, and those of `parameter`.
pub fn export_tensors<E: From<CheckpointError>>(
    path: &Path,
    names: &[String],
    tables: &[Table],
    world: &World,
    parameter: impl FnMut(ParamId) -> Result<Tensor, E>,
) -> Result<(), E> {
    let mut outgoing = plan(tables, 0..tables[0].own, Kind::Float);
    outgoing.retain(|tensor| names.contains(&tensor.spec.name));
    stream(path, &outgoing, Kind::Float, world, parameter)?;
    world.world.barrier();
    Ok(())
}

/// One file of the given tensors, written by the first rank.
fn stream<E: From<CheckpointError>>(
    path: &Path,
    outgoing: &[Outgoing],
    kind: Kind,
    world: &World,
    mut parameter: impl FnMut(ParamId) -> Result<Tensor, E>,
) -> Result<(), E> {
    let specs: Vec<Spec> = outgoing.iter().map(|tensor| tensor.spec.clone()).collect();
    let create = || Writer::create(path, &specs, &[("format", "pt")]);
    let mut writer = world.is_first().then(create).transpose()?;
    let mut open = None::<(ParamId, Tensor)>;
    for tensor in outgoing {
        if open.as_ref().is_none_or(|(id, _)| *id != tensor.param) {
            open = Some((tensor.param, parameter(tensor.param)?));
        }
        let (_, values) = open.as_ref().expect("invariant: just set");
        if world.mesh.dp_rank() == 0
            && let (Some(whole), Some(writer)) = (assemble(tensor, values, kind, world), &mut writer)
        {
            writer.append(&whole)?;
        }
    }
    writer.map(Writer::finish).transpose()?;
    Ok(())
}

pub(super) fn file_name(index: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".to_owned()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", index + 1)
    }
}

pub(super) fn write_index(
    folder: &Path,
    specs: &[Spec],
    written: &BTreeMap<String, String>,
) -> Result<(), CheckpointError> {
    let total: usize = specs.iter().map(Spec::bytes).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": written });
    let path = folder.join("model.safetensors.index.json");
    let text = serde_json::to_string_pretty(&index).expect("invariant: the index is JSON");
    std::fs::write(&path, text + "\n").map_err(|source| CheckpointError::Write { path, source })
}

/// Copies what belongs to a model besides its weights; config.json gets the kind of the written weights.
pub(super) fn copy_companions(options: &ExportOptions, target: &Path) -> Result<(), CheckpointError> {
    let read = |path: &Path, source| CheckpointError::Read { path: path.to_owned(), source };
    for entry in std::fs::read_dir(options.source).map_err(|e| read(options.source, e))? {
        let path = entry.map_err(|e| read(options.source, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_file() && is_companion(&name) && name != "config.json" {
            let to = target.join(&name);
            // the bytes without the permissions: a read-only source makes no read-only model
            let bytes = std::fs::read(&path).map_err(|e| read(&path, e))?;
            std::fs::write(&to, bytes).map_err(|source| CheckpointError::Write { path: to, source })?;
        }
    }
    let path = options.source.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| read(&path, e))?;
    let mut config: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|error| CheckpointError::Malformed { path: path.clone(), reason: error.to_string() })?;
    let word = match options.kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    };
    let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
    config.insert(key.to_owned(), Value::from(word));
    let text = serde_json::to_string_pretty(&config).expect("invariant: a map is JSON");
    let path = target.join("config.json");
    std::fs::write(&path, text + "\n").map_err(|source| CheckpointError::Write { path, source })
}

/// Configuration, tokenizer and generation files; not weights, not adapters, not documents about the source model.
fn is_companion(name: &str) -> bool {
    let path = PathBuf::from(name);
    let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
    let kept = matches!(extension.as_str(), "json" | "txt" | "model" | "jinja" | "tiktoken" | "py");
    kept && !name.ends_with(".index.json") && !name.starts_with("adapter") && !name.starts_with("training_args")
}
