//! The tables of the TOML file. Every key has a default or is required, and a unit in its doc.
//!
//! A key that only some settings use is an `Option`: absent in the file means the method's own default, present where it
//! has no effect is refused (`validate.rs`).

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::data::{Source, Template};
use super::eval::Eval;
use super::method::Method;
use super::scope::{Before, Scope};
use super::subspace::Subspace;

/// Everything about one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub run: Run,
    pub model: Model,
    #[serde(default)]
    pub parallel: Parallel,
    pub data: Data,
    pub method: Method,
    #[serde(default, skip_serializing_if = "Scope::is_all")]
    pub scope: Scope,
    #[serde(default, skip_serializing_if = "Before::is_nothing")]
    pub before: Before,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subspace: Option<Subspace>,
    pub train: Train,
    pub optimizer: Optimizer,
    #[serde(default)]
    pub schedule: Schedule,
    #[serde(default)]
    pub checkpoint: Checkpoint,
    #[serde(default)]
    pub eval: Eval,
    #[serde(default)]
    pub export: Export,
}

/// Where the run lives and what it runs on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Run folder: resolved configuration, metrics, logs, caches and the exported model. Required.
    pub dir: PathBuf,
    /// Seed of everything random: initial weights and the order of the data.
    #[serde(default)]
    pub seed: u64,
    /// `auto` takes GPUs where every rank has one and CPUs otherwise; `cuda` refuses to run without; `cpu`. Of a host's GPUs each
    /// rank takes one, in rank order.
    #[serde(default)]
    pub device: Device,
    /// Let several ranks share a GPU; slow, for trying layouts on one machine.
    #[serde(default)]
    pub allow_shared_gpu: bool,
    /// CPU threads of one rank; 0 means `OMP_NUM_THREADS`, or else a fair share of the cores that the launcher left to it. Unit: threads.
    #[serde(default)]
    pub threads: usize,
    /// Deadline of one wait for other ranks while training; a longer one ends the whole job. Twice that until the first step is done;
    /// a second more for each 50 MB while files are read or written. Unit: seconds.
    #[serde(default = "default_timeout")]
    pub timeout: u64,
    /// Tell the status over HTTP (`/status.json`, and `/metrics` for Prometheus): a port of this machine alone, or `HOST:PORT`. By
    /// default nothing listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_addr: Option<String>,
}

fn default_timeout() -> u64 {
    600
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The best device that is there.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

/// The model that is changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Hugging Face folder: `config.json`, safetensors weights, tokenizer. Required.
    pub path: PathBuf,
    /// `pretrained` reads the folder's weights; `random` draws them from `run.seed` (normal, `initializer_range` of config.json).
    #[serde(default)]
    pub init: Init,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    #[default]
    Pretrained,
    Random,
}

/// How the ranks share the work: world size = tp x dp, tp fastest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    /// Tensor-parallel size; must divide the model's attention heads and key/value heads. Unit: ranks.
    pub tp: usize,
    /// Data-parallel size, or `auto` for world size / tp. Unit: ranks.
    pub dp: Dp,
    /// Shard the hidden states between half blocks over the tensor-parallel ranks (less activation memory).
    pub sequence_parallel: bool,
    /// Shard master weights and optimizer state over the data-parallel ranks (ZeRO-1).
    pub zero: bool,
    /// Least size of one gradient bucket, the unit of data-parallel traffic; half blocks are never cut. Unit: MiB of f32 gradients on one rank.
    pub bucket_mib: f64,
    /// In which the data-parallel ranks add gradients up: `f32`, or `bf16` for half the traffic and rounded sums.
    pub reduce_dtype: Float,
}

impl Default for Parallel {
    fn default() -> Self {
        Self { tp: 1, dp: Dp::Auto, sequence_parallel: false, zero: true, bucket_mib: 32.0, reduce_dtype: Float::F32 }
    }
}

/// A type of floating-point numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Float {
    #[default]
    F32,
    Bf16,
}

/// Data-parallel size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dp {
    Auto,
    Ranks(usize),
}

/// The samples. Which of the three a run needs depends on `method.objective`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Samples to forget; needed by every unlearning objective.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forget: Option<Source>,
    /// Samples to keep; needed by a retain term, evaluated whenever given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain: Option<Source>,
    /// Samples to train on; only for `objective = "finetune"` and `"learn"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<Source>,
    /// File of refusals, one a line, for methods that use them (`idk`, `idk_dpo`, `kto`, `flat`, retain `ap`) where a sample has none of its
    /// own. Each sample gets one, drawn from `run.seed`. Default: a list in the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusals: Option<PathBuf>,
    /// `"chat"` or `{ prompt, answer }`; all samples but `text` use it. Default `"chat"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    /// System message put before the question when the chat template is used with `qa` samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Longest sample; what is longer is cut at the end (`qa`, `chat`) or split (`text`), and counted. Unit: tokens.
    #[serde(default = "default_max_length")]
    pub max_length: usize,
    /// Draw a new order each epoch from (`run.seed`, epoch); `false` means file order with retain i beside forget i, wrapping.
    #[serde(default = "yes")]
    pub shuffle: bool,
}

impl Data {
    /// The sources that are given, by their keys.
    pub fn sources(&self) -> impl Iterator<Item = (&'static str, &Source)> {
        let keys = [("data.forget", &self.forget), ("data.retain", &self.retain), ("data.train", &self.train)];
        keys.into_iter().filter_map(|(key, source)| Some((key, source.as_ref()?)))
    }
}

