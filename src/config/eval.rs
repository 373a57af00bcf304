//! `[eval]`: what is measured of a model, when, and beside which other models. A suite runs where its table is there.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::data::Source;

/// Numbers of the model before, during and after: likelihood of each set of `[data]`, and the suites whose tables are given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// Evaluate before the first step.
    pub before: bool,
    /// Evaluate after the last step.
    pub after: bool,
    /// Evaluate every so many steps as well, or every `"2 epochs"`; 0 means not. Unit: steps.
    pub every: Every,
    /// Use at most the first so many samples of each set of `[data]`; 0 means all. Unit: samples.
    pub max_samples: usize,
    /// Run only these of the suites that have a table. Default: all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suites: Option<Vec<SuiteName>>,
    /// Model that never saw the forget data, for forget quality and PrivLeak: a model folder, a run folder, or a file of results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retrained: Option<PathBuf>,
    /// Model before unlearning, shown beside: a model folder, a run folder, or a file of results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original: Option<PathBuf>,
    /// Model that the reference attack of `[eval.mia]` compares with: a model folder, a run folder, or a file of results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
    /// Folder of results of the other models, by digest of model, data and settings. Default `DIR/cache/eval`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// `openunlearning`: extraction strength has a floor of one token, as that program's loop leaves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<EvalCompat>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tofu: Option<Tofu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub muse: Option<Muse>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wmdp: Option<Wmdp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choice: Option<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<Perplexity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mia: Option<Mia>,
    /// What `dunlearn attack` tries on the run's model; a run itself does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attack: Option<Attack>,
}

impl Default for Eval {
    fn default() -> Self {
        Self {
            before: true,
            after: true,
            every: Every::Steps(0),
            max_samples: 400,
            suites: None,
            retrained: None,
            original: None,
            reference: None,
            cache: None,
            compat: None,
            tofu: None,
            muse: None,
            wmdp: None,
            choice: None,
            perplexity: None,
            mia: None,
            attack: None,
        }
    }
}

impl Eval {
    /// Whether a suite has a table and is not left out.
    pub fn runs(&self, suite: SuiteName) -> bool {
        let given = match suite {
            SuiteName::Tofu => self.tofu.is_some(),
            SuiteName::Muse => self.muse.is_some(),
            SuiteName::Wmdp => self.wmdp.is_some(),
            SuiteName::Choice => self.choice.is_some(),
            SuiteName::Perplexity => self.perplexity.is_some(),
            SuiteName::Mia => self.mia.is_some(),
        };
        given && self.suites.as_ref().is_none_or(|suites| suites.contains(&suite))
    }

    /// Whether a run evaluates at all.
    pub fn happens(&self) -> bool {
        self.before || self.after || self.every != Every::Steps(0)
    }
}

/// How often a run evaluates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Every {
    Steps(usize),
    Epochs(usize),
}

impl Every {
    /// In steps, with so many of them an epoch; 0 means never.
    pub fn steps(self, per_epoch: usize) -> usize {
        match self {
            Self::Steps(n) => n,
            Self::Epochs(n) => n * per_epoch,
        }
    }
}

/// Suites with a table of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SuiteName {
    Tofu,
    Muse,
    Wmdp,
    Choice,
    Perplexity,
    Mia,
}

impl SuiteName {
    pub const ALL: [Self; 6] = [Self::Tofu, Self::Muse, Self::Wmdp, Self::Choice, Self::Perplexity, Self::Mia];

    /// The name of its table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tofu => "tofu",
            Self::Muse => "muse",
            Self::Wmdp => "wmdp",
            Self::Choice => "choice",
            Self::Perplexity => "perplexity",
            Self::Mia => "mia",
        }
    }
}

/// Programs whose numbers can be matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EvalCompat {
    #[serde(rename = "openunlearning")]
    OpenUnlearning,
}

