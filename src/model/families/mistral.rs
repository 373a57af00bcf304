//! Mistral 7B: Llama with a sliding window in every layer.

use super::Family;
use super::common::{self, Silent};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    class: "MistralForCausalLM",
    covers: "Mistral 7B v0.1 to v0.3, Mistral Nemo",
    read: |config| {
        let mut architecture =
            common::read(config, &Silent { family: "mistral", norm_eps: 1e-6, kv_heads_as_heads: false })?;
        // a file that does not mention the window means the class's own 4096; null means none
        let window = if config.mentions("sliding_window") { common::window(config)? } else { Some(4096) };
        architecture.windows = vec![window; architecture.num_layers];
        Ok(architecture)
    },
};