fn default_max_length() -> usize {
    512
}

fn yes() -> bool {
    true
}

/// How long, in what pieces and in which precision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Passes over the forget (or train) samples. Give either `epochs` or `steps`. Unit: epochs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<usize>,
    /// Optimizer steps. Give either `epochs` or `steps`. Unit: steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Forget (or train) samples of one optimizer step over all ranks; each brings one retain sample along. Unit: samples.
    #[serde(default = "default_global_batch")]
    pub global_batch: usize,
    /// Tokens that one rank runs through the model at once; larger is faster and needs more memory. Unit: tokens.
    #[serde(default = "default_micro_batch_tokens")]
    pub micro_batch_tokens: usize,
    /// `bf16` computes in bf16 with f32 master weights, gradients and optimizer state; `f32` computes in f32.
    #[serde(default)]
    pub precision: Precision,
    /// Gradient buffers: `f32`, or `bf16` for half the memory; then every step must fit into one micro-batch on each rank.
    #[serde(default)]
    pub grad_dtype: Float,
    /// `half_block` keeps only the input of each half block and computes the rest again in backward; `none` keeps all.
    #[serde(default)]
    pub recompute: Recompute,
    /// Memory for one chunk of logits. Unit: MiB on one rank.
    #[serde(default = "default_logits_mib")]
    pub logits_mib: f64,
}

fn default_global_batch() -> usize {
    32
}

fn default_micro_batch_tokens() -> usize {
    8192
}

fn default_logits_mib() -> f64 {
    256.0
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    Bf16,
    F32,
}

impl Precision {
    /// The name used in TOML.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    #[default]
    None,
    HalfBlock,
}

/// The optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// `adamw` or `sgd`.
    #[serde(default)]
    pub name: OptimizerName,
    /// Peak learning rate. Required.
    pub lr: f64,
    /// AdamW's decay rates of the two moments. Default [0.9, 0.999].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub betas: Option<[f64; 2]>,
    /// AdamW's eps. Default 1e-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// SGD's momentum. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Decoupled weight decay of the matrices; norms and biases are not decayed.
    #[serde(default = "default_weight_decay")]
    pub weight_decay: f64,
    /// Largest global gradient norm; longer gradients are scaled down to it. 0 turns clipping off.
    #[serde(default = "default_max_grad_norm")]
    pub max_grad_norm: f64,
    /// AdamW's moments: `f32`, `bf16`, or `int8` (blocks of 256 with a scale, arXiv 2110.02861): 8, 4 or 2 bytes a parameter. Default `f32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_dtype: Option<StateDtype>,
    /// Step each gradient bucket as soon as it is complete, while backward still runs, and free it: gradients need almost no memory
    /// where a step is one micro-batch. Clips each half block by its own norm, as the global one is not yet known.
    #[serde(default)]
    pub in_backward: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StateDtype {
    #[default]
    F32,
    Bf16,
    Int8,
}

fn default_weight_decay() -> f64 {
    0.01
}

fn default_max_grad_norm() -> f64 {
    1.0
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerName {
    #[default]
    Adamw,
    Sgd,
}

/// The learning rate over the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// `linear` (to 0), `cosine` (to 0) or `constant`.
    pub name: ScheduleName,
    /// Linear warm-up from 0: `"1 epoch"`, `"10 steps"`, or a fraction of all steps such as 0.1.
    pub warmup: Warmup,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { name: ScheduleName::Linear, warmup: Warmup::Fraction(0.0) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleName {
    Linear,
    Cosine,
    Constant,
}

/// Length of the warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    Steps(usize),
    Epochs(f64),
    /// Fraction of all steps, in [0, 1).
    Fraction(f64),
}

/// The state of the run in `DIR/checkpoints`, from which it goes on after a stop: on SIGTERM, SIGUSR1 or a file `STOP` in the run
/// folder a run saves, ends with exit code 75, and goes on when it is started again, on any number of ranks. A file `SAVE` saves only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Save every so many steps; 0 means only when the run is asked to stop. Unit: steps.
    pub every: usize,
    /// Keep so many of the newest checkpoints; 0 keeps all.
    pub keep_last: usize,
    /// Keep besides those of every so many steps; 0 means none. Unit: steps.
    pub keep_every: usize,
    /// Write while training goes on; costs host memory for a copy of the rank's state.
    #[serde(rename = "async")]
    pub background: bool,
    /// Save what the optimizer remembers; without it a run goes on with moments of 0.
    pub save_optimizer: bool,
    /// `auto` goes on from the newest checkpoint where there is one; `must` refuses to start without; `never` starts anew.
    pub resume: Resume,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every: 0, keep_last: 2, keep_every: 0, background: true, save_optimizer: true, resume: Resume::Auto }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resume {
    #[default]
    Auto,
    Must,
    Never,
}

/// The Hugging Face folder that the run writes at its end, `DIR/model`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Write the model at the end of the run.
    pub model: bool,
    /// `same` keeps the type of the weights that were read; or `bf16`, `f16`, `f32`.
    pub dtype: ExportDtype,
    /// Largest weight file; a model above it gets several files and an index. Unit: MiB.
    pub max_shard_mib: f64,
}

impl Default for Export {
    fn default() -> Self {
        Self { model: true, dtype: ExportDtype::Same, max_shard_mib: 4768.0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportDtype {
    Same,
    Bf16,
    F16,
    F32,
}
