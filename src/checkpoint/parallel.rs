//! A Hugging Face folder that all ranks write at once: every tensor has one owner, which writes it at its place in its file.
//!
//! Names, places and files are fixed before anything is computed, so the bytes do not depend on the number of ranks. The index
//! comes last, and the folder has its final name only when everything is on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::CheckpointError;
use super::export::{ExportOptions, copy_companions, file_name, split, write_index};
use super::stream::Stream;
use super::tensor_file::{Spec, head, publish, unfinished};
use crate::abi::slices;
use crate::dist::World;

/// What to write and where.
pub struct Destination<'a> {
    pub target: &'a Path,
    /// The model folder whose configuration and tokenizer are copied, and the kind that its config.json then names; None for tensors
    /// that are no model.
    pub model: Option<(&'a Path, Kind)>,
    /// Largest file. Unit: bytes.
    pub max_shard_bytes: usize,
    /// Text for the header of every file.
    pub metadata: &'a [(&'a str, &'a str)],
}

/// The rank that owns each thing, by its size: the largest first, each to the rank that has least so far.
pub fn owners(sizes: &[usize], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(sizes[index]), index));
    let mut load = vec![0usize; ranks];
    let mut owner = vec![0; sizes.len()];
    for index in order {
        let rank = (0..ranks).min_by_key(|&rank| (load[rank], rank)).expect("invariant: there is a rank");
        owner[index] = rank;
        load[rank] += sizes[index];
    }
    owner
}

/// Writes the folder. All ranks call it with the same `specs`.
///
/// `tensor(index)`: the values of `specs[index]`, in its kind and shape; called on its owner alone ([`owners`] by bytes), one at a
/// time, and must not use collectives.
///
/// # Errors
/// On all ranks when one of them could not; the others say which words that one had.
pub fn write_parallel<E: From<CheckpointError> + std::fmt::Display>(
    to: &Destination,
    specs: &[Spec],
    world: &World,
    mut tensor: impl FnMut(usize) -> Result<Tensor, E>,
) -> Result<(), E> {
    let cuts = split(specs, to.max_shard_bytes);
    let sizes: Vec<usize> = specs.iter().map(Spec::bytes).collect();
    let owner = owners(&sizes, world.mesh.world());
    let partial = unfinished(to.target);
    let heads: Vec<(Vec<u8>, usize)> = cuts.iter().map(|range| head(&specs[range.clone()], to.metadata)).collect();
    let path = |file: usize| partial.join(file_name(file, cuts.len()));
    let made = if world.is_first() { make(&partial, &heads, path) } else { Ok(()) };
    agree(world, &partial, made.map_err(E::from))?;
    let mut mine = || -> Result<(), E> {
        let mut touched = BTreeSet::new();
        for (file, range) in cuts.iter().enumerate() {
            let mut at = heads[file].0.len() as u64;
            for index in range.clone() {
                if owner[index] == world.mesh.rank {
                    let values = tensor(index)?;
                    let spec = &specs[index];
                    assert!(
                        values.kind() == spec.kind && values.size() == spec.shape,
                        "invariant: {} as promised",
                        spec.name
                    );
                    write_at(&path(file), at, slices::bytes(&values.contiguous()))?;
                    touched.insert(file);
                }
                at += sizes[index] as u64;
            }
        }
        for file in touched {
            let synced = File::options().write(true).open(path(file)).and_then(|file| file.sync_all());
            synced.map_err(|source| CheckpointError::Write { path: path(file), source })?;
        }
        Ok(())
    };
    agree(world, &partial, mine())?;
    let closed = if world.is_first() { close(to, &partial, specs, &cuts) } else { Ok(()) };
    agree(world, &partial, closed.map_err(E::from))
}

/// The folder with files of their final sizes.
fn make(partial: &Path, heads: &[(Vec<u8>, usize)], path: impl Fn(usize) -> PathBuf) -> Result<(), CheckpointError> {
    let write = |source| CheckpointError::Write { path: partial.to_owned(), source };
    if partial.exists() {
        std::fs::remove_dir_all(partial).map_err(write)?;
    }
    std::fs::create_dir_all(partial).map_err(write)?;
    for (file, (head, bytes)) in heads.iter().enumerate() {
        let made = File::create_new(path(file)).and_then(|made| {
            made.set_len((head.len() + bytes) as u64)?;
            made.write_all_at(head, 0)?;
            made.sync_all()
        });
        made.map_err(|source| CheckpointError::Write { path: path(file), source })?;
    }
    Ok(())
}

