//! Masks on disk: safetensors, one tensor of zeros and ones by Hugging Face name, of the tensor's shape or of one that broadcasts to it
//! (`[rows, 1]`, `[1, columns]`, `[1, 1]`).

use std::path::Path;

use safetensors::Dtype;
use tch::Kind;

use super::ScopeError;
use super::choice::Marks;
use super::elements::{Elements, each};
use crate::checkpoint::{CheckpointError, Reader, Spec, Writer};
use crate::config::Unit;
use crate::dist::World;

/// Marks of this rank's runs as the file has them; tensors that it does not hold are not marked.
///
/// # Errors
/// A tensor that the model has not, of a shape that does not broadcast to it, or with other values than 0 and 1.
pub fn read(path: &Path, elements: &Elements, known: &[(&str, &[i64])]) -> Result<Marks, ScopeError> {
    let reader = Reader::open(path)?;
    let refuse = |name: &str, reason: String| ScopeError::Mask { path: path.to_owned(), name: name.to_owned(), reason };
    let mut strides = Vec::new();
    for (name, shape) in reader.shapes() {
        let Some((_, whole)) = known.iter().find(|(known, _)| *known == name) else {
            return Err(refuse(&name, "the model has no tensor of this name".to_owned()));
        };
        // a vector is written as one column
        let column = whole.len() == 1 && shape.len() == 2 && shape[1] == 1;
        let broadcasts =
            (shape.len() == whole.len() || column) && shape.iter().zip(*whole).all(|(a, b)| a == b || *a == 1);
        if !broadcasts {
            return Err(refuse(&name, format!("has the shape {shape:?}, which does not broadcast to {whole:?}")));
        }
        let (bytes, dtype) = reader.whole(&name)?;
        if !matches!(dtype, Dtype::U8 | Dtype::BOOL) {
            return Err(refuse(&name, format!("is stored as {dtype:?}, expected U8 or BOOL")));
        }
        if let Some(at) = bytes.iter().position(|&mark| mark > 1) {
            return Err(refuse(&name, format!("element {at} is {}, expected 0 or 1", bytes[at])));
        }
        let columns = shape.get(1).copied().unwrap_or(1);
        let along = |n: i64| usize::from(n > 1);
        let row_stride = along(shape[0]) * columns as usize;
        strides.push((name, row_stride, along(columns)));
    }
    let runs = elements.runs.iter().map(|run| {
        let mut marks = vec![false; run.own.len()];
        if let Some((name, row_stride, stride)) = strides.iter().find(|(name, ..)| *name == run.place.tensor) {
            let (bytes, _) = reader.whole(name)?;
            each(&run.place, |at, row, column| marks[at] = bytes[row * row_stride + column * stride] == 1);
        }
        Ok(marks)
    });
    runs.collect()
}

/// Writes the marks of all ranks' runs, and reads nothing back. All ranks call it; the first writes.
///
/// `whole`: the marks by group where they are that regular, for a small file.
///
/// # Errors
/// On the first rank, what cannot be written.
pub fn write(
    path: &Path,
    elements: &Elements,
    marks: &Marks,
    whole: Option<(Unit, &[Vec<bool>])>,
    world: &World,
) -> Result<(), CheckpointError> {
    let shape = |tensor: &super::elements::Tensor| {
        let (rows, columns) = (tensor.rows as i64, tensor.columns as i64);
        match whole.map(|(unit, _)| unit) {
            None => vec![rows, columns],
            Some(Unit::Row) => vec![rows, 1],
            Some(Unit::Column) => vec![1, columns],
            Some(_) => vec![1, 1],
        }
    };
    let specs: Vec<Spec> = elements
        .tensors
        .iter()
        .map(|tensor| Spec { name: tensor.name.clone(), kind: Kind::Uint8, shape: shape(tensor) })
        .collect();
    let mut writer =
        world.is_first().then(|| Writer::create(path, &specs, &[("format", "dunlearn-mask-1")])).transpose()?;
    for (index, tensor) in elements.tensors.iter().enumerate() {
        let bytes: Vec<u8> = match whole {
            Some((_, marks)) => marks[index].iter().map(|&mark| u8::from(mark)).collect(),
            None => {
                let mut bits = vec![0u8; (tensor.rows * tensor.columns).div_ceil(8)];
                for (run, marks) in elements.runs.iter().zip(marks).filter(|(run, _)| run.tensor == index) {
                    each(&run.place, |at, row, column| {
                        let element = row * tensor.columns + column;
                        bits[element / 8] |= u8::from(marks[at]) << (element % 8);
                    });
                }
                let all = world.world.gather_bytes(&bits);
                if !world.is_first() {
                    continue;
                }
                let bit = |element: usize| u8::from(all.iter().any(|bits| bits[element / 8] >> (element % 8) & 1 == 1));
                (0..tensor.rows * tensor.columns).map(bit).collect()
            }
        };
        if let Some(writer) = &mut writer {
            writer.append_bytes(&bytes)?;
        }
    }
    writer.map_or(Ok(()), Writer::finish)
}
