//! `[scope]`: which parameters may change; `[before]`: what is done to the weights before training.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which parameters may change. What lies outside is bit-identical after training and costs no gradients, master weights or
/// optimizer state. The keys narrow each other down; without any, everything is trained.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Scope {
    /// Tensors by Hugging Face name, `*` standing for anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensors: Option<Vec<String>>,
    /// Decoder layers, from 0; what belongs to no layer (embedding, final norm, head) is then not trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Train low-rank adapters instead of the matrices; the run leaves them in PEFT's format in `DIR/adapter`, and merged in `DIR/model`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// Train only some weights of the matrices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<Mask>,
}

impl Scope {
    /// Whether everything is trained.
    pub fn is_all(&self) -> bool {
        *self == Self::default()
    }
}

/// `W + alpha / r * B A` (arXiv 2106.09685), without dropout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Rank of the adapters. Required.
    pub r: usize,
    /// The adapters' product is multiplied by `alpha / r`. Required.
    pub alpha: f64,
    /// Modules that get an adapter. Default: all matrices of attention and MLP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<String>>,
    /// `zero`: B = 0, as PEFT; `fila`: the part of each matrix that matters most to the forget samples relative to the retain samples,
    /// taken out of the matrix (arXiv 2408.06621).
    #[serde(default)]
    pub init: LoraInit,
    /// Samples of one batch whose squared gradient `fila` takes. Unit: samples. Default 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fila_batch: Option<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraInit {
    #[default]
    Zero,
    Fila,
}

/// A choice of weights, the same on every layout. It is written to `DIR/mask.safetensors`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mask {
    /// How weights are rated; or `file`. Gradients are of the mean negative log-likelihood over all tokens of the set: g_f of the
    /// forget samples, g_r of the retain samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<Score>,
    /// Mask to use instead of a score: safetensors with a tensor of zeros and ones by Hugging Face name, of the tensor's shape or one
    /// that broadcasts to it. Tensors that it does not hold are not trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Share of the eligible weights that is chosen, in (0, 1]. Default 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// What is chosen at once: a `weight`, a `row` or `column` of a matrix (a column of `down_proj` is an MLP value vector), or a `tensor`.
    /// A group's rate is the mean over its weights. Default `weight`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<Unit>,
    /// Whether the best are taken of the `model`, of each `layer` or of each `tensor`. Default `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub among: Option<Among>,
    /// What keeps `gri` and `fila` from dividing by nothing. Default: for `gri` the 5th percentile of |g_r|, for `fila` 1e-5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// `wagle`'s mu. Default 1e-6, as the authors' code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mu: Option<f64>,
    /// `memflex`: only groups whose gradients have a smaller cosine are candidates. Default 0.92.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cosine: Option<f64>,
    /// `memflex`: only groups with a larger mean |g_f| are candidates; others fill up. Default 6e-4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_gradient: Option<f64>,
    /// Use at most so many samples of each set for the score; 0 means all of the forget set and as many of the retain set. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// Take what was not chosen instead.
    #[serde(default)]
    pub invert: bool,
    /// Another mask: only what it holds as well is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intersect: Option<PathBuf>,
}

/// How weights are rated; larger goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Uniform, from `run.seed`.
    Random,
    /// |g_f| (SalUn, arXiv 2310.12508).
    Gradient,
    /// |g_f| / (|g_r| + eps) (GRIN, arXiv 2508.06467).
    Gri,
    /// E[g_f^2] / (E[g_r^2] + eps) over batches (FILA, arXiv 2408.06621).
    Fila,
    /// |(w - g_r / mu) g_f| (WAGLE, arXiv 2410.17509).
    Wagle,
    /// Mean |g_f| of groups whose g_f and g_r point apart (MemFlex, arXiv 2407.01920).
    Memflex,
    /// Mean |activation| over answer tokens times the length of the value vector (arXiv 2311.09060).
    Activations,
    /// |w g_f| (DEL, arXiv 2412.02186).
    Del,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    #[default]
    Weight,
    Row,
    Column,
    Tensor,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Among {
    #[default]
    Model,
    Layer,
    Tensor,
}

/// What is done to the weights before the first step, in this order. The reference (`npo`, `kl`, ...) is the model before that.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Before {
    /// Another checkpoint of the same architecture: a Hugging Face folder. Needed by `reset` and `blend`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other: Option<PathBuf>,
    /// Give what may change the other checkpoint's values (DEL, arXiv 2412.02186).
    pub reset: bool,
    /// Share of the other checkpoint in all weights: `(1 - blend) w + blend other`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blend: Option<f64>,
    /// Standard deviation of Gaussian noise that is added to what may change: a function of `run.seed`, tensor and element.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise: Option<f64>,
    /// `noise` is in units of each tensor's own standard deviation.
    pub noise_relative: bool,
}

impl Before {
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl Mask {
    pub const FRACTION: f64 = 0.1;
    pub const FILA_EPS: f64 = 1e-5;
    pub const MU: f64 = 1e-6;
    pub const MAX_COSINE: f64 = 0.92;
    pub const MIN_GRADIENT: f64 = 6e-4;
}

impl Lora {
    pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    pub const FILA_BATCH: usize = 32;

    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }
}
