//! A Hugging Face folder's weights: every rank reads only the slices that it needs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::CheckpointError;
use super::stream::{Run, groups, join};
use super::tensor_file::{Spec, kind};
use crate::abi::slices::bytes_mut;
use crate::abi::storage::map_file;
use crate::abi::upload::fill;
use crate::model::Weights;
use crate::model::sharding::{Piece, Table};

/// Weight files of one model, open for reading.
pub struct Folder {
    path: PathBuf,
    files: Vec<WeightFile>,
    entries: BTreeMap<String, Entry>,
}

struct WeightFile {
    path: PathBuf,
    file: File,
}

#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    /// First byte in the file.
    offset: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Folder {
    /// Opens all weight files of a folder and reads their headers.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut folder = Self { path: path.to_owned(), files: Vec::new(), entries: BTreeMap::new() };
        let index = path.join("model.safetensors.index.json");
        // as transformers: a single file goes before an index that may be left over from another save
        if index.exists() && !path.join("model.safetensors").exists() {
            let weight_map = read_index(&index)?;
            for name in weight_map.values().collect::<std::collections::BTreeSet<_>>() {
                folder.add(&path.join(name))?;
            }
            for (tensor, file) in &weight_map {
                let found = folder.entries.get(tensor).map(|entry| folder.files[entry.file].path.clone());
                if found.as_deref() != Some(&path.join(file)) {
                    let reason = format!("says that tensor {tensor} is in {file}, which does not hold it");
                    return Err(CheckpointError::Malformed { path: index, reason });
                }
            }
        } else {
            for file in weight_files(path)? {
                folder.add(&file)?;
            }
        }
        Ok(folder)
    }

    /// Compares names and shapes with what the model needs; the error lists everything that is wrong.
    pub fn check(&self, table: &Table) -> Result<(), CheckpointError> {
        let needed: BTreeMap<&str, &[i64]> = table.tensors().into_iter().collect();
        let mut list = String::new();
        for (name, shape) in &needed {
            match self.entries.get(*name) {
                None => _ = write!(list, "\n  missing      {name} {shape:?}"),
                Some(entry) if entry.shape != **shape => {
                    _ = write!(list, "\n  wrong shape  {name}: found {:?}, expected {shape:?}", entry.shape);
                }
                Some(_) => {}
            }
        }
        for (name, entry) in &self.entries {
            if !needed.contains_key(name.as_str()) && !is_redundant(name, table) {
                _ = write!(list, "\n  unexpected   {name} {:?}", entry.shape);
            }
        }
        if list.is_empty() { Ok(()) } else { Err(CheckpointError::Mismatch { folder: self.path.clone(), list }) }
    }

    /// Reads one box of a stored tensor, in its stored kind.
    pub fn slice(&self, piece: &Piece) -> Result<Tensor, CheckpointError> {
        let entry = self.entries.get(&piece.name).expect("invariant: the tensor was looked up before");
        let file = &self.files[entry.file];
        let kind = kind(entry.dtype).ok_or_else(|| CheckpointError::Tensor {
            path: file.path.clone(),
            name: piece.name.clone(),
            reason: format!("is stored as {:?}, expected BF16, F16 or F32", entry.dtype),
        })?;
        let width = kind.elt_size_in_bytes();
        let mut tensor = Tensor::empty(&piece.size, (kind, Device::Cpu));
        let tensor_len = tensor.numel() as i64;
        let bytes = bytes_mut(&mut tensor);
        let mut runs = Vec::new();
        // rows and columns of the tensor and of the box; a tensor of another number of dimensions is one row
        let whole = piece.size == entry.shape;
        let (columns, rows, (first_row, first_column), len) = match (entry.shape.as_slice(), piece.offset.as_slice()) {
            ([_, columns], [row, column]) => (*columns, piece.size[0], (*row, *column), piece.size[1]),
            ([_], [first]) => (1, 1, (0, *first), piece.size[0]),
            _ if whole => (1, 1, (0, 0), tensor_len),
            (shape, _) => {
                let reason = format!("has the shape {shape:?}; a part of it is only read of 1 or 2 dimensions");
                return Err(CheckpointError::Tensor { path: file.path.clone(), name: piece.name.clone(), reason });
            }
        };
        for row in 0..rows {
            let from = (first_row + row) * columns + first_column;
            join(&mut runs, Run { from: from as usize, to: (row * len) as usize, len: len as usize });
        }
        assert_eq!(
            runs.iter().map(|run| run.len).sum::<usize>(),
            tensor_len as usize,
            "invariant: all of the box is read"
        );
        let read = |source| CheckpointError::Read { path: file.path.clone(), source };
        let mut buffer = Vec::new();
        for group in groups(&runs, width) {
            let (first, last) = (group[0].from, group[group.len() - 1]);
            let at = (entry.offset + width * first) as u64;
            if let [run] = group.as_slice() {
                // straight to where it belongs
                let target = &mut bytes[width * run.to..width * (run.to + run.len)];
                file.file.read_exact_at(target, at).map_err(read)?;
                continue;
            }
            buffer.resize(width * (last.from + last.len - first), 0);
            file.file.read_exact_at(&mut buffer, at).map_err(read)?;
            for Run { from, to, len } in group {
                bytes[width * to..width * (to + len)]
                    .copy_from_slice(&buffer[width * (from - first)..width * (from - first + len)]);
            }
        }
        Ok(tensor)
    }

    /// File and first byte of a stored tensor; what is asked for in this order is read from front to back.
    pub fn place(&self, name: &str) -> (usize, usize) {
        self.entries.get(name).map_or((0, 0), |entry| (entry.file, entry.offset))
    }

    /// This rank's shards of the whole model in `kind`, for a model that is only asked; names and shapes were checked before.
    /// `advance` is called for each slice that is read.
    pub fn weights(
        &self,
        table: &Table,
        kind: Kind,
        device: Device,
        mut advance: impl FnMut(),
    ) -> Result<Weights, CheckpointError> {
        let tensors: Vec<Tensor> =
            table.params.iter().map(|param| Tensor::empty(&param.shape, (kind, device))).collect();
        let mut pieces: Vec<(&Tensor, &Piece)> = tensors
            .iter()
            .zip(&table.params)
            .flat_map(|(to, param)| param.pieces.iter().map(move |p| (to, p)))
            .collect();
        // from front to back
        pieces.sort_by_key(|(_, piece)| self.place(&piece.name));
        for (target, piece) in pieces {
            fill(&target.narrow(0, piece.row, piece.size[0]), &self.slice(piece)?);
            advance();
        }
        Ok(Weights::new(tensors))
    }

    /// Reads a whole stored tensor, in its stored kind.
    ///
    /// # Errors
    /// A tensor that is not there or has another shape.
    pub fn whole(&self, name: &str, shape: &[i64]) -> Result<Tensor, CheckpointError> {
        let found = self.entries.get(name).map(|entry| entry.shape.as_slice());
        if found != Some(shape) {
            let found = found.map_or("nothing".to_owned(), |found| format!("{found:?}"));
            let reason = format!("expected {shape:?}, found {found}");
            return Err(CheckpointError::Tensor { path: self.path.clone(), name: name.to_owned(), reason });
        }
        self.tensor(name)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every stored tensor, in the order of the files and of their bytes.
    ///
    /// # Errors
    /// A tensor of a type that is not used here.
    pub fn specs(&self) -> Result<Vec<Spec>, CheckpointError> {
        let mut entries: Vec<(&String, &Entry)> = self.entries.iter().collect();
        entries.sort_by_key(|(name, entry)| (entry.file, entry.offset, *name));
        let spec = |(name, entry): (&String, &Entry)| {
            let kind = kind(entry.dtype).ok_or_else(|| CheckpointError::Tensor {
                path: self.files[entry.file].path.clone(),
                name: name.clone(),
                reason: format!("is stored as {:?}, expected BF16, F16 or F32", entry.dtype),
            })?;
            Ok(Spec { name: name.clone(), kind, shape: entry.shape.clone() })
        };
        entries.into_iter().map(spec).collect()
    }

    /// Shape of a stored tensor and the file that holds it.
    pub fn find(&self, name: &str) -> Option<(&[i64], &Path)> {
        let entry = self.entries.get(name)?;
        Some((&entry.shape, &self.files[entry.file].path))
    }

    /// Reads a whole stored tensor that is there (see [`Self::find`]), in its stored kind.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let shape = self.entries.get(name).map(|entry| entry.shape.clone()).unwrap_or_default();
        self.slice(&Piece { name: name.to_owned(), offset: vec![0; shape.len()], size: shape.clone(), shape, row: 0 })
    }

    /// The kind that holds most of the weights.
    pub fn kind(&self) -> Kind {
        let mut sizes = BTreeMap::<&str, (i64, Kind)>::new();
        for entry in self.entries.values() {
            if let Some(kind) = kind(entry.dtype) {
                let name = match kind {
                    Kind::BFloat16 => "bf16",
                    Kind::Half => "f16",
                    _ => "f32",
                };
                sizes.entry(name).or_insert((0, kind)).0 += entry.shape.iter().product::<i64>();
            }
        }
        sizes.into_values().max_by_key(|(size, _)| *size).map_or(Kind::Float, |(_, kind)| kind)
    }

    /// Digests of the weight files that fall to rank `rank` of `size`, as `name:digest` lines; all ranks' lines, sorted, are
    /// the identity of the model.
    pub fn digests(&self, rank: usize, size: usize) -> Result<Vec<String>, CheckpointError> {
        let mine = self.files.iter().skip(rank).step_by(size);
        mine.map(|file| {
            let mut hasher = blake3::Hasher::new();
            // read and not mapped: a file that is cut meanwhile is an error
            File::open(&file.path)
                .and_then(|open| hasher.update_reader(open).map(drop))
                .map_err(|source| CheckpointError::Read { path: file.path.clone(), source })?;
            let name = file.path.file_name().unwrap_or_default().to_string_lossy();
            Ok(format!("{name}:{}", hasher.finalize().to_hex()))
        })
        .collect()
    }

    fn add(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let read = |source| CheckpointError::Read { path: path.to_owned(), source };
        let malformed = |reason: String| CheckpointError::Malformed { path: path.to_owned(), reason };
        let file = File::open(path).map_err(read)?;
        let map = map_file(&file).map_err(read)?;
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| malformed(format!("is not a safetensors file: {error}")))?;
        let data = header_bytes + 8;
        let index = self.files.len();
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            if data + end > map.len() {
                let reason = format!("ends at byte {}, the file has {} bytes", data + end, map.len());
                return Err(CheckpointError::Tensor { path: path.to_owned(), name, reason });
            }
            let entry = Entry {
                file: index,
                dtype: info.dtype,
                shape: info.shape.iter().map(|&n| n as i64).collect(),
                offset: data + begin,
            };
            if let Some(other) = self.entries.insert(name.clone(), entry) {
                let first = self.files[other.file].path.display();
                return Err(malformed(format!("holds tensor {name}, which {first} holds too")));
            }
        }
        self.files.push(WeightFile { path: path.to_owned(), file });
        Ok(())
    }
}

