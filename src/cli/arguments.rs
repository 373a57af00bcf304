//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config;
use crate::data::synth;
use crate::run::Fault;

/// Unlearn samples from a large language model.
///
/// Without a verb: run. Start it alone for one rank, or under mpirun or srun: `mpirun -n 16 dunlearn --config 70b_npo.toml`.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    arg_required_else_help = true
)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) run: RunOptions,
    #[command(subcommand)]
    pub(super) verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Train, unlearn or fine-tune as a configuration says
    Run(RunOptions),
    /// Measure a model, or compare what was measured of several: TOFU, MUSE, WMDP, MMLU, perplexity, membership
    Eval(super::eval::EvalOptions),
    /// Start the ranks of a run with mpirun, srun or sbatch, look after them, and start them again where that helps
    Launch(super::launch::LaunchOptions),
    /// Show or describe configurations
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// Say what a run will need before it runs: memory, time, traffic, device hours; refuse what does not fit and say what would
    Plan(super::plan::PlanOptions),
    /// List the unlearning methods: what they need, where they come from
    Methods(MethodsOptions),
    /// Measure speed on this machine
    Bench {
        #[command(subcommand)]
        verb: BenchVerb,
    },
    /// Compare this machine's devices, or the ranks of a launcher, with one CPU: losses, gradients and weights of small models
    Check(CheckOptions),
    /// Try to bring back what a run's model has forgotten: quantised weights, other questions, hidden states, relearning
    Attack(super::attack::AttackArguments),
    /// Ask a model: continue prompts; under a launcher the ranks share the model and the prompts
    Generate(super::generate::GenerateArguments),
    /// Examine ranks, hosts, versions, limits, disk and links before a run; launched like one
    Doctor(super::doctor::DoctorOptions),
    /// Where a run is, and whether it lives
    Status(super::status::StatusOptions),
    /// Write the model of a run's checkpoint as a Hugging Face folder; under a launcher all ranks write files
    Export(ExportOptions),
    /// List, verify and compare checkpoints
    Checkpoint {
        #[command(subcommand)]
        verb: CheckpointVerb,
    },
    /// Add, subtract and mix models and task matrices; under a launcher the ranks share the matrices
    Weights {
        #[command(subcommand)]
        verb: super::weights::WeightsVerb,
    },
    /// Make a page about one run, or one that compares several, from what is in their folders
    Report(super::report::ReportOptions),
    /// Make data
    Data {
        #[command(subcommand)]
        verb: DataVerb,
    },
}

