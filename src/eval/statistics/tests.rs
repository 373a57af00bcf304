//! Against scipy and scikit-learn: `tests/golden/statistics.json`, written by `tests/golden/metrics.py`.

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Golden {
    groups: Vec<Groups>,
    pairs: Vec<Pairs>,
    means: Vec<Means>,
}

#[derive(Debug, Deserialize)]
struct Groups {
    m: usize,
    n: usize,
    shift: f64,
    grid: f64,
    statistic: f64,
    p_value: f64,
    log10_p: f64,
    auc: f64,
}

#[derive(Debug, Deserialize)]
struct Pairs {
    n: usize,
    shift: f64,
    difference: f64,
    p_value: f64,
}

#[derive(Debug, Deserialize)]
struct Means {
    n: usize,
    harmonic_mean: f64,
}

fn golden() -> Golden {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/statistics.json"));
    serde_json::from_str(text).unwrap()
}

/// As `sample` of metrics.py.
fn sample(count: usize, start: usize, shift: f64, grid: f64) -> Vec<f64> {
    let value = |i: usize| {
        let at = (start + i) as f64;
        let x = at * 0.7548776662466927 % 1.0 + at * 0.5698402909980532 % 1.0 + shift;
        if grid > 0.0 { (x * grid - x * grid % 1.0) / grid } else { x }
    };
    (0..count).map(value).collect()
}

fn close(found: f64, want: f64, relative: f64) -> bool {
    (found - want).abs() <= relative * want.abs()
}

#[test]
fn kolmogorov_smirnov_is_exact() {
    let groups = golden().groups;
    assert_eq!(groups.len(), 80);
    for case in &groups {
        let (left, right) = (sample(case.m, 1, 0.0, case.grid), sample(case.n, 5000, case.shift, case.grid));
        let test = kolmogorov_smirnov(&left, &right).unwrap();
        assert!((test.statistic - case.statistic).abs() < 1e-12, "{test:?}, expected {case:?}");
        assert!(close(test.p_value, case.p_value, 1e-11), "{test:?}, expected {case:?}");
        assert!((test.log10_p - case.log10_p).abs() < 1e-10, "{test:?}, expected {case:?}");
        assert_eq!(kolmogorov_smirnov(&right, &left).unwrap().statistic, test.statistic);
    }
    // bulk, tail and below the smallest f64 are all there
    let lowest = groups.iter().map(|case| case.log10_p).fold(0.0, f64::min);
    assert!(lowest < -390.0 && groups.iter().any(|case| case.p_value > 0.5 && case.p_value < 1.0), "{lowest}");
}

#[test]
fn auc_is_scikit_learns() {
    for case in golden().groups {
        let (negative, positive) = (sample(case.m, 1, 0.0, case.grid), sample(case.n, 5000, case.shift, case.grid));
        let auc = roc_auc(&positive, &negative).unwrap();
        assert!((auc - case.auc).abs() < 1e-12, "{auc}, expected {case:?}");
    }
}

#[test]
fn permutation_test_is_scipys() {
    for case in golden().pairs {
        let test = paired_permutation(&sample(case.n, 1, case.shift, 0.0), &sample(case.n, 700, 0.0, 0.0), 0).unwrap();
        assert!((test.difference - case.difference).abs() < 1e-12, "{test:?}, expected {case:?}");
        assert!(test.exact && (test.p_value - case.p_value).abs() < 1e-12, "{test:?}, expected {case:?}");
    }
}

#[test]
fn harmonic_mean_is_scipys() {
    for case in golden().means {
        let mean = harmonic_mean(&sample(case.n, 1, 0.01, 0.0)).unwrap();
        assert!(close(mean, case.harmonic_mean, 1e-12), "{mean}, expected {case:?}");
    }
}
