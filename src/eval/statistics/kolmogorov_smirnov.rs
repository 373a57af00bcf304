//! The exact two-sample Kolmogorov-Smirnov test, TOFU's forget quality (arXiv 2401.06121).

use super::{StatisticsError, check};

/// A two-sided test of two samples coming from one continuous distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KolmogorovSmirnov {
    /// Largest distance of the two empirical distribution functions.
    pub statistic: f64,
    /// Exact; 0 only where it is below the smallest f64, about 1e-308.
    pub p_value: f64,
    /// Of the p-value, also where that is too small for an f64.
    pub log10_p: f64,
}

/// The exact test, as `scipy.stats.ks_2samp` up to 10,000 values. Values may be infinite; equal ones count as such in the statistic, and
/// the p-value is then an upper bound, as in scipy. Takes time proportional to the product of the lengths.
///
/// # Errors
/// An empty sample or a NaN.
pub fn kolmogorov_smirnov(left: &[f64], right: &[f64]) -> Result<KolmogorovSmirnov, StatisticsError> {
    for sample in [left, right] {
        check("Kolmogorov-Smirnov test", sample, "a number", |x| !x.is_nan())?;
    }
    let (m, n) = (left.len(), right.len());
    let distance = distance(left, right);
    let (p_value, log10_p) = exceedance(m, n, distance);
    Ok(KolmogorovSmirnov { statistic: distance as f64 / (m as f64 * n as f64), p_value, log10_p })
}

/// The statistic times `m n`: a whole number, so that ties and thirds are exact.
fn distance(left: &[f64], right: &[f64]) -> u64 {
    let sorted = |sample: &[f64]| {
        let mut sorted = sample.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted
    };
    let (left, right) = (sorted(left), sorted(right));
    let (mut i, mut j, mut most) = (0, 0, 0);
    while i < left.len() && j < right.len() {
        // `<=` and not a total order: -0 and 0 are one value
        let at = left[i].min(right[j]);
        i += left[i..].iter().take_while(|&&x| x <= at).count();
        j += right[j..].iter().take_while(|&&x| x <= at).count();
        most = most.max((i * right.len()).abs_diff(j * left.len()));
    }
    most as u64
}

/// Probability that the statistic of two samples of `m` and `n` values is `distance / (m n)` or more, and its log10.
///
/// All orders of the joint sample are equally likely under the hypothesis; one is a path on a lattice from (0, 0) to (m, n), and its statistic reaches
/// the distance where the path touches a point with `|i n - j m| >= distance`. A random path to (i, j) comes from (i-1, j)
/// with probability i / (i + j). So the share of paths to a point that have touched is 1 at a point outside and else the mixture
/// of two shares: sums of positive terms, without cancellation from the bulk down to the floor 2 / C(m + n, m).
fn exceedance(m: usize, n: usize, distance: u64) -> (f64, f64) {
    if distance == 0 {
        return (1.0, 0.0);
    }
    let p = walk(m, n, distance, [0.0, 1.0], |i, above, j, left| (i * above + j * left) / (i + j));
    if p > 1e-290 {
        return (p, p.log10());
    }
    let ln_p = walk(m, n, distance, [f64::NEG_INFINITY, 0.0], |i, above: f64, j, left: f64| {
        let (a, b) = (i.ln() + above, j.ln() + left);
        let (low, high) = if a < b { (a, b) } else { (b, a) };
        let sum = if low == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() };
        sum - (i + j).ln()
    });
    (ln_p.exp(), ln_p / std::f64::consts::LN_10)
}

