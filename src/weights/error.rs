//! What can be wrong with weights that are to be combined.

use std::path::PathBuf;

use thiserror::Error;

use crate::checkpoint::CheckpointError;

/// Why weights could not be combined. Messages name the tensor and the files.
#[derive(Debug, Error)]
pub enum WeightsError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(
        "{folder}: tensor {name} is missing, which {other} has; expected folders of one model: {hint}",
        hint = "the same names and shapes"
    )]
    Missing { folder: PathBuf, name: String, other: PathBuf },
    #[error("tensor {name} is {found:?} in {path} and {expected:?} in {other}; expected folders of one model")]
    Shape { name: String, path: PathBuf, found: Vec<i64>, other: PathBuf, expected: Vec<i64> },
    #[error("tensor {name} in {path} holds numbers that are not finite; expected finite weights")]
    NotFinite { name: String, path: PathBuf },
    #[error("tensor {name}: the result does not fit into {kind}; lower the strength or write f32")]
    Overflow { name: String, kind: &'static str },
    #[error("{pattern:?} matches no tensor in {folder}; names are like {example:?}")]
    NoMatch { pattern: String, folder: PathBuf, example: String },
    #[error("tensor {name} in {path} has {dims} dimensions; a subspace needs matrices")]
    NotAMatrix { name: String, path: PathBuf, dims: usize },
    #[error("{0}")]
    Refused(String),
}
