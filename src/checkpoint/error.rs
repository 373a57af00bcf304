//! What can be wrong with weight files.

use std::path::PathBuf;

use thiserror::Error;

/// Why weights could not be read or written. Messages name file and tensor.
#[derive(Debug, Error)]
pub enum CheckpointError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error(
        "{folder} has no weights: expected model.safetensors, model.safetensors.index.json or other *.safetensors files{hint}"
    )]
    NoWeights { folder: PathBuf, hint: String },
    #[error("{path}: {reason}")]
    Malformed { path: PathBuf, reason: String },
    #[error("{path}: tensor {name} {reason}")]
    Tensor { path: PathBuf, name: String, reason: String },
    #[error("the weights in {folder} do not fit its config.json:{list}")]
    Mismatch { folder: PathBuf, list: String },
}
