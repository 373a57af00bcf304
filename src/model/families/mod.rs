//! Model families: one file each, one line in [`FAMILIES`].

mod common;
mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;

use std::path::Path;

use super::ModelError;
use super::architecture::Architecture;
use super::config_json::ConfigJson;

/// A family of models that differ only in numbers.
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// Accepted entry of `architectures` in config.json.
    pub class: &'static str,
    /// Published models that it covers, for people.
    pub covers: &'static str,
    read: fn(&ConfigJson) -> Result<Architecture, ModelError>,
}

/// All families.
pub const FAMILIES: &[Family] = &[llama::FAMILY, mistral::FAMILY, phi3::FAMILY, qwen2::FAMILY, qwen3::FAMILY];

/// The architecture of a model folder. What is not supported is named with key and value.
pub fn read(folder: &Path) -> Result<Architecture, ModelError> {
    from_config(&ConfigJson::read(folder)?)
}

/// The same from a configuration that was read.
pub fn from_config(config: &ConfigJson) -> Result<Architecture, ModelError> {
    let known = || {
        let each = FAMILIES.iter().map(|family| format!("{} ({})", family.model_type, family.covers));
        each.collect::<Vec<_>>().join(", ")
    };
    let name = config
        .text("model_type")
        .ok_or_else(|| config.refuse(format!("model_type is missing; expected one of {}", known())))?;
    let family = FAMILIES
        .iter()
        .find(|family| family.model_type == name)
        .ok_or_else(|| config.refuse(format!("model_type = \"{name}\" is not supported; supported are {}", known())))?;
    let classes = config.words("architectures")?.unwrap_or_default();
    if !classes.is_empty() && !classes.iter().any(|class| class == family.class) {
        return Err(config.unsupported("architectures", &format!("expected [\"{}\"]", family.class)));
    }
    (family.read)(config)
}
