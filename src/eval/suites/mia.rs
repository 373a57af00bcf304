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
use crate::eval::scores::{Target, Text};
use crate::eval::statistics;
use crate::eval::text::zlib_bytes;

const FORGET: &str = "mia_forget";
const HOLDOUT: &str = "mia_holdout";
/// Attacks that one pass over the texts gives.
const OWN: [&str; 4] = ["loss", "zlib", "min_k", "min_k_plus_plus"];
const GRADNORM: &str = "gradnorm";
const RECALL: &str = "recall";
const REFERENCE: &str = "reference";

/// Members and texts like them.
pub(super) struct MiaSuite {
    sets: [Samples; 2],
    k: f64,
    gradnorm: bool,
    /// The texts behind the first holdout texts, where ReCaLL is asked for.
    behind: Option<Behind>,
    has_reference: bool,
}

/// Texts with others before them.
struct Behind {
    /// Holdout texts that stand before the others, so that they are not attacked themselves.
    shots: usize,
    /// Of each set a text a sample; None of the shots, and where not one of them fits.
    texts: [Vec<Option<Text>>; 2],
}

impl Behind {
    fn new(shots: usize, sets: &[Samples; 2], reading: Reading) -> Result<Self, EvalError> {
        let [_, holdout] = sets;
        if shots >= holdout.texts.len() {
            return Err(EvalError::Refused(format!(
                "eval.mia.recall: is {shots}, and eval.mia.holdout has {} texts; some must be left to attack",
                holdout.texts.len()
            )));
        }
        let before: Vec<&[i32]> = holdout.texts[..shots].iter().map(|text| text.tokens.as_slice()).collect();
        let begins = |token| reading.encoder.begins_text(token);
        let of = |samples: &Samples, skip: usize| {
            let texts = samples.texts.iter().enumerate();
            texts
                .map(|(at, text)| if at < skip { None } else { behind(text, &before, begins, reading.max_length) })
                .collect()
        };
        Ok(Self { shots, texts: [of(&sets[0], 0), of(&sets[1], shots)] })
    }
}

/// A text with as many of `before` in front of it as `max_length` tokens have room for; None where that is not one. All of them together
/// have one begin-of-text token.
fn behind(text: &Text, before: &[&[i32]], begins: impl Fn(i32) -> bool, max_length: usize) -> Option<Text> {
    let bos = |tokens: &[i32]| usize::from(tokens.first().is_some_and(|&token| begins(token)));
    let (head, own) = text.tokens.split_at(bos(&text.tokens));
    let mut tokens = head.to_vec();
    for shot in before.iter().map(|shot| &shot[bos(shot)..]) {
        if tokens.len() + shot.len() + own.len() <= max_length {
            tokens.extend(shot);
        }
    }
    let shift = tokens.len() - head.len();
    tokens.extend(own);
    let moved = |target: &Target| Target { after: target.after + shift as u32, ..*target };
    (shift > 0).then(|| Text { tokens, targets: text.targets.iter().map(moved).collect(), ended: text.ended })
}

impl MiaSuite {
    pub(super) fn read(config: &Config, reading: Reading) -> Result<Self, EvalError> {
        let table = super::given(&config.eval.mia);
        let muse = config.eval.muse.as_ref().and_then(|muse| muse.path.as_ref());
        let published = match (&table.holdout, muse) {
            (None, Some(folder)) => Some(super::muse::privleak(folder)?),
            _ => None,
        };
        let forget = match (&table.forget, &published, &config.data.forget) {
            (Some(source), _, _) => ("eval.mia.forget", source),
            (None, Some([forget, _]), _) => ("eval.muse.path", forget),
            (None, None, Some(source)) => ("data.forget", source),
            (None, None, None) => unreachable!("invariant: the configuration was validated"),
        };
        let holdout = match (&table.holdout, &published) {
            (Some(source), _) => ("eval.mia.holdout", source),
            (None, Some([_, holdout])) => ("eval.muse.path", holdout),
            (None, None) => unreachable!("invariant: the configuration was validated"),
        };
        let load = |(key, source)| Dataset::load(key, source, reading.encoder, reading.max_length);
        let (forget, holdout) = (load(forget)?, load(holdout)?);
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
        let behind = (table.recall > 0).then(|| Behind::new(table.recall, &sets, reading)).transpose()?;
        let has_reference = config.eval.reference.is_some();
        Ok(Self { sets, k: table.k, gradnorm: table.gradnorm, behind, has_reference })
    }

