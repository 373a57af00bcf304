//! The TOML language of a run: schema, defaults, overrides, and refusals that say what to write instead.
//!
//! Knows nothing of tensors, ranks or files other than the TOML text itself.

mod data;
mod defaults;
mod error;
mod load;
mod method;
mod schema;
mod scope;
mod subspace;
mod validate;
mod words;

pub use data::{Fields, Kind, Source, Template, TemplateName};
pub use error::ConfigError;
pub use load::{digest, from_file, from_str, json_schema, to_json, to_toml};
pub use method::*;
pub use schema::*;
pub use scope::*;
pub use subspace::{Mode, Side, StageOrder, StartFrom, Subspace};
