//! The TOML language of a run: schema, defaults, overrides, and refusals that say what to write instead.
//!
//! Knows nothing of tensors, ranks or files other than the TOML text itself.

mod data;
mod defaults;
mod load;
mod schema;
mod validate;
mod words;

pub use data::{Fields, Kind, Source, Template, TemplateName};
pub use load::{ConfigError, digest, from_file, from_str, json_schema, to_toml};
pub use schema::*;
