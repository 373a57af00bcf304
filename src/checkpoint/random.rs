//! Random weights as files, for models that exist only as a config.json.

use std::path::Path;

use tch::Kind;

use super::CheckpointError;
use super::tensor_file::{Spec, Writer};
use crate::model::sharding::Table;
use crate::model::{Architecture, init};

/// Writes `model.safetensors` with the weights that `model.init = "random"` would draw from `seed`, in f32, into a folder.
///
/// Needs the memory of the largest tensor.
pub fn write_random(folder: &Path, arch: &Architecture, seed: u64) -> Result<(), CheckpointError> {
    let table = Table::new(arch, 1, 0, false).expect("invariant: one rank can hold any model");
    let specs: Vec<Spec> = table
        .tensors()
        .into_iter()
        .map(|(name, shape)| Spec { name: name.to_owned(), kind: Kind::Float, shape: shape.to_vec() })
        .collect();
    let mut writer = Writer::create(&folder.join("model.safetensors"), &specs, &[("format", "pt")])?;
    // the pieces of a parameter lie in the order of the tensors, those of a fused tensor in the order of its rows
    for param in &table.params {
        for piece in &param.pieces {
            writer.append(&init::initial(param, piece, seed, arch.initializer_range))?;
        }
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Folder;
    use crate::model::architecture::Packing;
    use crate::model::sharding::tests::arch;

    #[test]
    fn the_file_holds_what_a_random_start_draws() {
        for packing in [Packing::Separate, Packing::Fused] {
            let folder = tempfile::tempdir().unwrap();
            let arch = arch(packing, true);
            write_random(folder.path(), &arch, 3).unwrap();
            let files = Folder::open(folder.path()).unwrap();
            let table = Table::new(&arch, 2, 1, false).unwrap();
            files.check(&table).unwrap();
            for param in &table.params {
                for piece in &param.pieces {
                    let drawn = init::initial(param, piece, 3, arch.initializer_range);
                    assert!(files.slice(piece).unwrap().equal(&drawn), "{}", piece.name);
                }
            }
        }
    }
}
