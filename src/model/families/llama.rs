//! Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2 and others that publish as `LlamaForCausalLM`.

use super::Family;
use super::common::{self, Silent};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    covers: "Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2",
    read: |config| {
        common::refuse_attention_bias(config)?;
        if config.integer("pretraining_tp")?.unwrap_or(1) != 1 {
            return Err(config.unsupported("pretraining_tp", "only the summation order of 1 is built"));
        }
        common::read(config, &Silent { family: "llama", norm_eps: 1e-6, kv_heads_as_heads: true })
    },
};