/// TOFU (arXiv 2401.06121): forget quality, model utility and its nine parts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tofu {
    /// Folder with the published files: `forget10_perturbed`, `retain_perturbed`, `real_authors_perturbed`, `world_facts_perturbed`, as JSON
    /// lines, JSON or Parquet, or folders of them. Required.
    pub path: PathBuf,
    /// Which split was to be forgotten: `forget01`, `forget05` or `forget10`.
    #[serde(default = "forget10")]
    pub forget: String,
    /// Use at most so many items of each set; 0 means all. Unit: items.
    #[serde(default)]
    pub limit: usize,
    /// Let the model answer and compare with ROUGE; needed for model utility, and the slowest part.
    #[serde(default = "yes")]
    pub rouge: bool,
    /// Longest answer that the model may write. Unit: tokens.
    #[serde(default = "two_hundred")]
    pub max_new_tokens: usize,
}

/// MUSE (arXiv 2407.06460): verbatim memorisation and knowledge memorisation. PrivLeak is in `[eval.mia]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Muse {
    /// Folder of the published data set (MUSE-News or MUSE-Books): gives what is not named below, and `privleak` for `[eval.mia]` where that
    /// has no `holdout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Passages as `{prompt, gt}`: the true continuation of each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verbmem: Option<PathBuf>,
    /// Questions about what was to be forgotten, `{question, answer}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub knowmem_forget: Option<PathBuf>,
    /// Examples before each of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub knowmem_forget_icl: Option<PathBuf>,
    /// Questions about what was to be kept: the utility.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub knowmem_retain: Option<PathBuf>,
    /// Examples before each of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub knowmem_retain_icl: Option<PathBuf>,
    /// Use at most so many items of each set; 0 means all. Unit: items.
    #[serde(default)]
    pub limit: usize,
}

/// WMDP (arXiv 2403.03218): four-choice questions about biology, cybersecurity and chemistry, without examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Wmdp {
    /// Folder with `bio`, `cyber` and `chem` (or `wmdp-bio`, ...): those that are there are run. Required.
    pub path: PathBuf,
    /// Use at most so many questions of each, spread over the file; 0 means all. Unit: questions.
    #[serde(default)]
    pub limit: usize,
}

/// Multiple choice as in MMLU: `{question, choices, answer[, subject]}`, prompts of the lm-evaluation-harness.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// File or data set folder with the questions. Required.
    pub path: PathBuf,
    /// Which split of a data set folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// File or data set folder with the examples that come before a question; those of the same subject, in their order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub examples: Option<PathBuf>,
    /// Examples before a question; needs `examples`. Unit: examples.
    #[serde(default)]
    pub shots: usize,
    /// Use at most so many questions, spread over the file; 0 means all. Unit: questions.
    #[serde(default)]
    pub limit: usize,
}

/// Perplexity on running text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Perplexity {
    /// Texts, of kind `text`. Required.
    pub source: Source,
    /// Put all texts together with blank lines between and cut windows of `data.max_length`, instead of each text for itself.
    #[serde(default = "yes")]
    pub join: bool,
}

/// Membership inference: can an attacker tell what was to be forgotten from texts that were never seen?
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mia {
    /// Texts that were to be forgotten. Default: `data.forget`, or without `holdout` the split `forget` of MUSE's `privleak`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forget: Option<Source>,
    /// Texts like them that no model has seen. Default: the split `holdout` of MUSE's `privleak` in `eval.muse.path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holdout: Option<Source>,
    /// Share of the least likely tokens that Min-k% and Min-k%++ look at.
    #[serde(default = "two_fifths")]
    pub k: f64,
    /// Attack by the norm of the loss's gradient too (`mia.gradnorm_auc`). A forward and a backward pass a text, one text at a time: many
    /// times the cost of the other attacks together.
    #[serde(default)]
    pub gradnorm: bool,
    /// Attack by ReCaLL too (arXiv 2406.15968, `mia.recall_auc`): the first so many holdout texts stand before each text, as many as fit
    /// into `data.max_length`, and are not attacked themselves. One more pass over longer texts; 0 means not. Unit: texts.
    #[serde(default)]
    pub recall: usize,
}

