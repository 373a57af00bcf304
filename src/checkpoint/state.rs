//! The state of a run in files: one safetensors file a rank, each tensor a [`Place`] of a weight or of what an optimizer remembers
//! of it.
//!
//! A header's `slices` says for each stored tensor what it is and where it belongs. 8-bit moments are stored as they are: codes,
//! and the scales of the blocks that the run touches.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::CheckpointError;
use super::slices::{Place, overlap};
use super::tensor_file::{Reader, Spec, Writer, Written};
use crate::abi::slices::{Bf16, bytes, slice};

/// What a number is to the weight whose place it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// The f32 master weight.
    Weights,
    /// AdamW's mean of gradients.
    First,
    /// AdamW's mean of their squares.
    Second,
    /// SGD's momentum.
    Velocity,
    /// The scale of each element's block of codes, for moments of chosen weights: their blocks are cut among the chosen, so the blocks
    /// of [`Blocks`] cannot say it.
    FirstScale,
    SecondScale,
}

impl What {
    /// Of a moment's scales.
    pub fn scale(self) -> Option<Self> {
        match self {
            Self::First => Some(Self::FirstScale),
            Self::Second => Some(Self::SecondScale),
            _ => None,
        }
    }
}

/// One slice of a rank's state, on the host.
pub struct StateSlice {
    pub what: What,
    pub place: Place,
    /// `[len]` f32, bf16, or u8 codes.
    pub values: Tensor,
    pub blocks: Option<Blocks>,
}

impl StateSlice {
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        size(&self.values) + self.blocks.as_ref().map_or(0, |blocks| size(&blocks.scales))
    }
}

/// Scales of 8-bit codes.
pub struct Blocks {
    /// `[blocks]` f32: of every block that the slice touches.
    pub scales: Tensor,
    /// Elements of the first block that lie before the slice.
    pub phase: usize,
}

/// A stored tensor as the header describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    key: String,
    what: What,
    #[serde(flatten)]
    place: FlatPlace,
    /// Key of the scales and the slice's place in its first block, for codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scales: Option<(String, usize)>,
}

/// [`Place`] without `deny_unknown_fields`, which serde cannot flatten.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct FlatPlace {
    tensor: String,
    shape: Vec<i64>,
    offset: Vec<i64>,
    size: Vec<i64>,
    start: i64,
    len: i64,
}

impl FlatPlace {
    fn place(&self) -> Place {
        let Self { tensor, shape, offset, size, start, len } = self.clone();
        Place { tensor, shape, offset, size, start, len }
    }

    fn of(place: &Place) -> Self {
        let Place { tensor, shape, offset, size, start, len } = place.clone();
        Self { tensor, shape, offset, size, start, len }
    }
}

/// Writes one rank's slices. Needs no memory but theirs.
pub fn write(path: &Path, slices: &[StateSlice]) -> Result<Written, CheckpointError> {
    let (mut specs, mut entries) = (Vec::new(), Vec::new());
    for (index, slice) in slices.iter().enumerate() {
        let what = serde_json::to_value(slice.what).expect("invariant: a word");
        let key = format!("{}/{}@{index}", what.as_str().unwrap_or_default(), slice.place.tensor);
        specs.push(Spec { name: key.clone(), kind: slice.values.kind(), shape: slice.values.size() });
        let scales = slice.blocks.as_ref().map(|blocks| {
            let name = format!("{key}.scales");
            specs.push(Spec { name: name.clone(), kind: Kind::Float, shape: blocks.scales.size() });
            (name, blocks.phase)
        });
        entries.push(Entry { key, what: slice.what, place: FlatPlace::of(&slice.place), scales });
    }
    let described = serde_json::to_string(&entries).expect("invariant: entries are JSON");
    let mut writer = Writer::create(path, &specs, &[("format", FORMAT), ("slices", &described)])?;
    let parts = || slices.iter().flat_map(|slice| [Some(&slice.values), slice.blocks.as_ref().map(|b| &b.scales)]);
    let parts: Vec<&[u8]> = parts().flatten().map(bytes).collect();
    let head = writer.head().to_vec();
    // the digest beside the disk: neither waits for the other
    let digest = std::thread::scope(|scope| {
        let digest = scope.spawn(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&head);
            parts.iter().for_each(|part| _ = hasher.update(part));
            hasher.finalize().to_hex().to_string()
        });
        parts.iter().try_for_each(|part| writer.append_bytes(part))?;
        writer.finish()?;
        Ok::<_, CheckpointError>(digest.join().expect("invariant: hashing does not panic"))
    })?;
    let size = head.len() + parts.iter().map(|part| part.len()).sum::<usize>();
    Ok(Written { bytes: size as u64, digest })
}

/// Says what the header of a state file means; another number is another meaning.
const FORMAT: &str = "dunlearn-state-1";

