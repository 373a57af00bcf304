//! Qwen3 (dense): q and k are normalised per head.

use super::Family;
use super::common::{self, Silent};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    covers: "Qwen3 (dense)",
    read: |config| {
        common::refuse_attention_bias(config)?;
        let mut architecture =
            common::read(config, &Silent { family: "qwen3", norm_eps: 1e-6, kv_heads_as_heads: false })?;
        if config.get("head_dim").is_none() {
            // the class's own default, not hidden_size / num_attention_heads
            return Err(config.unsupported("head_dim", "a Qwen3 folder states it; published models have 128"));
        }
        architecture.qk_norm = true;
        architecture.windows = common::layered_windows(config, architecture.num_layers)?;
        Ok(architecture)
    },
};
