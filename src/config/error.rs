//! Refusals of a configuration.

use std::path::PathBuf;

use thiserror::Error;

/// Why a configuration was refused. Every message says where and what to write instead.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("cannot read configuration {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{place}: {message}")]
    Parse { place: String, message: String },
    #[error("--set {text:?}: {reason}; write --set table.key=value, for example --set optimizer.lr=2e-5")]
    Override { text: String, reason: String },
    #[error("{key}: {reason}")]
    Value { key: String, reason: String },
}

impl ConfigError {
    pub(super) fn value(key: &str, reason: impl Into<String>) -> Self {
        Self::Value { key: key.to_owned(), reason: reason.into() }
    }
}