/// All slices of a checkpoint, by what and tensor.
pub struct StateFiles {
    files: Vec<Reader>,
    entries: BTreeMap<(What, String), Vec<Stored>>,
}

struct Stored {
    file: usize,
    key: String,
    place: Place,
    scales: Option<(String, usize)>,
}

/// Where restored numbers go: a run of a moment whose blocks, if it has any, are counted from the start of `numbers`.
pub struct Target<'a> {
    pub numbers: &'a mut [f32],
    /// Codes and scales as they were stored, filled as long as the blocks are the same.
    pub codes: &'a mut [u8],
    pub scales: &'a mut [f32],
    /// Whether codes and scales are complete and exact.
    pub exact: bool,
}

impl StateFiles {
    /// Opens the files and checks what their headers say.
    pub fn open<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Self, CheckpointError> {
        let (mut files, mut entries) = (Vec::new(), BTreeMap::<(What, String), Vec<Stored>>::new());
        for path in paths {
            let reader = Reader::open(path)?;
            let malformed = |reason: String| CheckpointError::Malformed { path: path.to_owned(), reason };
            if reader.metadata("format") != Some(FORMAT) {
                return Err(malformed(format!("is not a file of a checkpoint: format is not {FORMAT:?}")));
            }
            let described = reader.metadata("slices").unwrap_or_default();
            let list: Vec<Entry> = serde_json::from_str(described)
                .map_err(|error| malformed(format!("its header's list of slices: {error}")))?;
            for Entry { key, what, place, scales } in list {
                let place = place.place();
                if let Some(reason) = place.check() {
                    return Err(malformed(reason));
                }
                let refuse =
                    |reason: String| CheckpointError::Tensor { path: path.to_owned(), name: key.clone(), reason };
                let (bytes, dtype) = reader.bytes(&key)?;
                let width = width(dtype).ok_or_else(|| refuse(format!("is stored as {dtype:?}")))?;
                // `check` has seen that the run lies in its box, not that memory could hold it
                if Some(bytes.len() as i64) != place.len.checked_mul(width) || (dtype == Dtype::U8) != scales.is_some()
                {
                    return Err(refuse(format!("has {} bytes for {} elements of {dtype:?}", bytes.len(), place.len)));
                }
                if let Some((name, phase)) = &scales {
                    let blocks = (phase % BLOCK + place.len as usize).div_ceil(BLOCK);
                    let (bytes, dtype) = reader.bytes(name)?;
                    if *phase >= BLOCK || dtype != Dtype::F32 || bytes.len() != 4 * blocks {
                        return Err(refuse(format!("has {} bytes of scales for {blocks} blocks", bytes.len())));
                    }
                }
                let stored = Stored { file: files.len(), key, place, scales };
                entries.entry((what, stored.place.tensor.clone())).or_default().push(stored);
            }
            files.push(reader);
        }
        Ok(Self { files, entries })
    }

    /// Tensors that have weights, with their shapes, by name.
    pub fn tensors(&self) -> BTreeMap<&str, &[i64]> {
        let weights = self.entries.iter().filter(|((what, _), _)| *what == What::Weights);
        weights
            .filter_map(|((_, name), stored)| Some((name.as_str(), stored.first()?.place.shape.as_slice())))
            .collect()
    }

    /// Kinds of state that are there.
    pub fn whats(&self) -> Vec<What> {
        let mut whats: Vec<What> = self.entries.keys().map(|(what, _)| *what).collect();
        whats.dedup();
        whats
    }

    /// Every tensor of every kind is there once: the slices' elements add up to it and none is there twice.
    pub fn check_coverage(&self) -> Result<(), CheckpointError> {
        for ((what, name), stored) in &self.entries {
            let shape = &stored[0].place.shape;
            let path = self.files[stored[0].file].path().to_owned();
            let refuse = |reason: String| {
                let name = format!("{name} ({what:?})");
                Err(CheckpointError::Tensor { path: path.clone(), name, reason })
            };
            if let Some(other) = stored.iter().find(|other| other.place.shape != *shape) {
                return refuse(format!("has the shapes {shape:?} and {:?}", other.place.shape));
            }
            let mut stretches: Vec<_> = stored.iter().flat_map(|stored| stored.place.stretches()).collect();
            stretches.sort_unstable();
            let twice = stretches
                .windows(2)
                .find(|pair| pair[0].row == pair[1].row && pair[0].column + pair[0].len > pair[1].column);
            if let Some(pair) = twice {
                return refuse(format!("has row {} column {} twice", pair[1].row, pair[1].column));
            }
            let found: i64 = stretches.iter().map(|stretch| stretch.len).sum();
            let all: i64 = shape.iter().product();
            if found != all {
                return refuse(format!("has {found} of its {all} elements"));
            }
        }
        Ok(())
    }