fn write_at(path: &Path, at: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
    let written = File::options().write(true).open(path).and_then(|file| {
        let mut stream = Stream::new(file, at);
        stream.append(bytes)?;
        stream.finish()
    });
    written.map(drop).map_err(|source| CheckpointError::Write { path: path.to_owned(), source })
}

fn close(
    to: &Destination,
    partial: &Path,
    specs: &[Spec],
    cuts: &[std::ops::Range<usize>],
) -> Result<(), CheckpointError> {
    if cuts.len() > 1 {
        let names = cuts.iter().enumerate().flat_map(|(file, range)| {
            specs[range.clone()].iter().map(move |spec| (spec.name.clone(), file_name(file, cuts.len())))
        });
        write_index(partial, specs, &names.collect::<BTreeMap<_, _>>())?;
    }
    if let Some((source, kind)) = to.model {
        let options = ExportOptions { source, target: to.target, kind, max_shard_bytes: to.max_shard_bytes };
        copy_companions(&options, partial)?;
    }
    publish(partial, to.target)
}

/// Lets all ranks know of one's failure, and waits for all. All ranks call it.
pub(super) fn agree<E: From<CheckpointError> + std::fmt::Display>(
    world: &World,
    path: &Path,
    done: Result<(), E>,
) -> Result<(), E> {
    let words = done.as_ref().map_or_else(ToString::to_string, |()| String::new());
    let all = world.world.gather_bytes(words.as_bytes());
    done?;
    match all.iter().enumerate().find(|(_, words)| !words.is_empty()) {
        Some((rank, words)) => {
            let reason = format!("rank {rank} failed: {}", String::from_utf8_lossy(words));
            Err(CheckpointError::Malformed { path: path.to_owned(), reason }.into())
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::checkpoint::Folder;
    use crate::dist::run_threads;

    #[test]
    fn owners_have_about_the_same() {
        assert_eq!(owners(&[5, 1, 9, 5, 4], 2), [1, 1, 0, 1, 0]);
        assert_eq!(owners(&[1, 1], 4), [0, 1]);
        assert!(owners(&[], 3).is_empty());
    }

    fn specs() -> Vec<Spec> {
        let spec = |name: &str, kind, shape: &[i64]| Spec { name: name.to_owned(), kind, shape: shape.to_vec() };
        vec![
            spec("b.weight", Kind::Float, &[3, 5]),
            spec("a.weight", Kind::BFloat16, &[7]),
            spec("c.weight", Kind::Float, &[11, 2]),
            spec("d.weight", Kind::Half, &[1]),
        ]
    }

    fn values(specs: &[Spec], index: usize) -> Tensor {
        let count: i64 = specs[index].shape.iter().product();
        let values = Tensor::arange(count, (Kind::Float, Device::Cpu)) + index as f64;
        values.view(specs[index].shape.as_slice()).to_kind(specs[index].kind)
    }

    #[test]
    fn the_bytes_do_not_depend_on_the_ranks() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = None;
        for ranks in [1, 2, 4] {
            let target = folder.path().join(format!("{ranks}"));
            run_threads(1, ranks, |world| {
                let to = Destination { target: &target, model: None, max_shard_bytes: 80, metadata: &[("k", "v")] };
                let specs = specs();
                write_parallel::<CheckpointError>(&to, &specs, &world, |index| Ok(values(&specs, index))).unwrap();
            });
            let mut files: Vec<_> = std::fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().path()).collect();
            files.sort();
            let bytes: Vec<_> =
                files.iter().map(|path| (path.file_name().unwrap().to_owned(), std::fs::read(path).unwrap())).collect();
            assert_eq!(bytes.len(), 4, "three weight files and an index");
            assert!(*first.get_or_insert(bytes.clone()) == bytes, "{ranks} ranks write other bytes");
            let read = Folder::open(&target).unwrap();
            for (index, spec) in specs().iter().enumerate() {
                assert!(read.tensor(&spec.name).unwrap().equal(&values(&specs(), index)));
            }
        }
    }

    #[test]
    fn one_ranks_failure_is_everybodys() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let said = run_threads(1, 2, |world| {
            let to = Destination { target: &target, model: None, max_shard_bytes: 1 << 20, metadata: &[] };
            let specs = specs();
            let done = write_parallel::<CheckpointError>(&to, &specs, &world, |index| match index {
                2 => Err(CheckpointError::Malformed { path: "q".into(), reason: "is odd".into() }),
                _ => Ok(values(&specs, index)),
            });
            done.unwrap_err().to_string()
        });
        assert!(said.iter().all(|words| words.contains("q: is odd")), "{said:?}");
        assert!(!target.exists());
    }
}
