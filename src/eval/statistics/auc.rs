//! How well a score tells two groups apart: ROC AUC, its bootstrap interval, and MUSE's PrivLeak.

use super::random::Draws;
use super::{StatisticsError, check};

/// A range that a resampled value falls into with the given probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

/// Area under the ROC curve: the probability that a random positive scores higher than a random negative, a tie counting half.
///
/// # Errors
/// A group without values, or a NaN.
pub fn roc_auc(positive: &[f64], negative: &[f64]) -> Result<f64, StatisticsError> {
    let ranked = Ranked::new(positive, negative)?;
    Ok(ranked.auc(&ranked.counts))
}

/// The percentile interval of [`roc_auc`] over `resamples` bootstrap samples, drawn within each group. The same seed gives the same
/// interval on every machine.
///
/// # Errors
/// As [`roc_auc`]; a `level` not between 0 and 1; no resamples.
pub fn roc_auc_interval(
    positive: &[f64],
    negative: &[f64],
    level: f64,
    resamples: usize,
    seed: u64,
) -> Result<Interval, StatisticsError> {
    let ranked = Ranked::new(positive, negative)?;
    let mut draws = Draws::new(seed, "roc auc");
    percentile_interval(level, resamples, || {
        let mut counts = vec![[0u32; 2]; ranked.counts.len()];
        for (group, places) in ranked.places.iter().enumerate() {
            for _ in 0..places.len() {
                counts[places[draws.below(places.len())]][group] += 1;
            }
        }
        ranked.auc(&counts)
    })
}

/// MUSE's PrivLeak (arXiv 2407.06460) as open-unlearning computes it, from the AUC of an attack on the model and on the retrained
/// one: 0 is as private as retraining, below 0 forgot too little, above 0 too much. Unit: percent.
///
/// The AUC here has the forget items as label 0: 1 is a perfect attack on a model that remembers.
pub fn priv_leak(auc: f64, retrained_auc: f64) -> f64 {
    (retrained_auc - auc) / (1.0 - retrained_auc + 1e-10) * 100.0
}

/// The share `level` in the middle of `resamples` values of `draw`, interpolated as numpy's default quantile.
pub(super) fn percentile_interval(
    level: f64,
    resamples: usize,
    draw: impl FnMut() -> f64,
) -> Result<Interval, StatisticsError> {
    if !(level > 0.0 && level < 1.0) || resamples == 0 {
        return Err(StatisticsError::Undefined(format!(
            "bootstrap interval: level {level} with {resamples} resamples, expected a level between 0 and 1 and at least 1 resample"
        )));
    }
    let mut values: Vec<f64> = std::iter::repeat_with(draw).take(resamples).collect();
    values.sort_by(f64::total_cmp);
    let quantile = |q: f64| {
        let at = q * (resamples - 1) as f64;
        let (below, above) = (at.floor() as usize, at.ceil() as usize);
        values[below] + (at - at.floor()) * (values[above] - values[below])
    };
    Ok(Interval { low: quantile((1.0 - level) / 2.0), high: quantile((1.0 + level) / 2.0) })
}

/// The distinct values of both groups in ascending order.
struct Ranked {
    /// How often each value occurs among positives and negatives.
    counts: Vec<[u32; 2]>,
    /// The value of each member of a group.
    places: [Vec<usize>; 2],
}

impl Ranked {
    fn new(positive: &[f64], negative: &[f64]) -> Result<Self, StatisticsError> {
        check("AUC, positives", positive, "a number", |x| !x.is_nan())?;
        check("AUC, negatives", negative, "a number", |x| !x.is_nan())?;
        let of = |group: usize, sample: &[f64]| sample.iter().map(|&x| (x, group)).collect::<Vec<_>>();
        let mut all = [of(0, positive), of(1, negative)].concat();
        all.sort_by(|(x, _), (y, _)| x.partial_cmp(y).expect("invariant: no NaN"));
        let mut ranked = Self { counts: Vec::new(), places: [Vec::new(), Vec::new()] };
        let mut last = f64::NAN;
        for (value, group) in all {
            if value != last {
                ranked.counts.push([0; 2]);
                last = value;
            }
            let place = ranked.counts.len() - 1;
            ranked.counts[place][group] += 1;
            ranked.places[group].push(place);
        }
        Ok(ranked)
    }

