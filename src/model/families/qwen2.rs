//! Qwen2 and Qwen2.5: biases on q, k and v; some layers may slide.

use super::Family;
use super::common::{self, Silent};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    covers: "Qwen2, Qwen2.5",
    read: |config| {
        let mut architecture =
            common::read(config, &Silent { family: "qwen2", norm_eps: 1e-6, kv_heads_as_heads: false })?;
        architecture.qkv_bias = true;
        architecture.windows = common::layered_windows(config, architecture.num_layers)?;
        Ok(architecture)
    },
};