    /// Attacks that need nothing but the model itself.
    fn own(&self) -> impl Iterator<Item = &'static str> {
        let more = [(self.gradnorm, GRADNORM), (self.behind.is_some(), RECALL)];
        OWN.into_iter().chain(more.into_iter().filter(|(wanted, _)| *wanted).map(|(_, attack)| attack))
    }

    fn auc(&self, attack: &str, out: &mut Evaluation) {
        let of = |set| numbers(&out.items[set], attack);
        let (members, others) = (of(FORGET), of(HOLDOUT));
        // what stands before the others is not attacked
        let shots = self.behind.as_ref().filter(|_| attack == RECALL).map_or(0, |behind| behind.shots);
        let lacking = missing(&out.items[FORGET], attack) + missing(&out.items[HOLDOUT], attack) - shots;
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
        for text in self.sets.iter().flat_map(|samples| &samples.texts) {
            requests.score(text, true);
            if self.gradnorm {
                requests.gradient(text);
            }
        }
        let behind = self.behind.iter().flat_map(|behind| behind.texts.iter().flatten().flatten());
        behind.for_each(|text| requests.score(text, false));
    }

    fn tell(&self, seen: &Seen, out: &mut Evaluation) {
        for (set, samples) in self.sets.iter().enumerate() {
            let mut items = samples.items(seen);
            for ((item, text), (_, answer)) in items.iter_mut().zip(&samples.texts).zip(&samples.words) {
                let score = seen.score(text);
                give(item, "zlib", score.nll().map(|nll| nll / zlib_bytes(answer) as f64));
                give(item, "min_k", score.min_k(self.k));
                give(item, "min_k_plus_plus", score.min_k_plus_plus(self.k));
                if self.gradnorm {
                    give(item, GRADNORM, seen.gradient_norm(text));
                }
                let behind = self.behind.as_ref().and_then(|behind| behind.texts[set][item.index].as_ref());
                give(item, RECALL, behind.and_then(|behind| score.recall(seen.score(behind))));
            }
            out.items.insert(samples.set.clone(), items);
            mean_of(out, &samples.set, "loss", "loss", Better::Retrained);
        }
        for attack in self.own() {
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
        let attacks = self.own().chain(self.has_reference.then_some(REFERENCE));
        for attack in attacks {
            let name = format!("mia.{attack}_auc");
            let (Some(own), Some(theirs)) = (out.value(&name), retrained.value(&name)) else { continue };
            let n = out.metrics[&name].n;
            let leak = if attack == "min_k" { "mia.priv_leak".into() } else { format!("mia.{attack}_priv_leak") };
            put(out, &leak, Some(FORGET), Ok(statistics::priv_leak(own, theirs)), n, Better::Retrained);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shots_stand_before_a_text_and_its_targets_move() {
        let text = Text { tokens: vec![1, 7, 8], targets: vec![Target { after: 1, token: 8 }], ended: false };
        let shots: [&[i32]; 3] = [&[1, 20, 21], &[1, 22, 23, 24, 25], &[1, 26]];
        let of = |max_length| behind(&text, &shots, |token| token == 1, max_length);
        let target = |after| vec![Target { after, token: 8 }];
        let all = of(100).unwrap();
        assert_eq!((all.tokens, all.targets), (vec![1, 20, 21, 22, 23, 24, 25, 26, 7, 8], target(8)));
        // the second does not fit, the third does
        let some = of(6).unwrap();
        assert_eq!((some.tokens, some.targets), (vec![1, 20, 21, 26, 7, 8], target(4)));
        assert_eq!(of(3), None);
        // without a begin-of-text token the first word of a shot stays
        assert_eq!(behind(&text, &shots, |_| false, 100).unwrap().tokens.len(), 13);
    }
}