/// Attempts to bring back what was forgotten, each on the model that was unlearned and, where they are given, on `eval.original` and
/// `eval.retrained`. What every attack is measured by is the sets of `[data]` and the suites.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Attack {
    /// Store the matrices of the layers in these codes: `int8` (a scale a row), `int4` (a scale for 128 columns), both rounded to nearest, and
    /// `nf4` (NormalFloat, a scale for 64 columns).
    pub quantise: Vec<QuantisationName>,
    /// Ask with the paraphrase that stands in this field of each sample of `data.forget`, of kind `qa`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paraphrase: Option<String>,
    /// Put so many other questions of `data.forget` with their answers before each question; 0 means not. Unit: questions.
    pub in_context: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latent: Option<Latent>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relearn: Option<Relearn>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub benign: Option<Benign>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtt: Option<Rtt>,
    /// Put values of the original model into the unlearned one in windows of so many layers and see what comes back (KRS, arXiv 2410.06606);
    /// needs the original model. Unit: layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub krs: Option<usize>,
    /// Field of `data.forget`, of kind `qa`, with the part of the answer that is the knowledge: how deep it is gone (unlearning depth score,
    /// arXiv 2605.24614); needs the original model and `eval.retrained`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<String>,
}

impl Default for Attack {
    fn default() -> Self {
        use QuantisationName::{Int4, Int8, Nf4};
        Self {
            quantise: vec![Int8, Int4, Nf4],
            paraphrase: None,
            in_context: 0,
            latent: None,
            relearn: None,
            benign: None,
            rtt: None,
            krs: None,
            depth: None,
        }
    }
}

/// Codes of quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum QuantisationName {
    Int8,
    Int4,
    Nf4,
}

/// A perturbation of the hidden states of each forget sample that makes its answer likelier (arXiv 2408.10682), and what is reached with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Layer whose input is perturbed. Required.
    pub layer: usize,
    /// Largest L2 norm of a sample's perturbation over all its tokens.
    #[serde(default = "eight")]
    pub radius: f64,
    /// Steps of normalised gradient descent, each as long as the radius divided by their number.
    #[serde(default = "six")]
    pub steps: usize,
}

/// Fine-tuning on a part of the forget data; measured on the part that stays out, over the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Relearn {
    /// Share of the samples of `data.forget` that is trained on; with 1 all are trained on and measured.
    pub fraction: f64,
    pub training: Training,
}

/// Fine-tuning on data that holds none of the answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Benign {
    /// Samples to train on. Required.
    pub source: Source,
    #[serde(default)]
    pub training: Training,
}

/// Retraining on all but one part of the forget data, measured on that part, each part once (RTT, arXiv 2410.08827).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rtt {
    /// Parts.
    pub folds: usize,
    /// Epochs over the other parts. Unit: epochs.
    pub epochs: usize,
    /// Samples of a step.
    pub batch: usize,
    /// Learning rate, without decay. The paper tries several up to this one and takes the best.
    pub lr: f64,
}

/// How an attack trains: AdamW without decay at a constant rate, on all parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Training {
    /// Unit: steps.
    pub steps: usize,
    /// Samples of a step.
    pub batch: usize,
    pub lr: f64,
    /// Measure every so many steps. Unit: steps.
    pub every: usize,
}

impl Default for Training {
    fn default() -> Self {
        Self { steps: 60, batch: 4, lr: 1e-5, every: 15 }
    }
}

impl Default for Relearn {
    fn default() -> Self {
        Self { fraction: 0.1, training: Training::default() }
    }
}

impl Default for Rtt {
    fn default() -> Self {
        Self { folds: 5, epochs: 6, batch: 4, lr: 5e-6 }
    }
}

fn eight() -> f64 {
    8.0
}

fn six() -> usize {
    6
}

fn forget10() -> String {
    "forget10".to_owned()
}

fn yes() -> bool {
    true
}

fn two_hundred() -> usize {
    200
}

fn two_fifths() -> f64 {
    0.4
}
