//! Numbers from numbers: tests, curves and aggregates over per-item values. Knows no tensors, models or files.
//!
//! Nothing here turns what cannot be computed into a zero: an empty sample, a NaN or a probability above 1 is an error that
//! names the value and its place.

mod auc;
mod kolmogorov_smirnov;
mod means;
mod overall;
mod permutation;
mod random;
mod tofu;
mod tradeoff;

pub use auc::{Interval, priv_leak, roc_auc, roc_auc_interval};
pub use kolmogorov_smirnov::{KolmogorovSmirnov, kolmogorov_smirnov};
pub use means::{harmonic_mean, mean, mean_interval};
pub use overall::{Memorisation, Overall, overall, privacy_closeness};
pub use permutation::{PairedTest, paired_permutation};
pub use tofu::{
    ModelUtility, SetUtility, choice_probability, forget_truth_ratio, knowledge_extent, truth_ratio,
    utility_truth_ratio,
};
pub use tradeoff::{Aues, Mu95, Mu95Rule, TradeoffPoint, UtilityPoint, aues, mu95};

/// Why a statistic has no value.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum StatisticsError {
    #[error("{what}: no values, expected at least {expected}")]
    TooFew { what: &'static str, expected: usize },

    #[error("{what}: value {index} (counted from 0) is {found}, expected {expected}")]
    Value { what: &'static str, index: usize, found: f64, expected: &'static str },

    #[error("{what}: {left} values beside {right}, expected as many")]
    Lengths { what: &'static str, left: usize, right: usize },

    #[error("{0}")]
    Undefined(String),
}

/// Refuses an empty sample, and any value that `good` does not accept.
fn check(
    what: &'static str,
    values: &[f64],
    expected: &'static str,
    good: impl Fn(f64) -> bool,
) -> Result<(), StatisticsError> {
    if values.is_empty() {
        return Err(StatisticsError::TooFew { what, expected: 1 });
    }
    match values.iter().position(|&x| !good(x)) {
        Some(index) => Err(StatisticsError::Value { what, index, found: values[index], expected }),
        None => Ok(()),
    }
}

/// A share or probability.
fn is_share(x: f64) -> bool {
    (0.0..=1.0).contains(&x)
}

#[cfg(test)]
mod tests;
