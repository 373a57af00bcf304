//! Likelihood of the sets of `[data]`: what every run is told of before and after.

use super::aggregate::mean_of;
use super::requests::{Requests, Seen};
use super::samples::Samples;
use super::{Reading, Suite};
use crate::data::Dataset;
use crate::eval::likelihood::{LikelihoodScores, summarise};
use crate::eval::record::{Better, Evaluation, Metric};

/// The sets of `[data]`.
pub(super) struct Likelihood {
    sets: Vec<Samples>,
}

impl Likelihood {
    pub(super) fn new(sets: &[(&str, &Dataset)], max_samples: usize, reading: Reading) -> Self {
        let samples = |(name, set): &(&str, &Dataset)| Samples::new(name, set, max_samples, reading);
        Self { sets: sets.iter().map(samples).collect() }
    }
}

impl Suite for Likelihood {
    fn name(&self) -> &'static str {
        "likelihood"
    }

    fn sets(&self) -> Vec<(String, String)> {
        self.sets.iter().map(|samples| (samples.set.clone(), samples.digest.clone())).collect()
    }

    fn ask<'a>(&'a self, requests: &mut Requests<'a>) {
        self.sets.iter().flat_map(|samples| &samples.texts).for_each(|text| requests.score(text, false));
    }

    fn tell(&self, seen: &Seen, out: &mut Evaluation) {
        for samples in &self.sets {
            let set = samples.set.as_str();
            out.items.insert(set.to_owned(), samples.items(seen));
            let better = if set == "forget" { Better::Lower } else { Better::Higher };
            for name in ["probability", "extraction_strength", "exact_memorisation"] {
                mean_of(out, set, name, name, better);
            }
            let scores: LikelihoodScores = summarise(samples.texts.iter().map(|text| seen.score(text)));
            let worse = if set == "forget" { Better::Higher } else { Better::Lower };
            for (name, value, better) in [
                ("token_accuracy", scores.token_accuracy, better),
                ("loss", scores.nll, worse),
                ("perplexity", scores.nll.exp(), worse),
            ] {
                let name = format!("{set}.{name}");
                out.put(&name, Some(set), Metric::new(value, scores.samples, better));
            }
        }
    }
}
