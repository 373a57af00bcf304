//! The shape of a decoder-only transformer: what a family's reader makes of `config.json`.

use super::rope::{Rope, Scaling};

/// Everything the engine needs to know of a model except its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// Name of the family, for messages: `llama`, `qwen3`, ...
    pub family: &'static str,
    pub hidden: i64,
    pub num_layers: usize,
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
    /// Width of the gated MLP.
    pub intermediate: i64,
    /// Rows of the embedding.
    pub vocab: i64,
    pub norm_eps: f64,
    pub rope: Rope,
    /// The head is the embedding.
    pub tied: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// q and k are normalised per head before the rotary embedding.
    pub qk_norm: bool,
    /// Keys that a query sees, itself included; None: all. One entry a layer.
    pub windows: Vec<Option<i64>>,
    /// How the family stores q, k, v and gate, up.
    pub packing: Packing,
    /// Longest sequence the model was made for. Unit: tokens.
    pub max_positions: i64,
    /// Standard deviation of random initial weights.
    pub initializer_range: f64,
}

/// Which projections share a tensor in the weight files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// `q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj`.
    Separate,
    /// `qkv_proj`, `gate_up_proj`.
    Fused,
}

impl Architecture {
    /// Weights in all, tied ones once.
    pub fn num_parameters(&self) -> i64 {
        let head = if self.tied { 0 } else { self.vocab * self.hidden };
        let norms = self.hidden * (2 * self.num_layers as i64 + 1);
        let qk_norms = if self.qk_norm { 2 * self.head_dim * self.num_layers as i64 } else { 0 };
        self.vocab * self.hidden
            + head
            + norms
            + qk_norms
            + self.layer_matrices() * self.num_layers as i64
            + self.biases()
    }

    /// Weights of one layer's matrices, the ones that cost a multiply-add a token each.
    pub fn layer_matrices(&self) -> i64 {
        let attention = self.hidden * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads);
        attention + 3 * self.hidden * self.intermediate
    }

    /// Past `max_positions` the published model computes something else, not merely something it was not trained for.
    pub fn positions_are_hard(&self) -> bool {
        matches!(self.rope.scaling, Scaling::Long { .. })
    }

    fn biases(&self) -> i64 {
        let each = self.head_dim * (self.num_heads + 2 * self.num_kv_heads);
        if self.qkv_bias { each * self.num_layers as i64 } else { 0 }
    }

    /// Tensor-parallel sizes that this version can run.
    pub fn legal_tp(&self) -> Vec<usize> {
        (1..=self.num_kv_heads)
            .filter(|tp| self.num_heads % tp == 0 && self.num_kv_heads % tp == 0 && self.intermediate % tp == 0)
            .map(|tp| tp as usize)
            .collect()
    }
}
