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
use super::stream::{Run, groups, join};
use super::tensor_file::{Reader, Spec, Writer, Written};
use crate::abi::slices::{Bf16, bytes, number_bytes_mut, slice};

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

/// One slice of a rank's state.
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

/// Where what was stored goes.
pub enum Target<'a> {
    /// As numbers, whatever the files have.
    Numbers(&'a mut [f32]),
    /// Codes and the scales of their blocks as they are, which [`StateFiles::same_blocks`] has allowed. `scales` begins as NaN. `mixed`:
    /// one block got codes of two scales, and what is there means nothing.
    Codes { codes: &'a mut [u8], scales: &'a mut [f32], mixed: &'a mut bool },
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
                let (bytes, dtype) = reader.size(&key)?;
                let width = width(dtype).ok_or_else(|| refuse(format!("is stored as {dtype:?}")))?;
                // `check` has seen that the run lies in its box, not that memory could hold it
                if Some(bytes as i64) != place.len.checked_mul(width) || (dtype == Dtype::U8) != scales.is_some() {
                    return Err(refuse(format!("has {bytes} bytes for {} elements of {dtype:?}", place.len)));
                }
                if let Some((name, phase)) = &scales {
                    let blocks = (phase % BLOCK + place.len as usize).div_ceil(BLOCK);
                    let (bytes, dtype) = reader.size(name)?;
                    if *phase >= BLOCK || dtype != Dtype::F32 || bytes != 4 * blocks {
                        return Err(refuse(format!("has {bytes} bytes of scales for {blocks} blocks")));
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

    /// Fills the elements of `place`, which lie at `at` in the target. Reads what is needed of each file from front to back.
    ///
    /// # Errors
    /// Elements that no file has.
    pub fn fill(&self, what: What, place: &Place, at: usize, target: &mut Target) -> Result<(), CheckpointError> {
        let mut found = 0;
        for stored in self.stored(what, &place.tensor) {
            if stored.place.shape != place.shape {
                return Err(
                    self.refuse(stored, format!("has the shape {:?}, the model {:?}", stored.place.shape, place.shape))
                );
            }
            let mut runs = Vec::new();
            found += overlap(&stored.place, place, |from, to, len| join(&mut runs, Run { from, to: at + to, len }));
            self.read(stored, what, &runs, target)?;
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

    fn stored(&self, what: What, tensor: &str) -> &[Stored] {
        self.entries.get(&(what, tensor.to_owned())).map_or(&[], Vec::as_slice)
    }

    fn read(&self, stored: &Stored, what: What, runs: &[Run], target: &mut Target) -> Result<(), CheckpointError> {
        if runs.is_empty() {
            return Ok(());
        }
        let file = &self.files[stored.file];
        let (_, dtype) = file.size(&stored.key)?;
        let width = width(dtype).expect("invariant: `open` has checked the types") as usize;
        let blocks = stored.scales.as_ref().map(|(name, phase)| {
            let mut scales = vec![0f32; file.size(name)?.0 / 4];
            file.read(name, 0, number_bytes_mut(&mut scales))?;
            Ok::<_, CheckpointError>((scales, *phase))
        });
        let blocks = blocks.transpose()?;
        let mut buffer = Vec::new();
        for group in groups(runs, width) {
            let first = group[0].from;
            if let (Target::Numbers(numbers), [run], Dtype::F32) = (&mut *target, group.as_slice(), dtype) {
                // straight to where it belongs
                file.read(&stored.key, width * first, number_bytes_mut(&mut numbers[run.to..run.to + run.len]))?;
                continue;
            }
            let end = group.last().map_or(first, |run| run.from + run.len);
            buffer.resize(width * (end - first), 0);
            file.read(&stored.key, width * first, &mut buffer)?;
            for run in group {
                let bytes = &buffer[width * (run.from - first)..width * (run.from - first + run.len)];
                match (&mut *target, &blocks) {
                    (Target::Numbers(numbers), None) => {
                        numbers_of(dtype, bytes, &mut numbers[run.to..run.to + run.len])
                    }
                    (Target::Numbers(numbers), Some((scales, phase))) => {
                        let book = if what == What::Second { Codes::Unsigned } else { Codes::Signed };
                        for (i, (number, byte)) in numbers[run.to..run.to + run.len].iter_mut().zip(bytes).enumerate() {
                            *number = code(book, *byte) * scales[(phase + run.from + i) / BLOCK];
                        }
                    }
                    (Target::Codes { codes, scales: to, mixed }, Some((scales, phase))) => {
                        codes[run.to..run.to + run.len].copy_from_slice(bytes);
                        let (from, first) = ((phase + run.from) / BLOCK, run.to / BLOCK);
                        let touched = (run.to + run.len).div_ceil(BLOCK) - first;
                        for (to, from) in to[first..first + touched].iter_mut().zip(&scales[from..from + touched]) {
                            **mixed |= !to.is_nan() && to.to_bits() != from.to_bits();
                            *to = *from;
                        }
                    }
                    (Target::Codes { .. }, None) => unreachable!("invariant: asked for with `same_blocks`"),
                }
            }
        }
        Ok(())
    }

    /// Whether all that the files have of `place` are codes whose blocks begin where those of the target do, `place` lying at `at` there.
    pub fn same_blocks(&self, what: What, place: &Place, at: usize) -> bool {
        self.stored(what, &place.tensor).iter().all(|stored| {
            let phase = stored.scales.as_ref().map(|(_, phase)| *phase);
            let mut same = true;
            overlap(&stored.place, place, |from, to, _| {
                same &= phase.is_some_and(|phase| (phase + from) % BLOCK == (at + to) % BLOCK);
            });
            same
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
        self.fill(What::Weights, &place, 0, &mut Target::Numbers(numbers))?;
        Ok(tensor.view(shape))
    }

    fn refuse(&self, stored: &Stored, reason: String) -> CheckpointError {
        let path = self.files[stored.file].path().to_owned();
        CheckpointError::Tensor { path, name: stored.place.tensor.clone(), reason }
    }
}

use crate::kernels::moment::{BLOCK, Codes, code};

/// Stored numbers as f32.
fn numbers_of(dtype: Dtype, bytes: &[u8], numbers: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *number = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::BF16 => {
            for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *number = Bf16(u16::from_le_bytes(*bytes)).to_f32();
            }
        }
        _ => unreachable!("invariant: `open` has checked the types"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::slices::slice_mut;

    /// Two tensors that shared no block and now share one: their codes cannot both keep their scale, and that is told.
    #[test]
    fn a_block_of_two_scales_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rank_00000.safetensors");
        let len = BLOCK as i64 + 128;
        let place = |tensor: &str, start: i64, len: i64| Place {
            tensor: tensor.into(),
            shape: vec![2 * BLOCK as i64],
            offset: vec![0],
            size: vec![2 * BLOCK as i64],
            start,
            len,
        };
        let coded = |tensor: &str, start, len, phase, scales: &[f32]| StateSlice {
            what: What::First,
            place: place(tensor, start, len),
            values: Tensor::ones([len], (Kind::Uint8, tch::Device::Cpu)),
            blocks: Some(Blocks { scales: Tensor::from_slice(scales), phase }),
        };
        write(&path, &[coded("a", 0, len, 0, &[1.0, 2.0]), coded("b", 0, 128, 128, &[3.0])]).unwrap();
        let files = StateFiles::open([path.as_path()]).unwrap();
        let (a, b) = (place("a", 0, len), place("b", 0, 128));
        assert!(files.same_blocks(What::First, &a, 0) && files.same_blocks(What::First, &b, len as usize));
        let mut codes = Tensor::zeros([2 * BLOCK as i64], (Kind::Uint8, tch::Device::Cpu));
        let mut scales = Tensor::full([2], f64::NAN, (Kind::Float, tch::Device::Cpu));
        let mut mixed = false;
        let (codes, scales) = (slice_mut::<u8>(&mut codes), slice_mut::<f32>(&mut scales));
        let mut target = Target::Codes { codes, scales, mixed: &mut mixed };
        files.fill(What::First, &a, 0, &mut target).unwrap();
        files.fill(What::First, &b, len as usize, &mut target).unwrap();
        assert!(mixed);
    }
}
