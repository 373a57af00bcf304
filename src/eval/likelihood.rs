//! Teacher-forced scores: how probable the model finds each answer, and how many of its tokens it would have chosen.

use serde::{Deserialize, Serialize};

use super::record::Item;
use super::scores::{Asked, Text, TextScore, score};
use crate::data::Dataset;

/// Means over a data set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LikelihoodScores {
    /// Mean over samples of `exp(mean log-probability of its scored tokens)`, as in TOFU (arXiv 2401.06121).
    pub probability: f64,
    /// Share of all scored tokens that are the model's first choice.
    pub token_accuracy: f64,
    /// Mean over scored tokens of the negative log-likelihood. Unit: nats.
    pub nll: f64,
    pub samples: usize,
    /// Scored tokens.
    pub tokens: usize,
}

/// Scores of all samples, in their order; all ranks call it and get all of them.
///
/// `progress` is called with the number of samples that this rank has done.
pub fn per_sample(model: Asked, dataset: &Dataset, progress: impl FnMut(usize)) -> Vec<TextScore> {
    let texts: Vec<Text> = dataset.samples.iter().map(|sample| Text::of(sample, false)).collect();
    score(model, &texts.iter().collect::<Vec<_>>(), false, progress)
}

/// Means over samples and tokens.
pub fn summarise<'a>(scores: impl IntoIterator<Item = &'a TextScore>) -> LikelihoodScores {
    let mut all = LikelihoodScores::default();
    for score in scores {
        let sum: f64 = score.logprobs.iter().map(|&x| f64::from(x)).sum();
        all.samples += 1;
        all.tokens += score.logprobs.len();
        all.nll -= sum;
        all.probability += (sum / score.logprobs.len() as f64).exp();
        // where there are no log-probabilities there is no first choice either
        let correct = score.correct.iter().filter(|&&x| x).count() as f64;
        all.token_accuracy += if sum.is_nan() { f64::NAN } else { correct };
    }
    let (samples, tokens) = (all.samples as f64, all.tokens as f64);
    let (probability, token_accuracy, nll) = (all.probability / samples, all.token_accuracy / tokens, all.nll / tokens);
    LikelihoodScores { probability, token_accuracy, nll, ..all }
}

/// The same from the items of an evaluation.
pub fn of_items(items: &[Item]) -> LikelihoodScores {
    let number = |item: &Item, name: &str| item.numbers.get(name).copied().unwrap_or(f64::NAN);
    let sum = |of: &dyn Fn(&Item) -> f64| items.iter().map(of).sum::<f64>();
    let tokens = sum(&|item| number(item, "tokens"));
    LikelihoodScores {
        probability: sum(&|item| number(item, "probability")) / items.len() as f64,
        token_accuracy: sum(&|item| number(item, "correct_tokens")) / tokens,
        nll: sum(&|item| number(item, "loss") * number(item, "tokens")) / tokens,
        samples: items.len(),
        tokens: tokens as usize,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(logprobs: &[f32], correct: &[bool]) -> TextScore {
        TextScore { logprobs: logprobs.to_vec(), correct: correct.to_vec(), ..TextScore::default() }
    }

    #[test]
    fn means_are_over_samples_and_over_tokens() {
        let half = 0.5f32.ln();
        let summary = summarise(&[score(&[half, half, half], &[true; 3]), score(&[0.0], &[false])]);
        assert!((summary.probability - 0.75).abs() < 1e-7);
        assert_eq!(summary.token_accuracy, 0.75);
        assert!((summary.nll - 0.75 * std::f64::consts::LN_2).abs() < 1e-7);
        assert_eq!((summary.samples, summary.tokens), (2, 4));
    }
}