/// The share at (m, n), row by row; `mix(i, share at (i-1, j), j, share at (i, j-1))`.
fn walk(m: usize, n: usize, distance: u64, [none, all]: [f64; 2], mix: impl Fn(f64, f64, f64, f64) -> f64) -> f64 {
    let outside = |i: usize, j: usize| (i * n).abs_diff(j * m) as u64 >= distance;
    let mut row: Vec<f64> = (0..=n).map(|j| if outside(0, j) { all } else { none }).collect();
    for j in 1..=n {
        // along the edge there is one path
        row[j] = if row[j - 1] == all { all } else { row[j] };
    }
    for i in 1..=m {
        row[0] = if row[0] == all || outside(i, 0) { all } else { none };
        for j in 1..=n {
            row[j] = if outside(i, j) { all } else { mix(i as f64, row[j], j as f64, row[j - 1]) };
        }
    }
    row[n]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(n: u64, k: u64) -> f64 {
        (1..=k).map(|i| (n - k + i) as f64 / i as f64).product()
    }

    /// TOFU's own logs give these p-values for these statistics (`scipy.stats.ks_2samp`): bulk, tail, unequal sizes.
    #[test]
    fn published_statistics_have_their_published_p_values() {
        for (statistic, m, n, want) in [
            (0.396667, 300, 300, 1.834066e-21),
            (0.38, 300, 300, 1.096624e-19),
            (0.38, 300, 200, 6.504459e-16),
            (0.386667, 300, 200, 1.783053e-16),
            (0.428333, 300, 40, 2.345177e-06),
            (0.476667, 300, 40, 7.865505e-08),
            (0.346667, 300, 300, 2.194274e-16),
            (0.341667, 300, 200, 6.866558e-13),
            (0.371667, 300, 40, 7.367328e-05),
        ] {
            let distance = (statistic * (m * n) as f64 / 20.0).round() as u64 * 20;
            let (p, log10) = exceedance(m, n, distance);
            assert!((p / want - 1.0).abs() < 1e-6, "{statistic} of {m} and {n}: {p:e}, published {want:e}");
            assert!((log10 - p.log10()).abs() < 1e-12);
        }
    }

    /// Samples without overlap: two of the C(2n, n) orders. The published floors of TOFU's item counts.
    #[test]
    fn separate_samples_reach_the_floor() {
        for (n, published) in [(40, 1.9e-23), (200, 1.94e-119), (300, 1.48e-179), (400, 1.06e-239)] {
            let low: Vec<f64> = (0..n).map(f64::from).collect();
            let high: Vec<f64> = low.iter().map(|x| x + f64::from(n)).collect();
            let test = kolmogorov_smirnov(&low, &high).unwrap();
            assert_eq!(test.statistic, 1.0);
            let exact = 2.0 / choose(2 * n as u64, n as u64);
            assert!((test.p_value / exact - 1.0).abs() < 1e-11, "{n}: {:e} and {exact:e}", test.p_value);
            assert!((test.p_value / published - 1.0).abs() < 0.025, "{n}: {:e}", test.p_value);
            assert!((test.log10_p - exact.log10()).abs() < 1e-10);
        }
    }

    /// Where an f64 holds no p-value any more, its logarithm is still exact: log10(2) - log10 C(2n, n), by sums of logarithms.
    #[test]
    fn the_logarithm_goes_below_the_smallest_number() {
        let n = 700;
        let (p, log10) = exceedance(n, n, (n * n) as u64);
        let want = 2f64.log10() - (1..=n).map(|i| ((n + i) as f64 / i as f64).log10()).sum::<f64>();
        assert_eq!(p, 0.0);
        assert!((log10 - want).abs() < 1e-9, "{log10} and {want}");
        // unequal sizes: one order of the C(m + n, m) on either side
        let (_, log10) = exceedance(1000, 600, 600_000);
        let want = 2f64.log10() - (1..=600).map(|i| (1000 + i) as f64 / i as f64).map(f64::log10).sum::<f64>();
        assert!((log10 - want).abs() < 1e-9, "{log10} and {want}");
    }

    /// Every order of every small pair of samples, one by one.
    #[test]
    fn small_samples_are_counted() {
        for (m, n) in [(1, 1), (3, 3), (4, 2), (5, 3), (2, 7), (6, 6)] {
            let mut counts = vec![0u64; m * n + 1];
            for order in 0u32..1 << (m + n) {
                if order.count_ones() as usize == m {
                    let (mut left, mut right) = (Vec::new(), Vec::new());
                    for at in 0..m + n {
                        if order >> at & 1 == 1 { left.push(at as f64) } else { right.push(at as f64) }
                    }
                    counts[distance(&left, &right) as usize] += 1;
                }
            }
            let total = counts.iter().sum::<u64>() as f64;
            for distance in 0..counts.len() {
                let want = counts[distance..].iter().sum::<u64>() as f64 / total;
                let (p, _) = exceedance(m, n, distance as u64);
                assert!((p - want).abs() < 1e-14, "{m}, {n}, {distance}: {p} and {want}");
            }
        }
    }

    #[test]
    fn equal_values_step_together() {
        let test = kolmogorov_smirnov(&[1.0, 1.0, 2.0], &[1.0, 2.0, 2.0]).unwrap();
        assert!((test.statistic - 1.0 / 3.0).abs() < 1e-15);
        assert_eq!(kolmogorov_smirnov(&[-0.0, 0.0], &[0.0, -0.0]).unwrap().p_value, 1.0);
        assert_eq!(kolmogorov_smirnov(&[f64::INFINITY], &[1.0]).unwrap().statistic, 1.0);
    }

    #[test]
    fn what_is_no_sample_is_refused() {
        let error = kolmogorov_smirnov(&[0.5], &[]).unwrap_err().to_string();
        assert_eq!(error, "Kolmogorov-Smirnov test: no values, expected at least 1");
        let error = kolmogorov_smirnov(&[0.5, f64::NAN], &[1.0]).unwrap_err().to_string();
        assert_eq!(error, "Kolmogorov-Smirnov test: value 1 (counted from 0) is NaN, expected a number");
    }
}
