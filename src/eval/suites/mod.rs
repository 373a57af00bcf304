//! Suites: which sets to read, which texts to score and prompts to continue, and how items become metrics. One file each; a new
//! suite is one file and one line in [`Suites::read`].
//!
//! All suites are read before anything is computed. What they ask for is put together, each text once, so that one pass over the texts and one
//! generation serve all of them.

mod aggregate;
mod choice;
mod likelihood;
mod mia;
mod muse;
mod overall;
mod perplexity;
mod questions;
mod requests;
mod samples;
mod tofu;

use std::time::Instant;

use super::error::EvalError;
use super::record::{Evaluation, FORMAT, ModelFacts};
use super::scores::{Asked, Floor};
use crate::config::{Config, Eval, SuiteName};
use crate::data::{Dataset, Encoder};
use crate::telemetry::Console;

pub use aggregate::{mean_of, missing};
pub use requests::{Prompt, Requests, Seen};

/// What one suite measures.
trait Suite {
    /// Name of its table.
    fn name(&self) -> &'static str;

    /// Digest of the raw texts of each of its sets, by set.
    fn sets(&self) -> Vec<(String, String)>;

    /// What the model is asked.
    fn ask<'a>(&'a self, requests: &mut Requests<'a>);

    /// Items, metrics and warnings from what it answered.
    fn tell(&self, seen: &Seen, out: &mut Evaluation);

    /// Metrics that need another model's results. Items of this model are in `out`.
    fn compare(&self, _others: &Others, _out: &mut Evaluation) {}
}

/// Results of other models on the same items.
#[derive(Default)]
pub struct Others {
    /// Never saw the forget data.
    pub retrained: Option<Evaluation>,
    /// Before unlearning.
    pub original: Option<Evaluation>,
    /// What the reference attack compares with.
    pub reference: Option<Evaluation>,
}

/// All that is measured of a model, read and encoded.
pub struct Suites {
    suites: Vec<Box<dyn Suite>>,
    /// What decides the numbers besides model and data.
    settings: String,
    precision: &'static str,
    template: String,
    config_digest: String,
}

/// What the suites are read with.
#[derive(Clone, Copy)]
struct Reading<'a> {
    encoder: &'a Encoder,
    max_length: usize,
    floor: Floor,
}

impl Suites {
    /// Reads every set that the configuration names; `sets` are those of `[data]`, by name.
    ///
    /// # Errors
    /// Files that are missing or hold something else than the suite needs, with file, row, field, what is there and what was expected.
    pub fn read(config: &Config, encoder: &Encoder, sets: &[(&str, &Dataset)]) -> Result<Self, EvalError> {
        let eval = &config.eval;
        let floor = if eval.compat.is_some() { Floor::OneToken } else { Floor::Zero };
        let reading = Reading { encoder, max_length: config.data.max_length, floor };
        let mut suites: Vec<Box<dyn Suite>> = Vec::new();
        if !sets.is_empty() {
            suites.push(Box::new(likelihood::Likelihood::new(sets, eval.max_samples, reading)));
        }
        for suite in SuiteName::ALL.into_iter().filter(|&suite| eval.runs(suite)) {
            suites.push(match suite {
                SuiteName::Tofu => Box::new(tofu::TofuSuite::read(given(&eval.tofu), reading)?),
                SuiteName::Muse => Box::new(muse::MuseSuite::read(given(&eval.muse), reading)?),
                SuiteName::Wmdp => Box::new(choice::ChoiceSuite::wmdp(given(&eval.wmdp), reading)?),
                SuiteName::Choice => Box::new(choice::ChoiceSuite::read(given(&eval.choice), reading)?),
                SuiteName::Perplexity => Box::new(perplexity::PerplexitySuite::read(given(&eval.perplexity), reading)?),
                SuiteName::Mia => Box::new(mia::MiaSuite::read(config, reading)?),
            });
        }
        let settings = Eval { retrained: None, original: None, cache: None, suites: None, ..eval.clone() };
        Ok(Self {
            suites,
            settings: serde_json::to_string(&settings).expect("invariant: a configuration is JSON"),
            precision: config.train.precision.name(),
            template: template(config),
            config_digest: crate::config::digest(config),
        })
    }

