//! Everything that can end a run.

use std::path::PathBuf;

use thiserror::Error;

use crate::checkpoint::CheckpointError;
use crate::data::DataError;
use crate::model::ModelError;
use crate::scope::ScopeError;
use crate::train::NonFinite;
use crate::weights::WeightsError;

/// Why a run ended. The message is complete; `cli` adds nothing but the rank.
#[derive(Debug, Error)]
pub enum RunError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Scope(#[from] ScopeError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    NonFinite(#[from] NonFinite),
    #[error("{0}")]
    Refused(String),
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("cannot write metrics.jsonl in the run folder: {0}")]
    Metrics(#[from] std::io::Error),
}
