//! One safetensors file, written as a stream and read by map.
//!
//! Format: 8 bytes header length (little endian), the header as JSON, then the tensors' bytes without gaps. Written under a
//! temporary name and renamed when complete, so that a file with the final name is whole.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::CheckpointError;
use super::stream::Stream;
use crate::abi::slices;
use crate::abi::storage::{map_file, map_tensor};

/// Name, kind and shape of a tensor to be written.
#[derive(Clone, Debug)]
pub struct Spec {
    pub name: String,
    pub kind: Kind,
    pub shape: Vec<i64>,
}

impl Spec {
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }
}

/// Writes tensors one after the other; needs the memory of none of them.
pub struct Writer {
    path: PathBuf,
    temporary: PathBuf,
    file: Stream,
    /// Bytes that the header promises and that are still to come.
    missing: usize,
    /// Everything before the tensors.
    head: Vec<u8>,
}

/// A file that is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub bytes: u64,
    /// BLAKE3 of all bytes, in hex.
    pub digest: String,
}

impl Writer {
    /// Starts a file with the given tensors, which must then be appended in this order.
    ///
    /// `metadata`: text for the header. Keys are written in the order given, so equal input makes equal bytes.
    pub fn create(path: &Path, specs: &[Spec], metadata: &[(&str, &str)]) -> Result<Self, CheckpointError> {
        let (head, missing) = head(specs, metadata);
        let temporary = path.with_extension("safetensors.partial");
        let write = |source| CheckpointError::Write { path: temporary.clone(), source };
        let mut file = Stream::new(File::create(&temporary).map_err(write)?, 0);
        file.append(&head).map_err(write)?;
        Ok(Self { path: path.to_owned(), temporary, file, missing, head })
    }

    /// Appends a contiguous tensor, or a part of one.
    pub fn append(&mut self, tensor: &Tensor) -> Result<(), CheckpointError> {
        self.append_bytes(slices::bytes(tensor))
    }

    pub fn append_bytes(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        assert!(bytes.len() <= self.missing, "invariant: not more bytes than the header says");
        self.missing -= bytes.len();
        self.file.append(bytes).map_err(|source| CheckpointError::Write { path: self.temporary.clone(), source })
    }

    /// The bytes of the file before the tensors.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Completes the file: everything on disk, under its final name.
    pub fn finish(self) -> Result<(), CheckpointError> {
        assert_eq!(self.missing, 0, "invariant: every byte that the header promises was appended");
        let write = |source| CheckpointError::Write { path: self.path.clone(), source };
        self.file.finish().and_then(|file| file.sync_all()).map_err(write)?;
        std::fs::rename(&self.temporary, &self.path).map_err(write)
    }
}

/// The name that a folder has while it is written.
pub(super) fn unfinished(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    target.with_file_name(name)
}

/// Puts every file of a finished folder on disk and gives it its name, which must not be taken by a folder with files.
pub(super) fn publish(partial: &Path, target: &Path) -> Result<(), CheckpointError> {
    let write = |path: &Path, source| CheckpointError::Write { path: path.to_owned(), source };
    for entry in std::fs::read_dir(partial).map_err(|e| write(partial, e))? {
        let path = entry.map_err(|e| write(partial, e))?.path();
        File::open(&path).and_then(|file| file.sync_all()).map_err(|e| write(&path, e))?;
    }
    sync(partial)?;
    std::fs::rename(partial, target).map_err(|e| write(target, e))?;
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
    sync(parent.unwrap_or(Path::new(".")))
}

/// Makes the names in a folder durable.
pub(super) fn sync(folder: &Path) -> Result<(), CheckpointError> {
    let write = |source| CheckpointError::Write { path: folder.to_owned(), source };
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(write)
}

