//! Membership inference: scores that are lower for texts a model was trained on, and how well they tell forget from holdout texts.
//!
//! The AUC has the forget texts as label 0: 1 means that the model still knows them as members, 0.5 that they cannot be told apart.

use super::aggregate::{LEVEL, RESAMPLES, give, mean_of, missing, numbers, put};
use super::requests::{Requests, Seen};
use super::samples::Samples;
use super::{Others, Reading, Suite};
use crate::config::Config;
use crate::data::Dataset;
use crate::eval::error::EvalError;
use crate::eval::record::{Better, Evaluation};
use crate::eval::statistics;
use crate::eval::text::zlib_bytes;

const FORGET: &str = "mia_forget";
const HOLDOUT: &str = "mia_holdout";
/// Attacks that need nothing but the model itself.
const OWN: [&str; 4] = ["loss", "zlib", "min_k", "min_k_plus_plus"];
const REFERENCE: &str = "reference";

/// Members and texts like them.
pub(super) struct MiaSuite {
    sets: [Samples; 2],
    k: f64,
    has_reference: bool,
}

impl MiaSuite {
    pub(super) fn read(config: &Config, reading: Reading) -> Result<Self, EvalError> {
        let table = super::given(&config.eval.mia);
        let (key, forget) = match (&table.forget, &config.data.forget) {
            (Some(source), _) => ("eval.mia.forget", source),
            (None, Some(source)) => ("data.forget", source),
            (None, None) => unreachable!("invariant: the configuration was validated"),
        };
        let load = |key, source| Dataset::load(key, source, reading.encoder, reading.max_length);
        let (forget, holdout) = (load(key, forget)?, load("eval.mia.holdout", &table.holdout)?);
        let both = crate::data::overlap(&forget, &holdout);
        if let Some((member, other)) = both.first() {
            return Err(EvalError::Refused(format!(
                "eval.mia.holdout: {} of its texts are forget texts too (first: {}:{} and {}:{}); no attack can tell those apart",
                both.len(),
                forget.path.display(),
                forget.lines[*member],
                holdout.path.display(),
                holdout.lines[*other]
            )));
        }
        let sets = [(FORGET, &forget), (HOLDOUT, &holdout)].map(|(name, set)| Samples::new(name, set, 0, reading));
        Ok(Self { sets, k: table.k, has_reference: config.eval.reference.is_some() })
    }

    fn auc(&self, attack: &str, out: &mut Evaluation) {
        let of = |set| numbers(&out.items[set], attack);
        let (members, others) = (of(FORGET), of(HOLDOUT));
        let lacking = missing(&out.items[FORGET], attack) + missing(&out.items[HOLDOUT], attack);
        if lacking > 0 {
            out.warn(format!("mia.{attack}_auc leaves out {lacking} texts that have no such score"));
        }
        let name = format!("mia.{attack}_auc");
        // label 0: forget, label 1: holdout
        let auc = statistics::roc_auc(&others, &members);
        put(out, &name, Some(FORGET), auc, members.len() + others.len(), Better::Retrained);
        let interval = statistics::roc_auc_interval(&others, &members, LEVEL, RESAMPLES, 0);
        if let (Ok(interval), Some(metric)) = (interval, out.metrics.get_mut(&name)) {
            (metric.low, metric.high) = (Some(interval.low), Some(interval.high));
        }
    }
}

impl Suite for MiaSuite {
    fn name(&self) -> &'static str {
        "mia"
    }

    fn sets(&self) -> Vec<(String, String)> {
        self.sets.iter().map(|samples| (samples.set.clone(), samples.digest.clone())).collect()
    }

    fn ask<'a>(&'a self, requests: &mut Requests<'a>) {
        self.sets.iter().flat_map(|samples| &samples.texts).for_each(|text| requests.score(text, true));
    }

    fn tell(&self, seen: &Seen, out: &mut Evaluation) {
        for samples in &self.sets {
            let mut items = samples.items(seen);
            for ((item, text), (_, answer)) in items.iter_mut().zip(&samples.texts).zip(&samples.words) {
                let score = seen.score(text);
                give(item, "zlib", score.nll().map(|nll| nll / zlib_bytes(answer) as f64));
                give(item, "min_k", score.min_k(self.k));
                give(item, "min_k_plus_plus", score.min_k_plus_plus(self.k));
            }
            out.items.insert(samples.set.clone(), items);
            mean_of(out, &samples.set, "loss", "loss", Better::Retrained);
        }
        for attack in OWN {
            self.auc(attack, out);
        }
    }

    fn compare(&self, others: &Others, out: &mut Evaluation) {
        if let Some(reference) = &others.reference {
            for set in [FORGET, HOLDOUT] {
                let theirs = reference.items.get(set).map_or(&[][..], Vec::as_slice);
                let losses: Vec<Option<f64>> = theirs.iter().map(|item| item.numbers.get("loss").copied()).collect();
                let items = out.items.get_mut(set).expect("invariant: told before");
                for (item, loss) in items.iter_mut().zip(losses) {
                    let difference = item.numbers.get("loss").zip(loss).map(|(own, theirs)| own - theirs);
                    give(item, REFERENCE, difference);
                }
            }
            self.auc(REFERENCE, out);
        }
        let Some(retrained) = &others.retrained else {
            out.warn(
                "mia.priv_leak was not computed: it needs eval.retrained, a model that never saw the forget data"
                    .into(),
            );
            return;
        };
        let attacks = OWN.iter().copied().chain(self.has_reference.then_some(REFERENCE));
        for attack in attacks {
            let name = format!("mia.{attack}_auc");
            let (Some(own), Some(theirs)) = (out.value(&name), retrained.value(&name)) else { continue };
            let n = out.metrics[&name].n;
            let leak = if attack == "min_k" { "mia.priv_leak".into() } else { format!("mia.{attack}_priv_leak") };
            put(out, &leak, Some(FORGET), Ok(statistics::priv_leak(own, theirs)), n, Better::Retrained);
        }
    }
}
