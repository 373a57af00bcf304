//! What can be wrong with an evaluation: its settings, its data, or results that do not belong together.

use std::io;
use std::path::PathBuf;

use crate::data::DataError;

/// An error of the evaluation room.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },

    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },

    /// A file of results that is not what this version writes; `place` is a file, or a file and line.
    #[error("{place}: {reason}")]
    Format { place: String, reason: String },

    #[error(transparent)]
    Data(#[from] DataError),

    /// Something that the settings ask for and that cannot be.
    #[error("{0}")]
    Refused(String),
}