    fn auc(&self, counts: &[[u32; 2]]) -> f64 {
        let (mut below, mut wins) = (0.0, 0.0);
        for [positives, negatives] in counts.iter().map(|pair| pair.map(f64::from)) {
            wins += positives * (below + 0.5 * negatives);
            below += negatives;
        }
        wins / (self.places[0].len() as f64 * self.places[1].len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_counted() {
        let (positive, negative) = ([0.1, 0.4, 0.4, 0.9], [0.4, 0.2, f64::NEG_INFINITY]);
        let pairs = positive.iter().flat_map(|p| negative.iter().map(move |n| (p, n)));
        let wins: f64 = pairs
            .map(|(p, n)| {
                if p > n {
                    1.0
                } else if p == n {
                    0.5
                } else {
                    0.0
                }
            })
            .sum();
        assert_eq!(roc_auc(&positive, &negative).unwrap(), wins / 12.0);
        assert_eq!(roc_auc(&[2.0], &[1.0]).unwrap(), 1.0);
        assert_eq!(roc_auc(&[1.0; 5], &[1.0; 3]).unwrap(), 0.5);
    }

    /// For shifted normal-like scores, DeLong's standard error is within a few percent of the bootstrap's width.
    #[test]
    fn the_interval_is_as_wide_as_delongs() {
        let score = |i: usize, shift: f64| shift + (i as f64 * 0.754877666).fract() + (i as f64 * 0.569840296).fract();
        let positive: Vec<f64> = (0..150).map(|i| score(i, 0.3)).collect();
        let negative: Vec<f64> = (0..120).map(|i| score(i + 1000, 0.0)).collect();
        let auc = roc_auc(&positive, &negative).unwrap();
        let variance = |of: &[f64], other: &[f64], sign: f64| {
            let parts: Vec<f64> = of
                .iter()
                .map(|x| other.iter().filter(|&y| sign * (x - y) > 0.0).count() as f64 / other.len() as f64)
                .collect();
            let mean = parts.iter().sum::<f64>() / parts.len() as f64;
            let squares: f64 = parts.iter().map(|x| (x - mean).powi(2)).sum();
            squares / (parts.len() - 1) as f64 / parts.len() as f64
        };
        let error = (variance(&positive, &negative, 1.0) + variance(&negative, &positive, -1.0)).sqrt();
        let interval = roc_auc_interval(&positive, &negative, 0.95, 2000, 7).unwrap();
        assert!(interval.low < auc && auc < interval.high, "{interval:?} around {auc}");
        let width = interval.high - interval.low;
        assert!((width / (2.0 * 1.96 * error) - 1.0).abs() < 0.1, "{width} and {}", 2.0 * 1.96 * error);
        assert_eq!(interval, roc_auc_interval(&positive, &negative, 0.95, 2000, 7).unwrap());
        assert_ne!(interval, roc_auc_interval(&positive, &negative, 0.95, 2000, 8).unwrap());
    }

    #[test]
    fn leaks_have_the_sign_of_their_direction() {
        assert!(priv_leak(0.5, 0.5).abs() < 1e-9);
        assert!(priv_leak(0.99, 0.5) < -90.0, "remembers");
        assert!(priv_leak(0.01, 0.5) > 90.0, "forgot more than retraining");
    }

    #[test]
    fn what_is_no_group_is_refused() {
        assert_eq!(roc_auc(&[], &[1.0]).unwrap_err().to_string(), "AUC, positives: no values, expected at least 1");
        assert!(roc_auc(&[1.0], &[f64::NAN]).is_err());
        assert!(roc_auc_interval(&[1.0], &[0.0], 1.0, 10, 0).is_err());
        assert!(roc_auc_interval(&[1.0], &[0.0], 0.9, 0, 0).is_err());
    }
}
