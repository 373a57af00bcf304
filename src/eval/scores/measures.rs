//! Numbers of one item from the scores of its tokens. An end-of-text token counts in the mean log-likelihood and in nothing else,
//! as in OpenUnlearning.

use super::TextScore;

/// What extraction strength is of a text whose last token is wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Floor {
    /// 0: nothing can be extracted.
    #[default]
    Zero,
    /// 1/n, as OpenUnlearning's loop leaves it.
    OneToken,
}

impl TextScore {
    /// Mean negative log-likelihood of the targets, an end-of-text token included; None without targets. Unit: nats.
    pub fn nll(&self) -> Option<f64> {
        mean(&self.logprobs).map(|mean| -mean)
    }

    /// `exp(mean log-probability)`: a probability a token, as in TOFU (arXiv 2401.06121).
    pub fn probability(&self) -> Option<f64> {
        self.nll().map(|nll| (-nll).exp())
    }

    /// Share of the answer's tokens that are the model's first choice; NaN where a log-probability is.
    pub fn exact_memorisation(&self) -> Option<f64> {
        let answer = &self.correct[..self.len()];
        let correct = answer.iter().filter(|&&correct| correct).count();
        self.share(correct)
    }

    /// 1 - k/n with the smallest k from which on every token of the answer is the model's first choice; NaN where a log-probability is.
    pub fn extraction_strength(&self, floor: Floor) -> Option<f64> {
        let answer = &self.correct[..self.len()];
        let suffix = answer.iter().rev().take_while(|&&correct| correct).count();
        let suffix = if floor == Floor::OneToken { suffix.max(1) } else { suffix };
        self.share(suffix)
    }

    /// Minus the mean of the lowest `share` of the answer's log-probabilities, at least one (Min-k%, arXiv 2310.16789).
    pub fn min_k(&self, share: f64) -> Option<f64> {
        let logprobs = self.logprobs[..self.len()].iter().map(|&x| f64::from(x));
        lowest(logprobs.collect(), share).map(|mean| -mean)
    }

    /// As [`Self::min_k`] with log-probabilities standardised by mean and variance over the vocabulary at their position
    /// (Min-k%++, arXiv 2404.02936). None where the moments were not asked for.
    pub fn min_k_plus_plus(&self, share: f64) -> Option<f64> {
        /// Variances below count as this, as in OpenUnlearning.
        const LEAST: f64 = 1e-6;
        if self.moments.len() < self.len() {
            return None;
        }
        let standardised = |(&logprob, [mean, variance]): (&f32, &[f64; 2])| {
            let variance = if *variance < LEAST { LEAST } else { *variance };
            (f64::from(logprob) - mean) / variance.sqrt()
        };
        let z = self.logprobs[..self.len()].iter().zip(&self.moments).map(standardised);
        lowest(z.collect(), share).map(|mean| -mean)
    }

    /// Minus the log-likelihood of the answer behind other texts (`behind`) over its own (ReCaLL, arXiv 2406.15968): texts that the model
    /// was trained on lose more from what stands before them. None without an answer, or where it is certain anyway.
    pub fn recall(&self, behind: &Self) -> Option<f64> {
        let sum = |score: &Self| score.logprobs[..score.len()].iter().map(|&x| f64::from(x)).sum::<f64>();
        let own = sum(self);
        (self.len() > 0 && own != 0.0).then(|| -sum(behind) / own)
    }

    /// `count` of the answer's tokens. Where there are no log-probabilities there is no first choice either.
    fn share(&self, count: usize) -> Option<f64> {
        let len = self.len();
        let broken = self.logprobs[..len].iter().any(|x| x.is_nan());
        (len > 0).then(|| if broken { f64::NAN } else { count as f64 / len as f64 })
    }

    /// Targets of the answer itself.
    fn len(&self) -> usize {
        self.logprobs.len() - usize::from(self.ended)
    }
}

fn mean(values: &[f32]) -> Option<f64> {
    let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
    (!values.is_empty()).then(|| sum / values.len() as f64)
}

