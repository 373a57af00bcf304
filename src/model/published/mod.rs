//! Shapes of published models that can be asked for by name where no folder is at hand: for measurements and plans.

use super::architecture::Architecture;
use super::config_json::ConfigJson;
use super::{ModelError, families};

/// `config.json` of each, reduced to what decides the shape.
const SHAPES: [(&str, &str); 2] =
    [("llama-3.1-8b", include_str!("llama-3.1-8b.json")), ("llama-3.1-70b", include_str!("llama-3.1-70b.json"))];

/// Names of all shapes.
pub fn names() -> Vec<&'static str> {
    SHAPES.iter().map(|(name, _)| *name).collect()
}

/// The architecture with a name, whatever its case; None for other names.
pub fn architecture(name: &str) -> Option<Result<Architecture, ModelError>> {
    let (name, text) = SHAPES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name))?;
    Some(ConfigJson::parse(name.as_ref(), text).and_then(|config| families::from_config(&config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_sizes() {
        // as the publisher counts them
        for (name, parameters) in [("Llama-3.1-8B", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496)] {
            assert_eq!(architecture(name).unwrap().unwrap().num_parameters(), parameters);
        }
        assert!(architecture("gpt-5").is_none());
    }
}