/// Stored tensors that the model computes itself.
fn is_redundant(name: &str, table: &Table) -> bool {
    let tied_head = name == "lm_head.weight" && table.head == table.embedding;
    tied_head || name.ends_with("rotary_emb.inv_freq")
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| CheckpointError::Read { path: path.to_owned(), source })?;
    let malformed = |reason: String| CheckpointError::Malformed { path: path.to_owned(), reason };
    let index: Index = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    for file in index.weight_map.values() {
        // a name from a file must not lead out of the folder
        if file.contains(['/', '\\']) || file == ".." {
            return Err(malformed(format!("names the weight file {file:?}; expected a file name without a folder")));
        }
    }
    Ok(index.weight_map)
}

/// `model.safetensors`, or every safetensors file but adapters, sorted.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let read = |source| CheckpointError::Read { path: folder.to_owned(), source };
    let single = folder.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let mut files = Vec::new();
    let mut hint = "";
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") && !name.starts_with("adapter") {
            files.push(path);
        } else if name.ends_with(".bin") || name.ends_with(".pth") {
            hint = "; it has weights in PyTorch's pickle format: convert them with transformers' save_pretrained";
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(CheckpointError::NoWeights { folder: folder.to_owned(), hint: hint.to_owned() });
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of models whose tensors are no matrices, whole tensors are read as they are.
    #[test]
    fn tensors_of_any_number_of_dimensions_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let shapes: [&[i64]; 5] = [&[], &[3], &[4, 5], &[2, 3, 4], &[2, 1, 3, 2]];
        let tensors: Vec<(String, Tensor)> =
            shapes.iter().map(|shape| (format!("t{}", shape.len()), random(shape))).collect();
        Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
        let read = Folder::open(folder.path()).unwrap();
        for (name, tensor) in &tensors {
            assert!(read.tensor(name).unwrap().equal(tensor), "{name}");
        }
        let part = |name: &str, offset: &[i64], size: &[i64], shape: &[i64]| {
            let (offset, size, shape) = (offset.to_vec(), size.to_vec(), shape.to_vec());
            read.slice(&Piece { name: name.to_owned(), offset, size, shape, row: 0 })
        };
        let row = part("t2", &[1, 2], &[3, 2], &[4, 5]).unwrap();
        assert!(row.equal(&tensors[2].1.narrow(0, 1, 3).narrow(1, 2, 2)));
        assert!(part("t1", &[1], &[2], &[3]).unwrap().equal(&tensors[1].1.narrow(0, 1, 2)));
        let error = part("t3", &[1, 0, 0], &[1, 3, 4], &[2, 3, 4]).err().unwrap().to_string();
        assert!(error.contains("model.safetensors") && error.contains("t3"), "{error}");
    }
}