    /// Fills the elements of `place`, which lie at `at` in the target.
    ///
    /// # Errors
    /// Elements that no file has.
    pub fn fill(&self, what: What, place: &Place, at: usize, target: &mut Target) -> Result<(), CheckpointError> {
        let none = Vec::new();
        let stored = self.entries.get(&(what, place.tensor.clone())).unwrap_or(&none);
        let mut found = 0;
        for stored in stored {
            if stored.place.shape != place.shape {
                return Err(
                    self.refuse(stored, format!("has the shape {:?}, the model {:?}", stored.place.shape, place.shape))
                );
            }
            let file = &self.files[stored.file];
            let (bytes, dtype) = file.bytes(&stored.key)?;
            let scales = stored.scales.as_ref().map(|(name, phase)| Ok((file.bytes(name)?.0, *phase))).transpose()?;
            let taken = overlap(&stored.place, place, |from, to, n| {
                put(target, at + to, bytes, dtype, scales, what, from..from + n);
            });
            if taken > 0 {
                // a mapped file counts as memory
                file.release(&stored.key);
            }
            found += taken;
        }
        if found == place.len {
            return Ok(());
        }
        let path = self.files.first().map(|file| file.path().with_file_name("")).unwrap_or_default();
        let name = format!("{} ({what:?})", place.tensor);
        Err(CheckpointError::Tensor {
            path,
            name,
            reason: format!("lacks {} of {} elements", place.len - found, place.len),
        })
    }

    /// A whole tensor's weights, f32.
    pub fn weights(&self, name: &str, shape: &[i64]) -> Result<Tensor, CheckpointError> {
        let len: i64 = shape.iter().product();
        let place = Place {
            tensor: name.to_owned(),
            shape: shape.to_vec(),
            offset: vec![0; shape.len()],
            size: shape.to_vec(),
            start: 0,
            len,
        };
        let mut tensor = Tensor::empty([len], (Kind::Float, tch::Device::Cpu));
        let numbers = crate::abi::slices::slice_mut::<f32>(&mut tensor);
        self.fill(What::Weights, &place, 0, &mut Target { numbers, codes: &mut [], scales: &mut [], exact: false })?;
        Ok(tensor.view(shape))
    }

    fn refuse(&self, stored: &Stored, reason: String) -> CheckpointError {
        let path = self.files[stored.file].path().to_owned();
        CheckpointError::Tensor { path, name: stored.place.tensor.clone(), reason }
    }
}

use crate::kernels::moment::{BLOCK, Codes, code};

/// Copies stored elements `range` to `at` of the target: as numbers and, where both sides cut the same blocks, as codes.
fn put(
    target: &mut Target,
    at: usize,
    bytes: &[u8],
    dtype: Dtype,
    scales: Option<(&[u8], usize)>,
    what: What,
    range: std::ops::Range<usize>,
) {
    let numbers = &mut target.numbers[at..at + range.len()];
    match (dtype, scales) {
        (Dtype::F32, _) => {
            for (number, bytes) in numbers.iter_mut().zip(bytes[4 * range.start..4 * range.end].as_chunks::<4>().0) {
                *number = f32::from_le_bytes(*bytes);
            }
        }
        (Dtype::BF16, _) => {
            for (number, bytes) in numbers.iter_mut().zip(bytes[2 * range.start..2 * range.end].as_chunks::<2>().0) {
                *number = Bf16(u16::from_le_bytes(*bytes)).to_f32();
            }
        }
        (_, Some((scales, phase))) => {
            let book = if what == What::Second { Codes::Unsigned } else { Codes::Signed };
            let scale = |block: usize| {
                f32::from_le_bytes(scales[4 * block..4 * block + 4].try_into().expect("invariant: four bytes"))
            };
            let same_cut = (phase + range.start) % BLOCK == at % BLOCK && !target.codes.is_empty();
            target.exact &= same_cut;
            for (i, number) in numbers.iter_mut().enumerate() {
                let (from, to) = (range.start + i, at + i);
                let scale = scale((phase + from) / BLOCK);
                *number = code(book, bytes[from]) * scale;
                if same_cut {
                    target.codes[to] = bytes[from];
                    target.scales[to / BLOCK] = scale;
                }
            }
        }
        _ => unreachable!("invariant: `open` has checked the types"),
    }
    if dtype != Dtype::U8 {
        target.exact = false;
    }
}

fn width(dtype: Dtype) -> Option<i64> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::BF16 => Some(2),
        Dtype::U8 => Some(1),
        _ => None,
    }
}

/// The elements of a tensor on the host as f32, for comparing.
pub fn numbers(tensor: &Tensor) -> Vec<f32> {
    slice::<f32>(&tensor.to_kind(Kind::Float).contiguous()).to_vec()
}
