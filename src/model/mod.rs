//! The transformer: families, sharding table, half blocks with their backward passes, and the head.
//!
//! Knows tensor parallelism (its collectives stand between half blocks) but neither data parallelism, nor optimizers, nor
//! what a loss is.

pub mod architecture;
mod attention;
mod attention_core;
mod batch;
mod cache;
pub mod config_json;
mod decoder;
pub mod families;
mod head;
pub mod init;
mod linear;
mod mlp;
pub mod published;
mod rope;
pub mod sharding;
mod sites;
mod weights;

pub use architecture::Architecture;
pub use attention_core::cut_on_host;
pub use batch::Batch;
pub use cache::KvCache;
pub use decoder::{Decoder, Keep, Tape};
pub use head::distribution::{Distribution, OfDistribution};
pub use head::{Divergence, LogitsPool, ReferenceHead, Rows, Scores};
pub use rope::{Rope, Scaling};
pub use sites::Site;
pub use weights::{Gradients, Weights};

use std::path::PathBuf;

use thiserror::Error;

/// Why a model cannot be used.
#[derive(Debug, Error)]
pub enum ModelError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {reason}")]
    Config { path: PathBuf, reason: String },
    #[error("{0}")]
    Layout(String),
}