/// The bytes of a file before its tensors, which then follow in this order without gaps, and how many bytes those have.
pub(super) fn head(specs: &[Spec], metadata: &[(&str, &str)]) -> (Vec<u8>, usize) {
    let mut header = Map::new();
    let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value)));
    header.insert("__metadata__".to_owned(), Value::Object(metadata.collect()));
    let mut offset = 0;
    for spec in specs {
        let end = offset + spec.bytes();
        let entry = json!({ "dtype": dtype(spec.kind), "shape": spec.shape, "data_offsets": [offset, end] });
        header.insert(spec.name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // tensors start at a multiple of 8
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    ([&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat(), offset)
}

/// A file of our own, open for reading.
pub struct Reader {
    path: PathBuf,
    file: File,
    map: Arc<Mmap>,
    data: usize,
    header: safetensors::tensor::Metadata,
}

impl Reader {
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let read = |source| CheckpointError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let map = Arc::new(map_file(&file).map_err(read)?);
        let malformed = |reason: String| CheckpointError::Malformed { path: path.to_owned(), reason };
        let (length, header) = SafeTensors::read_metadata(&map)
            .map_err(|error| malformed(format!("is not a safetensors file: {error}")))?;
        let end = header.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0);
        if length + 8 + end > map.len() {
            return Err(malformed(format!("has {} bytes, its header promises {}", map.len(), length + 8 + end)));
        }
        Ok(Self { path: path.to_owned(), file, map, data: length + 8, header })
    }

    /// A text of the header.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names and shapes of all tensors, by name.
    pub fn shapes(&self) -> Vec<(String, Vec<i64>)> {
        let shape = |info: &safetensors::tensor::TensorInfo| info.shape.iter().map(|&n| n as i64).collect();
        let mut all: Vec<_> = self.header.tensors().into_iter().map(|(name, info)| (name, shape(info))).collect();
        all.sort();
        all
    }

    /// Bytes of a stored tensor, and its type.
    ///
    /// # Errors
    /// A tensor that is not there.
    pub fn size(&self, name: &str) -> Result<(usize, safetensors::Dtype), CheckpointError> {
        let info = self.header.info(name).ok_or_else(|| self.refuse(name, "is missing"))?;
        Ok((info.data_offsets.1 - info.data_offsets.0, info.dtype))
    }

    /// Reads the bytes of a stored tensor from byte `at` on.
    pub fn read(&self, name: &str, at: usize, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        let info = self.header.info(name).ok_or_else(|| self.refuse(name, "is missing"))?;
        let (start, end) = info.data_offsets;
        assert!(at + bytes.len() <= end - start, "invariant: not beyond the tensor");
        let place = (self.data + start + at) as u64;
        self.file
            .read_exact_at(bytes, place)
            .map_err(|source| CheckpointError::Read { path: self.path.clone(), source })
    }

    /// Reads all bytes of a stored tensor.
    pub fn whole(&self, name: &str) -> Result<(Vec<u8>, safetensors::Dtype), CheckpointError> {
        let (len, dtype) = self.size(name)?;
        let mut bytes = vec![0; len];
        self.read(name, 0, &mut bytes)?;
        Ok((bytes, dtype))
    }

    fn refuse(&self, name: &str, reason: &str) -> CheckpointError {
        CheckpointError::Tensor { path: self.path.clone(), name: name.to_owned(), reason: reason.to_owned() }
    }

    /// A read-only tensor over the mapped bytes.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let refuse =
            |reason: String| CheckpointError::Tensor { path: self.path.clone(), name: name.to_owned(), reason };
        let info = self.header.info(name).ok_or_else(|| refuse("is missing".to_owned()))?;
        let kind =
            kind(info.dtype).ok_or_else(|| refuse(format!("has the type {:?}, which is not used here", info.dtype)))?;
        let shape: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
        let start = self.data + info.data_offsets.0;
        if !start.is_multiple_of(kind.elt_size_in_bytes()) {
            return Err(refuse(format!("starts at byte {start}, which is not a multiple of its element")));
        }
        Ok(map_tensor(&self.map, self.data + info.data_offsets.0, &shape, kind))
    }
}

fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "F32",
        Kind::BFloat16 => "BF16",
        Kind::Half => "F16",
        Kind::Uint8 => "U8",
        other => panic!("invariant: tensors are not stored as {other:?}"),
    }
}

pub(super) fn kind(dtype: safetensors::Dtype) -> Option<Kind> {
    match dtype {
        safetensors::Dtype::BF16 => Some(Kind::BFloat16),
        safetensors::Dtype::F16 => Some(Kind::Half),
        safetensors::Dtype::F32 => Some(Kind::Float),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn what_is_written_is_read_by_us_and_by_the_crate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let a = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let b = Tensor::arange(5, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let spec = |name: &str, t: &Tensor| Spec { name: name.into(), kind: t.kind(), shape: t.size() };
        let mut writer = Writer::create(&path, &[spec("a", &a), spec("b", &b)], &[("format", "pt")]).unwrap();
        writer.append(&a.narrow(0, 0, 1)).unwrap();
        writer.append(&a.narrow(0, 1, 1)).unwrap();
        writer.append(&b).unwrap();
        assert!(!path.exists());
        writer.finish().unwrap();

        let reader = Reader::open(&path).unwrap();
        assert_eq!(reader.metadata("format"), Some("pt"));
        assert!(reader.tensor("a").unwrap().equal(&a) && reader.tensor("b").unwrap().equal(&b));
        assert!(reader.tensor("c").unwrap_err().to_string().ends_with("tensor c is missing"));
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(SafeTensors::deserialize(&bytes).unwrap().tensor("a").unwrap().shape(), [2, 3]);
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(Reader::open(&path).is_err());
    }
}
