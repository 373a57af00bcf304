//! What the families' config files share.

use crate::model::ModelError;
use crate::model::architecture::{Architecture, Packing};
use crate::model::config_json::ConfigJson;
use crate::model::rope::{Rope, Scaling};

/// What a family assumes where its config.json is silent, as transformers' class of the family does.
pub(super) struct Silent {
    pub(super) family: &'static str,
    pub(super) norm_eps: f64,
    /// As many key/value heads as heads; otherwise the key must be there.
    pub(super) kv_heads_as_heads: bool,
}

/// The keys that all families name alike; the family changes what is its own.
pub(super) fn read(config: &ConfigJson, silent: &Silent) -> Result<Architecture, ModelError> {
    refuse_what_is_not_built(config)?;
    let hidden = config.size("hidden_size")?;
    let num_heads = config.size("num_attention_heads")?;
    let num_kv_heads = match config.integer("num_key_value_heads")? {
        Some(n) if n > 0 && num_heads % n == 0 => n,
        Some(n) => {
            let reason = format!("num_key_value_heads = {n}, expected a divisor of num_attention_heads = {num_heads}");
            return Err(config.refuse(reason));
        }
        None if silent.kv_heads_as_heads => num_heads,
        None => return Err(config.refuse("num_key_value_heads is missing, expected a divisor of num_attention_heads")),
    };
    let head_dim = match config.integer("head_dim")? {
        Some(n) if n > 0 => n,
        Some(n) => return Err(config.refuse(format!("head_dim = {n}, expected a positive integer"))),
        None if hidden % num_heads == 0 => hidden / num_heads,
        None => {
            let reason = format!("hidden_size = {hidden} does not divide into num_attention_heads = {num_heads}");
            return Err(config.refuse(reason));
        }
    };
    let num_layers = config.size("num_hidden_layers")? as usize;
    Ok(Architecture {
        family: silent.family,
        hidden,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        intermediate: config.size("intermediate_size")?,
        vocab: config.size("vocab_size")?,
        norm_eps: config.float("rms_norm_eps")?.unwrap_or(silent.norm_eps),
        rope: rope(config, head_dim)?,
        tied: config.flag("tie_word_embeddings")?,
        qkv_bias: false,
        qk_norm: false,
        windows: vec![None; num_layers],
        packing: Packing::Separate,
        max_positions: config.integer("max_position_embeddings")?.unwrap_or(i64::MAX),
        initializer_range: config.float("initializer_range")?.unwrap_or(0.02),
    })
}

fn refuse_what_is_not_built(config: &ConfigJson) -> Result<(), ModelError> {
    if config.text("hidden_act").is_some_and(|activation| activation != "silu") {
        return Err(config.unsupported("hidden_act", "this version has the gated MLP with silu only"));
    }
    for key in ["mlp_bias", "lm_head_bias"] {
        if config.flag(key)? {
            return Err(config.unsupported(key, "this version has biases on q, k and v only"));
        }
    }
    for key in ["attention_dropout", "embd_pdrop", "resid_pdrop"] {
        if config.float(key)?.unwrap_or(0.0) != 0.0 {
            return Err(config.unsupported(key, "unlearning runs without dropout; set it to 0.0"));
        }
    }
    if config.get("quantization_config").is_some() {
        return Err(config.unsupported("quantization_config", "give the model in bf16, f16 or f32"));
    }
    Ok(())
}

/// Refuses an `attention_bias` that would put a bias on the output projection too.
pub(super) fn refuse_attention_bias(config: &ConfigJson) -> Result<(), ModelError> {
    if config.flag("attention_bias")? {
        return Err(config.unsupported("attention_bias", "this version has no bias on the output projection"));
    }
    Ok(())
}

/// The rotary embedding, from the keys of 2024 (`rope_theta`, `rope_scaling`) or of transformers 5 (`rope_parameters`).
fn rope(config: &ConfigJson, head_dim: i64) -> Result<Rope, ModelError> {
    let new_style = config.table("rope_parameters")?;
    let scaling = match &new_style {
        Some(parameters) => Some(parameters.clone()),
        None => config.table("rope_scaling")?,
    };
    let source = new_style.as_ref().unwrap_or(config);
    let number = |key: &str| match source.float(key)? {
        Some(x) => Ok(Some(x)),
        None => config.float(key),
    };
    let theta = number("rope_theta")?.unwrap_or(10_000.0);
    let fraction = number("partial_rotary_factor")?.unwrap_or(1.0);
    let dim = (head_dim as f64 * fraction) as i64;
    if dim < 2 || dim % 2 != 0 || dim > head_dim {
        let reason =
            format!("rotary dimension {dim} (head_dim x partial_rotary_factor), expected even, 2..={head_dim}");
        return Err(config.refuse(reason));
    }
    let scaling = scaling.map_or(Ok(Scaling::None), |table| read_scaling(config, &table, dim))?;
    Ok(Rope { theta, dim, scaling })
}