    /// Digests of the raw texts, by set.
    pub fn sets(&self) -> Vec<(String, String)> {
        self.suites.iter().flat_map(|suite| suite.sets()).collect()
    }

    /// What an evaluation of the model with this digest is known by: the same digest, the same numbers.
    pub fn digest(&self, model: &str) -> String {
        let sets: Vec<String> = self.sets().into_iter().map(|(set, digest)| format!("{set} {digest}")).collect();
        let parts =
            [model, self.precision, &self.template, &self.settings, &sets.join("\n"), env!("CARGO_PKG_VERSION")];
        blake3::hash(parts.join("\n").as_bytes()).to_hex()[..32].to_owned()
    }

    /// Why results cannot stand beside this evaluation, or what a reader should know of them.
    ///
    /// # Errors
    /// Results of other items: another split, or another set of the same name.
    pub fn comparable(&self, name: &str, other: &Evaluation) -> Result<Vec<String>, EvalError> {
        let mut warnings = Vec::new();
        for (set, digest) in self.sets() {
            match other.data.get(&set) {
                Some(theirs) if *theirs == digest => {}
                Some(_) => {
                    return Err(EvalError::Refused(format!(
                        "eval.{name}: the results of {} are of other items than this evaluation's {set}: another split or file; \
                         evaluate that model on the same data (name its folder instead of its results)",
                        other.model.path.display()
                    )));
                }
                None => warnings.push(format!("eval.{name}: the results have no set {set}; nothing of it is compared")),
            }
        }
        for (what, ours, theirs) in
            [("template", &self.template, &other.template), ("precision", &self.precision.to_owned(), &other.precision)]
        {
            if ours != theirs {
                warnings.push(format!(
                    "eval.{name}: {what} {theirs:?} there and {ours:?} here: the numbers are not comparable"
                ));
            }
        }
        Ok(warnings)
    }

    /// Measures a model. All ranks call it and get the same.
    ///
    /// # Errors
    /// A prompt that the model cannot continue.
    pub fn run(
        &self,
        model: Asked,
        encoder: &Encoder,
        label: &str,
        facts: &ModelFacts,
        others: &Others,
        console: &Console,
    ) -> Result<Evaluation, EvalError> {
        let mut out = Evaluation {
            format: FORMAT,
            label: label.to_owned(),
            step: None,
            model: facts.clone(),
            config_digest: self.config_digest.clone(),
            precision: self.precision.to_owned(),
            template: self.template.clone(),
            data: self.sets().into_iter().collect(),
            metrics: Default::default(),
            curves: Default::default(),
            warnings: Vec::new(),
            seconds: Default::default(),
            items: Default::default(),
        };
        let mut requests = Requests::default();
        self.suites.iter().for_each(|suite| suite.ask(&mut requests));
        let seen = requests.answer(model, encoder, console, &mut out.seconds)?;
        for suite in &self.suites {
            let started = Instant::now();
            suite.tell(&seen, &mut out);
            suite.compare(others, &mut out);
            out.seconds.insert(suite.name().to_owned(), started.elapsed().as_secs_f64());
        }
        overall::tell(self, others, &mut out);
        Ok(out)
    }

    /// Whether there is more than the likelihood of the sets of `[data]`.
    pub fn has_tables(&self) -> bool {
        self.suites.iter().any(|suite| suite.name() != "likelihood")
    }
}

fn given<T>(table: &Option<T>) -> &T {
    table.as_ref().expect("invariant: a suite that runs has a table")
}

/// The template as results name it.
fn template(config: &Config) -> String {
    match &config.data.template {
        None | Some(crate::config::Template::Named(_)) => match &config.data.system {
            None => "chat".to_owned(),
            Some(system) => format!("chat, system message {system:?}"),
        },
        Some(crate::config::Template::Explicit(parts)) => format!("{}{}", parts.prompt, parts.answer),
    }
}
