//! A model that is only evaluated: weights without masters, gradients and optimizer.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use tch::{Device, Kind};

use super::RunError;
use super::inputs::{layout_of, model_digest};
use crate::checkpoint::Folder;
use crate::config::{Config, Precision};
use crate::dist::World;
use crate::eval::{Asked, ForwardOptions, ModelFacts};
use crate::model::sharding::Table;
use crate::model::{Decoder, LogitsPool, families};
use crate::telemetry::{Clock, Console};
use crate::train::Parameters;

/// This rank's part of it.
pub(super) struct Frozen {
    decoder: Decoder,
    parameters: Parameters,
    pub(super) facts: ModelFacts,
}

/// A model folder, or that of a run.
///
/// # Errors
/// A path that is neither.
pub(super) fn model_folder(key: &str, path: &Path) -> Result<PathBuf, RunError> {
    let candidates = [path.to_owned(), path.join("model")];
    let found = candidates.into_iter().find(|folder| folder.join("config.json").is_file());
    found.ok_or_else(|| {
        RunError::Refused(format!(
            "{key}: {} is no model folder (no config.json) and no run with a model (no model/config.json)",
            path.display()
        ))
    })
}

/// Digest of the model in a folder and what else is known of it. All ranks call it.
pub(super) fn facts(folder: &Path, config: &Config, world: &World) -> Result<ModelFacts, RunError> {
    let arch = families::read(folder)?;
    let digest = model_digest(&arch, Some(&Folder::open(folder)?), config.run.seed, world)?;
    let (family, parameters) = (arch.family.to_owned(), arch.num_parameters());
    Ok(ModelFacts { path: folder.to_owned(), digest, family, parameters })
}

impl Frozen {
    /// Reads a model folder in the precision of the configuration. All ranks call it.
    pub(super) fn load(
        facts: ModelFacts,
        config: &Config,
        world: &World,
        device: Device,
        console: &Console,
    ) -> Result<Self, RunError> {
        let arch = families::read(&facts.path)?;
        let (mesh, spread) = (world.mesh, config.parallel.sequence_parallel);
        let mut table = Table::new(&arch, mesh.tp, mesh.tp_rank(), spread)?;
        let folder = Folder::open(&facts.path)?;
        folder.check(&table)?;
        table.freeze(|_| false);
        let kind = match config.train.precision {
            Precision::Bf16 => Kind::BFloat16,
            Precision::F32 => Kind::Float,
        };
        let pieces: usize = table.params.iter().map(|param| param.pieces.len()).sum();
        let mut bar = console.progress("model", pieces as u64, "slices");
        let layout = layout_of(&table, config, world);
        let parameters = Parameters::new(&table, layout, kind, device, |_, piece| {
            bar.advance(1, "");
            folder.slice(piece)
        })?;
        let decoder = Decoder {
            arch,
            table,
            tp: Rc::clone(&world.tp),
            sequence_parallel: spread,
            device,
            clock: Clock::default(),
            logits: LogitsPool::default(),
        };
        Ok(Self { decoder, parameters, facts })
    }

    pub(super) fn asked<'a>(&'a self, world: &'a World, forward: ForwardOptions) -> Asked<'a> {
        Asked { decoder: &self.decoder, weights: &self.parameters.weights, world, forward }
    }
}