fn read_scaling(config: &ConfigJson, table: &ConfigJson, dim: i64) -> Result<Scaling, ModelError> {
    let kind = table.text("rope_type").or_else(|| table.text("type")).unwrap_or("default");
    let need = |key: &str| {
        table
            .float(key)?
            .ok_or_else(|| config.refuse(format!("rope scaling \"{kind}\" lacks {key}, expected a number")))
    };
    match kind {
        "default" => Ok(Scaling::None),
        "linear" => Ok(Scaling::Linear { factor: need("factor")? }),
        "llama3" => Ok(Scaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_positions: need("original_max_position_embeddings")?,
        }),
        "longrope" | "su" => read_long(config, table, dim),
        "dynamic" => Err(config.refuse(
            "rope scaling \"dynamic\" is not supported: its frequencies change with the length of the longest sequence in a \
             batch, so a result would depend on how sequences are batched",
        )),
        other => Err(config.refuse(format!(
            "rope scaling \"{other}\" is not supported; supported are default, linear, llama3, longrope"
        ))),
    }
}

/// Phi-3's factors. The file's own `original_max_position_embeddings` comes before the table's, as in transformers.
fn read_long(config: &ConfigJson, table: &ConfigJson, dim: i64) -> Result<Scaling, ModelError> {
    let short_factor = table
        .floats("short_factor")?
        .ok_or_else(|| config.refuse("rope scaling \"longrope\" lacks short_factor, expected a list of numbers"))?;
    if short_factor.len() as i64 != dim / 2 {
        let reason = format!(
            "short_factor has {} numbers, expected {} (half of the rotary dimension)",
            short_factor.len(),
            dim / 2
        );
        return Err(config.refuse(reason));
    }
    let original = original_positions(config, Some(table))?;
    let factor = match table.float("factor")? {
        Some(factor) => factor,
        None => config.size("max_position_embeddings")? as f64 / original,
    };
    let attention_factor = match table.float("attention_factor")? {
        Some(factor) => factor,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / original.ln()).sqrt(),
    };
    Ok(Scaling::Long { short_factor, attention_factor })
}

/// Length up to which the short factors hold.
pub(super) fn original_positions(config: &ConfigJson, table: Option<&ConfigJson>) -> Result<f64, ModelError> {
    let key = "original_max_position_embeddings";
    let inner = table.map(|table| table.float(key)).transpose()?.flatten();
    Ok(config.float(key)?.or(inner).unwrap_or(4096.0))
}

/// The sliding window of one file, refused where it is no positive number.
pub(super) fn window(config: &ConfigJson) -> Result<Option<i64>, ModelError> {
    match config.integer("sliding_window")? {
        Some(n) if n <= 0 => Err(config.refuse(format!("sliding_window = {n}, expected a positive integer or null"))),
        other => Ok(other),
    }
}

/// Which layers slide: `layer_types` where it is given, else those from `max_window_layers` on, and none at all unless
/// `use_sliding_window`.
pub(super) fn layered_windows(config: &ConfigJson, num_layers: usize) -> Result<Vec<Option<i64>>, ModelError> {
    let use_window = config.flag("use_sliding_window")?;
    // transformers' defaults of these keys, sliding_window = 4096 and max_window_layers = 28, where the file has none
    let given = if config.mentions("sliding_window") { window(config)? } else { Some(4096) };
    let window = given.filter(|_| use_window);
    if let Some(types) = config.words("layer_types")? {
        if types.len() != num_layers {
            let reason = format!("layer_types has {} entries, expected {num_layers} (num_hidden_layers)", types.len());
            return Err(config.refuse(reason));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(window),
                other => Err(config
                    .refuse(format!("layer_types has \"{other}\"; supported are full_attention, sliding_attention"))),
            })
            .collect();
    }
    let first = config.integer("max_window_layers")?.unwrap_or(28) as usize;
    Ok((0..num_layers).map(|layer| if layer >= first { window } else { None }).collect())
}
