//! Means, and how sure they are.

use super::auc::{Interval, percentile_interval};
use super::random::Draws;
use super::{StatisticsError, check};

/// # Errors
/// No values, or one that is not finite.
pub fn mean(values: &[f64]) -> Result<f64, StatisticsError> {
    check("mean", values, "a finite number", f64::is_finite)?;
    Ok(values.iter().sum::<f64>() / values.len() as f64)
}

/// One zero makes it zero, as in `scipy.stats.hmean`.
///
/// # Errors
/// No values, or one that is negative or not finite.
pub fn harmonic_mean(values: &[f64]) -> Result<f64, StatisticsError> {
    check("harmonic mean", values, "a finite number of at least 0", |x| x.is_finite() && x >= 0.0)?;
    if values.contains(&0.0) {
        return Ok(0.0);
    }
    Ok(values.len() as f64 / values.iter().map(|x| 1.0 / x).sum::<f64>())
}

/// The percentile interval of the mean over `resamples` bootstrap samples.
///
/// # Errors
/// As [`mean`]; a `level` not between 0 and 1; no resamples.
pub fn mean_interval(values: &[f64], level: f64, resamples: usize, seed: u64) -> Result<Interval, StatisticsError> {
    mean(values)?;
    let mut draws = Draws::new(seed, "mean");
    percentile_interval(level, resamples, || {
        let sum: f64 = values.iter().map(|_| values[draws.below(values.len())]).sum();
        sum / values.len() as f64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harmonic_means() {
        assert_eq!(harmonic_mean(&[1.0, 0.5]).unwrap(), 2.0 / 3.0);
        assert_eq!(harmonic_mean(&[0.9, 0.0]).unwrap(), 0.0);
        assert_eq!(harmonic_mean(&[0.25; 9]).unwrap(), 0.25);
        let error = harmonic_mean(&[0.5, -0.1]).unwrap_err().to_string();
        assert_eq!(error, "harmonic mean: value 1 (counted from 0) is -0.1, expected a finite number of at least 0");
        assert!(harmonic_mean(&[]).is_err() && mean(&[]).is_err());
        assert!(harmonic_mean(&[f64::INFINITY]).is_err() && mean(&[f64::NAN]).is_err());
    }

    /// The bootstrap of a mean has the width of the normal approximation.
    #[test]
    fn an_interval_is_as_wide_as_the_standard_error() {
        let values: Vec<f64> = (0..400).map(|i| (f64::from(i) * 0.754877666).fract()).collect();
        let interval = mean_interval(&values, 0.95, 2000, 1).unwrap();
        let width = 2.0 * 1.96 * (1.0f64 / 12.0 / 400.0).sqrt();
        assert!(((interval.high - interval.low) / width - 1.0).abs() < 0.1, "{interval:?} and a width of {width}");
        assert!(interval.low < mean(&values).unwrap() && mean(&values).unwrap() < interval.high);
    }
}
