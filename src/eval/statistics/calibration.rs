//! Methods at equal retention (Wang et al., arXiv 2406.09179): mixing an unlearned model back towards the original until it retains
//! enough.

use super::{StatisticsError, is_share};

/// How much of the original has to come back.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// Share of the original in the mixture `share * before + (1 - share) * after`: the smallest one tried that reaches the bar.
    pub share: f64,
    /// What the mixture retains.
    pub retained: f64,
    /// Every `(share, retained)` that was tried, in that order.
    pub tried: Vec<(f64, f64)>,
}

/// Finds the smallest share of the original at which the retain metric reaches `bar * retain metric of the original`, to within
/// `2^-halvings`, by bisection: retention is taken to rise with the share. `retained` measures the mixture of a share.
///
/// # Errors
/// Those of `retained`; a `bar` not between 0 and 1; a metric that is not finite; an original that retains nothing.
pub fn calibrate<E: From<StatisticsError>>(
    bar: f64,
    halvings: usize,
    mut retained: impl FnMut(f64) -> Result<f64, E>,
) -> Result<Calibration, E> {
    let undefined = |words: String| E::from(StatisticsError::Undefined(words));
    if !is_share(bar) || bar == 0.0 {
        return Err(undefined(format!("calibration: a bar of {bar}, expected a number above 0 and at most 1")));
    }
    let mut tried = Vec::new();
    let mut measure = |share: f64| -> Result<f64, E> {
        let value = retained(share)?;
        if !value.is_finite() {
            return Err(undefined(format!("calibration: at share {share} the retain metric is {value}")));
        }
        tried.push((share, value));
        Ok(value)
    };
    let original = measure(1.0)?;
    if original <= 0.0 {
        return Err(undefined(format!("calibration: the original retains {original}, expected more than 0")));
    }
    let target = bar * original;
    let (mut short, mut enough) = (0.0, (1.0, original));
    let after = measure(0.0)?;
    if after >= target {
        enough = (0.0, after);
    } else {
        for _ in 0..halvings {
            let middle = f64::midpoint(short, enough.0);
            let value = measure(middle)?;
            if value >= target {
                enough = (middle, value);
            } else {
                short = middle;
            }
        }
    }
    Ok(Calibration { share: enough.0, retained: enough.1, tried })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_found() {
        // retains share^2 of 0.8: 90% of it at sqrt(0.9)
        let found = calibrate(0.9, 20, |share| Ok::<_, StatisticsError>(0.8 * share * share)).unwrap();
        assert!(found.share >= 0.9f64.sqrt() && found.share - 0.9f64.sqrt() <= 0.5f64.powi(20), "{found:?}");
        assert!(found.retained >= 0.72);
        assert_eq!(found.tried.len(), 22);
    }

    #[test]
    fn a_model_that_retains_enough_stays_as_it_is() {
        let found = calibrate(0.95, 8, |_| Ok::<_, StatisticsError>(0.5)).unwrap();
        assert_eq!((found.share, found.tried.len()), (0.0, 2));
    }

    #[test]
    fn what_cannot_be_calibrated_is_refused() {
        let constant = |value: f64| move |_: f64| Ok::<_, StatisticsError>(value);
        assert!(calibrate(0.9, 8, constant(0.0)).unwrap_err().to_string().contains("the original retains 0"));
        assert!(calibrate(0.9, 8, constant(f64::NAN)).unwrap_err().to_string().contains("at share 1"));
        assert!(calibrate(1.5, 8, constant(0.5)).is_err());
        let failing = |_: f64| Err(StatisticsError::Undefined("no such file".to_owned()));
        assert_eq!(calibrate(0.9, 8, failing).unwrap_err().to_string(), "no such file");
    }
}
