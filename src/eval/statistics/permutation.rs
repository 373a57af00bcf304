//! Whether paired values differ on average: Fisher's sign-flip permutation test.

use super::random::Draws;
use super::{StatisticsError, check};

/// Result of a two-sided test of pairs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairedTest {
    /// Mean of `left - right`.
    pub difference: f64,
    pub p_value: f64,
    /// All sign patterns were counted; else a sample of them was drawn.
    pub exact: bool,
}

/// Up to this many pairs all sign patterns are counted: half a million.
const EXACT_PAIRS: usize = 20;
/// Patterns drawn for longer samples; the smallest p-value is then 1e-5.
const DRAWN: usize = 99_999;

/// Tests whether the mean of `left - right` is 0. Exact up to 20 pairs; above, 99,999 sign patterns are drawn from the seed and the observed one
/// counts too, so that the p-value is never 0.
///
/// # Errors
/// No pairs, lists of unequal length, or a value that is not finite.
pub fn paired_permutation(left: &[f64], right: &[f64], seed: u64) -> Result<PairedTest, StatisticsError> {
    let what = "paired permutation test";
    if left.len() != right.len() {
        return Err(StatisticsError::Lengths { what, left: left.len(), right: right.len() });
    }
    for sample in [left, right] {
        check(what, sample, "a finite number", f64::is_finite)?;
    }
    let differences: Vec<f64> = left.iter().zip(right).map(|(a, b)| a - b).collect();
    let sum: f64 = differences.iter().sum();
    // sums of the same terms in another order must not count as smaller
    let least = sum.abs() - 1e-12 * differences.iter().map(|x| x.abs()).sum::<f64>();
    let flipped = |signs: &dyn Fn(usize) -> bool| -> f64 {
        differences.iter().enumerate().map(|(index, x)| if signs(index) { -x } else { *x }).sum()
    };
    let exact = differences.len() <= EXACT_PAIRS;
    let p_value = if exact {
        // a pattern and its opposite are equally far from 0: the last sign stays
        let patterns = 1u32 << (differences.len() - 1);
        let far = (0..patterns).filter(|pattern| flipped(&|index| pattern >> index & 1 == 1).abs() >= least).count();
        far as f64 / f64::from(patterns)
    } else {
        let mut draws = Draws::new(seed, "paired permutation");
        let mut far = 1;
        for _ in 0..DRAWN {
            let bits: Vec<u64> = (0..differences.len().div_ceil(64)).map(|_| draws.bits()).collect();
            far += usize::from(flipped(&|index| bits[index / 64] >> (index % 64) & 1 == 1).abs() >= least);
        }
        far as f64 / (DRAWN + 1) as f64
    };
    Ok(PairedTest { difference: sum / differences.len() as f64, p_value, exact })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_pairs_are_counted() {
        // all five differences point one way: 2 of 32 patterns
        let test = paired_permutation(&[2.0, 3.0, 4.0, 5.0, 6.0], &[1.0; 5], 0).unwrap();
        assert_eq!((test.p_value, test.difference, test.exact), (2.0 / 32.0, 3.0, true));
        assert_eq!(paired_permutation(&[1.0, 2.0], &[1.0, 2.0], 0).unwrap().p_value, 1.0);
        assert_eq!(paired_permutation(&[1.0, 2.0], &[2.0, 1.0], 0).unwrap().p_value, 1.0);
    }

    /// The drawn p-value is within five standard errors of the normal approximation.
    #[test]
    fn many_pairs_are_drawn() {
        let left: Vec<f64> = (0..200).map(|i| (f64::from(i) * 0.754877666).fract() + 0.04).collect();
        let right: Vec<f64> = (0..200).map(|i| (f64::from(i) * 0.569840296).fract()).collect();
        let test = paired_permutation(&left, &right, 3).unwrap();
        let squares: f64 = left.iter().zip(&right).map(|(a, b)| (a - b).powi(2)).sum();
        let z = 200.0 * test.difference / squares.sqrt();
        // Abramowitz and Stegun 26.2.17
        let t = 1.0 / (1.0 + 0.2316419 * z.abs());
        let tail = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
            * t
            * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))));
        assert!(!test.exact && tail > 0.001, "{test:?} {tail}");
        let error = (2.0 * tail * (1.0 - 2.0 * tail) / 1e5).sqrt();
        assert!((test.p_value - 2.0 * tail).abs() < 5.0 * error + 0.002, "{test:?} and {}", 2.0 * tail);
        assert_eq!(test, paired_permutation(&left, &right, 3).unwrap());
        let far = paired_permutation(&vec![1.0; 100], &vec![0.0; 100], 0).unwrap();
        assert_eq!(far.p_value, 1e-5);
    }

    #[test]
    fn what_is_no_pair_is_refused() {
        let error = paired_permutation(&[1.0], &[1.0, 2.0], 0).unwrap_err().to_string();
        assert_eq!(error, "paired permutation test: 1 values beside 2, expected as many");
        assert!(paired_permutation(&[], &[], 0).is_err());
        assert!(paired_permutation(&[f64::NAN], &[0.0], 0).is_err());
    }
}
