//! Weights on disk: Hugging Face folders in and out, as named slices; no layout reaches the files.

mod convert;
mod error;
mod export;
mod folder;
mod parallel;
mod random;
pub mod slices;
mod snapshot;
pub mod state;
pub mod store;
mod stream;
mod tensor_file;

pub use convert::{TensorDifference, convert, difference, trains_everything};
pub use error::CheckpointError;
pub use export::{ExportOptions, export, export_adapter, export_tensors};
pub use folder::Folder;
pub use parallel::{Destination, owners, write_parallel};
pub use random::write_random;
pub use snapshot::{Snapshot, aligned, bytes_of};
pub use store::{Manifest, Saved, StateFile, Store};
pub use stream::Stream;
pub use tensor_file::{Reader, Spec, Writer, Written};