#[derive(Debug, Args)]
pub(super) struct MethodsOptions {
    /// Print JSON instead of a table
    #[arg(long)]
    pub(super) json: bool,
    /// Run the NPO paper's synthetic experiment and write its figure (SVG)
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(super) figure: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct RunOptions {
    /// Configuration file
    #[arg(long, short, value_name = "FILE", required = true)]
    pub(super) config: Option<PathBuf>,
    /// Override a key, e.g. --set optimizer.lr=2e-5; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Replace a finished run in the same run folder
    #[arg(long)]
    pub(super) overwrite: bool,
    /// Go on from a checkpoint although settings, model or data differ from those that it was made with; says which
    #[arg(long, conflicts_with = "overwrite")]
    pub(super) force_resume: bool,
    /// Progress bars, plain lines, or nothing; auto: bars on a terminal, or where DUNLEARN_PROGRESS=bar is set (mpirun hides
    /// the terminal; launch/mpirun sets it)
    #[arg(long, value_enum, default_value_t = ProgressChoice::Auto)]
    pub(super) progress: ProgressChoice,
    /// Log lines for people or for machines
    #[arg(long, value_enum, default_value_t = LogChoice::Text)]
    pub(super) log_format: LogChoice,
    /// As run.status_addr: tell the status over HTTP on this port of the machine, or on HOST:PORT
    #[arg(long, value_name = "ADDR")]
    pub(super) status_addr: Option<String>,
    /// Let a rank fail: panic|error|kill|stop|hang|order|slow@load|step|collective|eval|save|export[.COUNT]:RANK
    #[arg(long, value_name = "FAULT", hide = true)]
    pub(super) fault: Option<Fault>,
}

impl RunOptions {
    /// What a verb that is no run, but works with a run's ranks, takes of them.
    pub(super) fn of_a_verb(progress: ProgressChoice) -> Self {
        Self {
            config: None,
            set: Vec::new(),
            overwrite: false,
            force_resume: false,
            progress,
            log_format: LogChoice::Text,
            status_addr: None,
            fault: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ProgressChoice {
    /// Bars on a terminal, plain lines elsewhere
    Auto,
    Bar,
    Plain,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogChoice {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum ConfigVerb {
    /// Print the JSON schema of the configuration language
    Schema,
    /// Print a configuration with all defaults filled in
    Show {
        file: PathBuf,
        /// Override a key, e.g. --set optimizer.lr=2e-5
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum BenchVerb {
    /// Time whole unlearning steps of a random model: tokens/s, share of the machine's matrix-product rate, where time goes
    Step(StepBenchOptions),
    /// Run one rank of a configuration's mesh alone: its memory and computing time measured, its traffic counted
    Rank(RankBenchOptions),
    /// Save and load a rank's state, against the disk's own rate
    Checkpoint(CheckpointBenchOptions),
}

/// A Llama of any shape; run it under mpirun to time a layout.
#[derive(Debug, Args)]
pub(super) struct StepBenchOptions {
    /// A published shape instead of one by numbers: llama-3.1-8b, llama-3.1-70b
    #[arg(long, conflicts_with_all = ["hidden", "layers", "heads", "kv_heads", "intermediate", "vocab"])]
    pub(super) shape: Option<String>,
    #[arg(long, default_value_t = 1024)]
    pub(super) hidden: i64,
    #[arg(long, default_value_t = 4)]
    pub(super) layers: usize,
    #[arg(long, default_value_t = 16)]
    pub(super) heads: i64,
    #[arg(long, default_value_t = 16)]
    pub(super) kv_heads: i64,
    /// Width of the MLP
    #[arg(long, default_value_t = 2816)]
    pub(super) intermediate: i64,
    #[arg(long, default_value_t = 8192)]
    pub(super) vocab: i64,
    /// Forget samples of a step, with as many retain samples
    #[arg(long, default_value_t = 8)]
    pub(super) samples: usize,
    #[command(flatten)]
    pub(super) load: LoadOptions,
    #[arg(long, default_value_t = 8192)]
    pub(super) micro_batch_tokens: usize,
    /// Compute in f32 instead of bf16
    #[arg(long)]
    pub(super) f32: bool,
    /// Recompute half blocks in backward
    #[arg(long)]
    pub(super) recompute: bool,
    #[arg(long, default_value_t = 1)]
    pub(super) tp: usize,
    #[arg(long)]
    pub(super) sequence_parallel: bool,
    /// Keep whole optimizer states on every data-parallel rank
    #[arg(long)]
    pub(super) no_zero: bool,
    /// Gradients summed at once over the data-parallel ranks, as parallel.bucket_mib
    #[arg(long, default_value_t = 32.0)]
    pub(super) bucket_mib: f64,
    /// As optimizer.state_dtype: f32, bf16 or int8
    #[arg(long, default_value = "f32", value_parser = word::<config::StateDtype>)]
    pub(super) state_dtype: config::StateDtype,
    /// As train.grad_dtype: f32 or bf16
    #[arg(long, default_value = "f32", value_parser = word::<config::Float>)]
    pub(super) grad_dtype: config::Float,
    /// As optimizer.in_backward
    #[arg(long)]
    pub(super) in_backward: bool,
    /// Threads of one rank; 0 means cores / ranks on the host
    #[arg(long, default_value_t = 0)]
    pub(super) threads: usize,
    /// Write one more step as a timeline for chrome://tracing or Perfetto: computing, and gradient sums beside it
    #[arg(long, value_name = "FILE")]
    pub(super) trace: Option<PathBuf>,
}

/// What a benchmark runs and where.
#[derive(Debug, Args)]
pub(super) struct LoadOptions {
    /// Mean length of a sample, in tokens
    #[arg(long, default_value_t = 128)]
    pub(super) length: usize,
    /// Share of a sample that is scored
    #[arg(long, default_value_t = 0.6)]
    pub(super) scored: f64,
    #[arg(long, default_value_t = 8)]
    pub(super) steps: usize,
    /// As run.device: auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = word::<config::Device>)]
    pub(super) device: config::Device,
    /// Let several ranks share a GPU
    #[arg(long)]
    pub(super) allow_shared_gpu: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ExportOptions {
    /// Run folder
    pub(super) run: PathBuf,
    /// Step of the checkpoint; the newest by default
    #[arg(long)]
    pub(super) step: Option<usize>,
    /// Folder to write; RUN/export_STEP by default
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// As export.dtype: same, bf16, f16 or f32; by default what the run's configuration says
    #[arg(long, value_parser = word::<config::ExportDtype>)]
    pub(super) dtype: Option<config::ExportDtype>,
    /// Largest weight file, such as 5GB or 500MiB; by default what the run's configuration says
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) max_shard_size: Option<usize>,
}

#[derive(Debug, Subcommand)]
pub(super) enum CheckpointVerb {
    /// List a run's checkpoints
    Ls { run: PathBuf },
    /// Read every byte: digests of the files, and every element of every tensor there once
    Verify {
        run: PathBuf,
        /// Step of the checkpoint; all by default
        #[arg(long)]
        step: Option<usize>,
    },
    /// Compare the weights of two checkpoints tensor by tensor
    Diff {
        /// Folder such as RUN/checkpoints/step_000100
        first: PathBuf,
        second: PathBuf,
    },
}

/// Bytes of `5GB`, `500MiB` or plain bytes.
pub(super) fn size(text: &str) -> Result<usize, String> {
    let at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1048576.0,
        "gib" => 1073741824.0,
        other => return Err(format!("{other:?} is no unit; write B, KB, MB, GB, KiB, MiB or GiB")),
    };
    let bytes = number.parse::<f64>().map_err(|error| error.to_string())? * factor;
    if bytes >= 1.0 { Ok(bytes as usize) } else { Err("expected at least one byte".to_owned()) }
}

/// Run it alone for one device, or under a launcher for a layout.
#[derive(Debug, Args)]
pub(super) struct CheckOptions {
    /// As run.device: auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = word::<config::Device>)]
    pub(super) device: config::Device,
    #[arg(long, default_value_t = 1)]
    pub(super) tp: usize,
    #[arg(long)]
    pub(super) sequence_parallel: bool,
    /// Keep whole optimizer states on every data-parallel rank
    #[arg(long)]
    pub(super) no_zero: bool,
    /// Let several ranks share a GPU
    #[arg(long)]
    pub(super) allow_shared_gpu: bool,
    /// Deadline of one wait for the other ranks, in seconds
    #[arg(long, default_value_t = 120)]
    pub(super) timeout: u64,
    /// Print JSON instead of a table
    #[arg(long)]
    pub(super) json: bool,
}

/// The state of a model of `bench step`'s shape, on one rank.
#[derive(Debug, Args)]
pub(super) struct CheckpointBenchOptions {
    /// Folder on the disk that is meant
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub(super) folder: PathBuf,
    #[command(flatten)]
    pub(super) step: StepBenchOptions,
}

/// The mesh, precision and optimizer of a configuration, with random weights and samples.
#[derive(Debug, Args)]
pub(super) struct RankBenchOptions {
    /// Configuration file; model.path may be missing where its last part names a published shape
    #[arg(long, short, value_name = "FILE")]
    pub(super) config: PathBuf,
    /// Override a key, e.g. --set parallel.tp=4; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Which of the tp x dp ranks
    #[arg(long, default_value_t = 0, value_name = "RANK")]
    pub(super) as_rank: usize,
    #[command(flatten)]
    pub(super) load: LoadOptions,
    /// Modelled ring bandwidth of a rank among its tensor-parallel ranks, in GB/s; the default is 8 H200 in one node
    #[arg(long, default_value_t = 360.0)]
    pub(super) tp_gbs: f64,
    /// The same among the data-parallel ranks; the default is 400 Gb/s of network for each GPU
    #[arg(long, default_value_t = 45.0)]
    pub(super) dp_gbs: f64,
}

/// A word of the configuration language.
pub(super) fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::from(text)).map_err(|error| error.to_string())
}

#[derive(Debug, Subcommand)]
pub(super) enum DataVerb {
    /// Write a small data set of fictional authors, with a tokenizer and the config.json of a small model
    Synth(SynthOptions),
    /// Write the folder of a small Llama without weights, its tokenizer learnt from your own data: for `init = "random"`
    Model(ModelOptions),
}

#[derive(Debug, Args)]
pub(super) struct ModelOptions {
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// JSON lines files; the tokenizer is learnt from all their strings
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub(super) text: Vec<PathBuf>,
    /// Tokens of the tokenizer
    #[arg(long, default_value_t = 4096)]
    pub(super) vocab: usize,
    /// Hidden size of the model
    #[arg(long, default_value_t = 256)]
    pub(super) hidden: usize,
    #[arg(long, default_value_t = 6)]
    pub(super) layers: usize,
    #[arg(long, default_value_t = 8)]
    pub(super) heads: usize,
    #[arg(long, default_value_t = 8)]
    pub(super) kv_heads: usize,
    /// Width of the MLP
    #[arg(long, default_value_t = 768)]
    pub(super) intermediate: usize,
    /// Overwrite the files in a folder that is not empty
    #[arg(long)]
    pub(super) force: bool,
}

#[derive(Debug, Args)]
pub(super) struct SynthOptions {
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    #[arg(long, default_value_t = synth::Options::default().authors)]
    authors: usize,
    /// Questions about each author
    #[arg(long, default_value_t = synth::Options::default().questions_per_author)]
    questions: usize,
    /// Share of the authors that is to be forgotten
    #[arg(long, default_value_t = synth::Options::default().forget_fraction)]
    forget_fraction: f64,
    /// Sums of two numbers, a task of another kind: into sums.jsonl and full.jsonl
    #[arg(long, default_value_t = synth::Options::default().sums)]
    sums: usize,
    #[arg(long, default_value_t = synth::Options::default().seed)]
    pub(super) seed: u64,
    /// Tokens of the tokenizer
    #[arg(long, default_value_t = synth::Options::default().vocab_size)]
    vocab: usize,
    /// Hidden size of the model in config.json
    #[arg(long, default_value_t = synth::Options::default().shape.hidden)]
    hidden: usize,
    #[arg(long, default_value_t = synth::Options::default().shape.layers)]
    layers: usize,
    #[arg(long, default_value_t = synth::Options::default().shape.heads)]
    heads: usize,
    #[arg(long, default_value_t = synth::Options::default().shape.kv_heads)]
    kv_heads: usize,
    /// Width of the MLP
    #[arg(long, default_value_t = synth::Options::default().shape.intermediate)]
    intermediate: usize,
    /// Write random weights of the model too, drawn from the seed
    #[arg(long)]
    pub(super) weights: bool,
    /// Overwrite the files in a folder that is not empty
    #[arg(long)]
    force: bool,
}

impl From<&SynthOptions> for synth::Options {
    fn from(options: &SynthOptions) -> Self {
        let SynthOptions { hidden, layers, heads, kv_heads, intermediate, .. } = *options;
        Self {
            authors: options.authors,
            questions_per_author: options.questions,
            forget_fraction: options.forget_fraction,
            sums: options.sums,
            seed: options.seed,
            vocab_size: options.vocab,
            shape: synth::Shape { hidden, layers, heads, kv_heads, intermediate },
            force: options.force,
        }
    }
}
