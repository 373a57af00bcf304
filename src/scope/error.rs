//! Why a choice of parameters is refused.

use std::path::PathBuf;

use thiserror::Error;

use crate::checkpoint::CheckpointError;
use crate::model::ModelError;
use crate::train::NonFinite;

/// What is wrong with `[scope]` or `[before]`, given this model and data.
#[derive(Debug, Error)]
pub enum ScopeError {
    #[error("{key}: {pattern:?} matches no tensor of the model; names are like {example:?}")]
    NoTensor { key: &'static str, pattern: String, example: String },
    #[error("scope.layers: {layer} is no layer of the model, whose layers are 0 to {last}")]
    NoLayer { layer: usize, last: usize },
    #[error("scope.lora.targets: the model has no {target:?}; its matrices are {known}")]
    NoModule { target: String, known: String },
    #[error("nothing would be trained: no tensor of the model satisfies all of {0}")]
    Nothing(String),
    #[error("{path}: tensor {name}: {reason}")]
    Mask { path: PathBuf, name: String, reason: String },
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("scope.mask.score: {0}")]
    Score(String),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    NonFinite(#[from] NonFinite),
}
