//! Weights on disk: Hugging Face folders in and out, as named slices; no layout reaches the files.

mod error;
mod folder;

pub use error::CheckpointError;
pub use folder::Folder;
