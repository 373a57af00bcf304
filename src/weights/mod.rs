//! Arithmetic on weights on disk: models are added, mixed and compared matrix by matrix, without loading one.
//!
//! Each matrix has one owner rank, which reads it from safetensors slices, computes and writes its place in the result. What is
//! computed on the owner never uses a collective and runs on one CPU thread, so the bytes are the same on every number of ranks.
//! Knows nothing of training, data or tensor parallelism.

mod combine;
mod discriminate;
mod error;
mod subspace;

pub use combine::{Output, Start, add, difference, mix};
pub use discriminate::{Discrimination, MatrixReport, discriminate, discriminate_matrix};
pub use error::WeightsError;
pub use subspace::{Basis, Options as SubspaceOptions, Stack, basis};
