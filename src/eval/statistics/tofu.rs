//! TOFU's per-item numbers and aggregates (arXiv 2401.06121) as its code and open-unlearning compute them.

use super::{StatisticsError, check, harmonic_mean, is_share, mean};

/// Geometric mean of the wrong answers' probabilities over the probability of the right one.
///
/// All are mean log-probabilities of an answer's tokens; `right` is the paraphrased answer on forget and retain sets and the plain one on
/// real authors and world facts. (The paper's formula has an arithmetic mean of raw probabilities; every published number
/// uses this one.) Above 1 the model prefers wrong answers. May be infinite, where the right answer's probability is 0.
///
/// # Errors
/// No wrong answer, or a log-probability that is NaN or above 0.
pub fn truth_ratio(right: f64, wrong: &[f64]) -> Result<f64, StatisticsError> {
    log_probabilities("truth ratio", right, wrong)?;
    let ratio = (wrong.iter().sum::<f64>() / wrong.len() as f64 - right).exp();
    if ratio.is_nan() {
        return Err(StatisticsError::Undefined(
            "truth ratio: the right answer and a wrong one both have probability 0".to_owned(),
        ));
    }
    Ok(ratio)
}

/// open-unlearning's `prob_mean`: P(right) / (P(right) + geometric mean of P(wrong)), from mean log-probabilities as in [`truth_ratio`].
///
/// # Errors
/// As [`truth_ratio`].
pub fn knowledge_extent(right: f64, wrong: &[f64]) -> Result<f64, StatisticsError> {
    Ok(1.0 / (1.0 + truth_ratio(right, wrong)?))
}

/// P(right) / (P(right) + sum of P(wrong)): the "probability" of real authors and world facts, from mean log-probabilities.
///
/// # Errors
/// No wrong answer, or a log-probability that is NaN or above 0; all of them -inf.
pub fn choice_probability(right: f64, wrong: &[f64]) -> Result<f64, StatisticsError> {
    log_probabilities("choice probability", right, wrong)?;
    let most = wrong.iter().copied().fold(right, f64::max);
    if most == f64::NEG_INFINITY {
        return Err(StatisticsError::Undefined("choice probability: all answers have probability 0".to_owned()));
    }
    let share = |x: f64| (x - most).exp();
    Ok(share(right) / (share(right) + wrong.iter().map(|&x| share(x)).sum::<f64>()))
}

fn log_probabilities(what: &'static str, right: f64, wrong: &[f64]) -> Result<(), StatisticsError> {
    let good = |x: f64| x <= 0.0;
    check(what, &[right], "a log-probability", good)?;
    check(what, wrong, "a log-probability", good)
}

/// The forget set's aggregate of truth ratios: mean of min(R, 1/R). 1 where right and wrong are equally likely.
///
/// # Errors
/// No values, or one that is NaN or negative.
pub fn forget_truth_ratio(ratios: &[f64]) -> Result<f64, StatisticsError> {
    check("forget truth ratio", ratios, "a number of at least 0", |x| x >= 0.0)?;
    mean(&ratios.iter().map(|&r| r.min(1.0 / r)).collect::<Vec<_>>())
}

/// The other sets' aggregate: mean of max(0, 1 - R).
///
/// # Errors
/// No values, or one that is NaN or negative.
pub fn utility_truth_ratio(ratios: &[f64]) -> Result<f64, StatisticsError> {
    check("truth ratio", ratios, "a number of at least 0", |x| x >= 0.0)?;
    mean(&ratios.iter().map(|&r| (1.0 - r).max(0.0)).collect::<Vec<_>>())
}

/// One set's three parts of the model utility.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SetUtility {
    pub probability: f64,
    /// ROUGE-L recall, stemmed.
    pub rouge: f64,
    /// [`utility_truth_ratio`].
    pub truth_ratio: f64,
}

/// The nine parts of the model utility.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelUtility {
    pub retain: SetUtility,
    pub real_authors: SetUtility,
    pub world_facts: SetUtility,
}

