//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections; part of a head's features may be turned.

use super::Family;
use super::common::{self, Silent};
use crate::model::architecture::Packing;
use crate::model::rope::Scaling;

pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    covers: "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    read: |config| {
        common::refuse_attention_bias(config)?;
        let mut architecture =
            common::read(config, &Silent { family: "phi3", norm_eps: 1e-5, kv_heads_as_heads: true })?;
        architecture.packing = Packing::Fused;
        architecture.windows = vec![common::window(config)?; architecture.num_layers];
        if let Scaling::Long { .. } = architecture.rope.scaling {
            // past this length the model changes to other factors, for all positions at once
            let table = config.table("rope_parameters")?;
            architecture.max_positions = common::original_positions(config, table.as_ref())? as i64;
        }
        Ok(architecture)
    },
};