/// Mean of the lowest `share`, at least one; NaN where there is one.
fn lowest(mut values: Vec<f64>, share: f64) -> Option<f64> {
    if values.iter().any(|x| x.is_nan()) {
        return Some(f64::NAN);
    }
    values.sort_by(f64::total_cmp);
    values.truncate(((share * values.len() as f64) as usize).max(1));
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    /// Logits of the toy batch: 2 sin(1 + 0.7 i + 0.9 t + 1.3 v), 7 tokens.
    fn toy(sample: usize, labels: &[(usize, i64)]) -> TextScore {
        let mut score = TextScore { ended: true, ..TextScore::default() };
        for &(at, label) in labels {
            let (i, t) = (sample as f64, (at - 1) as f64);
            let logits: Vec<f64> = (0..7).map(|v| 2.0 * (1.0 + 0.7 * i + 0.9 * t + 1.3 * f64::from(v)).sin()).collect();
            let logp = Tensor::from_slice(&logits).log_softmax(0, Kind::Double);
            let p = logp.exp();
            let mean = (&p * &logp).sum(Kind::Double).double_value(&[]);
            let square = (&p * logp.square()).sum(Kind::Double).double_value(&[]);
            score.logprobs.push(logp.double_value(&[label]) as f32);
            score.correct.push(logp.argmax(0, false).int64_value(&[]) == label);
            score.moments.push([mean, square - mean * mean]);
        }
        score
    }

    fn near(got: Option<f64>, want: f64) {
        let got = got.unwrap();
        assert!((got - want).abs() < 1e-6, "{got} instead of {want}");
    }

    /// Values that official code gives for a toy batch.
    #[test]
    fn golden_values_of_a_toy_batch() {
        let first = toy(0, &[(2, 1), (3, 4), (4, 3), (5, 3)]);
        near(first.nll(), 1.256_176_114_0);
        near(first.probability(), 0.284_740_763_6);
        near(first.exact_memorisation(), 2.0 / 3.0);
        near(first.extraction_strength(Floor::Zero), 2.0 / 3.0);
        near(first.extraction_strength(Floor::OneToken), 2.0 / 3.0);
        near(first.min_k(0.4), 3.032_633_65);
        near(first.min_k_plus_plus(0.4), 2.157_432_74);
        let second = toy(1, &[(1, 0), (2, 4), (3, 3), (4, 4), (5, 2)]);
        near(second.nll(), 1.152_064_107_8);
        near(second.probability(), 0.315_983_871_0);
        near(second.exact_memorisation(), 0.75);
        near(second.extraction_strength(Floor::Zero), 0.0);
        near(second.extraction_strength(Floor::OneToken), 0.25);
        near(second.min_k(0.4), 2.800_443_58);
        near(second.min_k_plus_plus(0.4), 1.678_862_69);
    }

    #[test]
    fn what_is_not_there_is_no_zero() {
        let nothing = TextScore::default();
        assert_eq!(nothing.nll(), None);
        assert_eq!(nothing.probability(), None);
        let only_the_end = TextScore { logprobs: vec![-1.0], correct: vec![true], moments: vec![], ended: true };
        assert_eq!(only_the_end.exact_memorisation(), None);
        assert_eq!(only_the_end.extraction_strength(Floor::OneToken), None);
        assert_eq!(only_the_end.min_k(0.4), None);
        assert_eq!(only_the_end.min_k_plus_plus(0.4), None);
        let broken =
            TextScore { logprobs: vec![-1.0, f32::NAN], correct: vec![true; 2], moments: vec![], ended: false };
        assert!(broken.nll().unwrap().is_nan() && broken.min_k(0.4).unwrap().is_nan());
        assert!(broken.exact_memorisation().unwrap().is_nan());
        assert!(broken.extraction_strength(Floor::Zero).unwrap().is_nan());
        assert_eq!(broken.min_k_plus_plus(0.4), None, "moments were not asked for");
    }
}