impl ModelUtility {
    /// Harmonic mean of the nine.
    ///
    /// # Errors
    /// A part that is not between 0 and 1.
    pub fn value(&self) -> Result<f64, StatisticsError> {
        let parts: Vec<f64> = [self.retain, self.real_authors, self.world_facts]
            .iter()
            .flat_map(|set| [set.probability, set.rouge, set.truth_ratio])
            .collect();
        check("model utility", &parts, "a share between 0 and 1", is_share)?;
        harmonic_mean(&parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(rouge: f64, probability: f64, truth_ratio: f64) -> SetUtility {
        SetUtility { probability, rouge, truth_ratio }
    }

    /// The logs in locuslab/tofu, aggregated by that repository's own code.
    #[test]
    fn published_utilities() {
        let published = [
            (0.622677, [(0.985655, 0.989527, 0.474699), (0.933, 0.455482, 0.596229), (0.882479, 0.418562, 0.539033)]),
            (0.62678, [(0.988889, 0.989498, 0.472735), (0.9155, 0.460303, 0.599579), (0.910256, 0.422244, 0.54873)]),
            (0.613745, [(0.975811, 0.988897, 0.470977), (0.923, 0.434087, 0.570681), (0.897436, 0.414326, 0.544198)]),
            (0.600577, [(0.979889, 0.988267, 0.462922), (0.953, 0.41673, 0.544175), (0.886752, 0.402494, 0.527928)]),
            (0.522074, [(0.929253, 0.926088, 0.482683), (0.415667, 0.37736, 0.456009), (0.77735, 0.408998, 0.492337)]),
            (0.518603, [(0.931592, 0.928359, 0.484195), (0.447333, 0.368905, 0.440166), (0.75, 0.398851, 0.480811)]),
        ];
        for (want, [retain, real_authors, world_facts]) in published {
            let set = |(rouge, probability, truth_ratio)| set(rouge, probability, truth_ratio);
            let utility =
                ModelUtility { retain: set(retain), real_authors: set(real_authors), world_facts: set(world_facts) };
            let value = utility.value().unwrap();
            assert!((value - want).abs() < 2e-6, "{value}, published {want}");
        }
    }

    #[test]
    fn ratios_of_made_up_items() {
        let ln = f64::ln;
        // geometric mean of 0.1 and 0.4 is 0.2
        assert!((truth_ratio(ln(0.5), &[ln(0.1), ln(0.4)]).unwrap() - 0.4).abs() < 1e-15);
        assert!((knowledge_extent(ln(0.5), &[ln(0.1), ln(0.4)]).unwrap() - 0.5 / 0.7).abs() < 1e-15);
        assert!((choice_probability(ln(0.5), &[ln(0.1), ln(0.4)]).unwrap() - 0.5).abs() < 1e-15);
        assert_eq!(choice_probability(-5000.0, &[-5000.0]).unwrap(), 0.5);
        assert_eq!(truth_ratio(f64::NEG_INFINITY, &[-1.0]).unwrap(), f64::INFINITY);
        assert_eq!(forget_truth_ratio(&[2.0, 0.5, 1.0, f64::INFINITY]).unwrap(), 0.5);
        assert_eq!(utility_truth_ratio(&[2.0, 0.5, 0.0]).unwrap(), 0.5);
    }

    #[test]
    fn what_is_no_probability_is_refused() {
        let error = truth_ratio(0.1, &[-1.0]).unwrap_err().to_string();
        assert_eq!(error, "truth ratio: value 0 (counted from 0) is 0.1, expected a log-probability");
        assert!(truth_ratio(-1.0, &[]).is_err());
        assert!(truth_ratio(f64::NEG_INFINITY, &[f64::NEG_INFINITY]).is_err());
        assert!(choice_probability(f64::NEG_INFINITY, &[f64::NEG_INFINITY]).is_err());
        assert!(forget_truth_ratio(&[f64::NAN]).is_err() && utility_truth_ratio(&[-0.5]).is_err());
        let mut utility = ModelUtility {
            retain: set(0.5, 0.5, 0.5),
            real_authors: set(0.5, 0.5, 0.5),
            world_facts: set(0.5, 0.5, 0.5),
        };
        assert_eq!(utility.value().unwrap(), 0.5);
        utility.world_facts.rouge = 1.5;
        let error = utility.value().unwrap_err().to_string();
        assert_eq!(error, "model utility: value 7 (counted from 0) is 1.5, expected a share between 0 and 1");
    }
}
