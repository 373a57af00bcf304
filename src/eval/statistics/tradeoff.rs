//! Trade-off scores over the checkpoints of one unlearning run (Lee et al., arXiv 2505.16252): AUES and MU95.
//!
//! The paper does not give its integration rule; the rules are stated at each function.

use super::{StatisticsError, check, is_share};

/// One checkpoint: forget score `1 - ES(forget)` and retain score `ES(retain)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TradeoffPoint {
    pub forget: f64,
    pub retain: f64,
}

/// Area under the forget-retain curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Aues {
    /// Under the front, over forget scores from 0 to 1.
    pub value: f64,
    /// Under all points by ascending forget score, without extrapolation.
    pub raw: f64,
    /// Points that no other one beats in both scores, by ascending forget score.
    pub front: Vec<TradeoffPoint>,
}

/// Area under the piecewise-linear front of the checkpoints (the start included), with the first point's retain score left of it and 0 right of
/// the last. It lies between 0 and 1; higher is better.
///
/// # Errors
/// No checkpoint, or a score that is not between 0 and 1.
pub fn aues(points: &[TradeoffPoint]) -> Result<Aues, StatisticsError> {
    let scores: Vec<f64> = points.iter().flat_map(|point| [point.forget, point.retain]).collect();
    check("AUES", &scores, "a share between 0 and 1", is_share)?;
    let mut all = points.to_vec();
    // of equal forget scores the best retain score first, so that the front keeps one of them
    all.sort_by(|a, b| a.forget.total_cmp(&b.forget).then(b.retain.total_cmp(&a.retain)));
    let mut front: Vec<TradeoffPoint> = Vec::new();
    for &point in all.iter().rev() {
        if front.last().is_none_or(|best| point.retain > best.retain) {
            front.retain(|other| other.forget != point.forget);
            front.push(point);
        }
    }
    front.reverse();
    let start = front[0].forget * front[0].retain;
    Ok(Aues { value: start + trapezoids(&front), raw: trapezoids(&all), front })
}

fn trapezoids(points: &[TradeoffPoint]) -> f64 {
    points.windows(2).map(|pair| (pair[1].forget - pair[0].forget) * (pair[0].retain + pair[1].retain) / 2.0).sum()
}

/// One checkpoint: model utility and log10 of the forget quality.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UtilityPoint {
    pub step: usize,
    pub utility: f64,
    pub log10_forget_quality: f64,
}

/// Forget quality where the utility has fallen to 95% of its first value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mu95 {
    /// At most 0; closer to 0 is better.
    pub log10_forget_quality: f64,
    /// Training step, between two checkpoints where it was interpolated.
    pub step: f64,
    pub rule: Mu95Rule,
}

/// How the point was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mu95Rule {
    /// Interpolated between the last checkpoint at or above the threshold and the first below.
    Crossing,
    /// The utility never fell below the threshold: the last checkpoint.
    NeverBelow,
    /// The utility crossed the threshold more than once: the best forget quality at or above it, crossings included.
    SeveralCrossings,
}

/// MU95 of checkpoints in the order of training; the first one is the model before unlearning.
///
/// # Errors
/// No checkpoint; steps that do not rise; a utility not between 0 and 1; a log10 that is above 0 or not finite.
pub fn mu95(points: &[UtilityPoint]) -> Result<Mu95, StatisticsError> {
    let utilities: Vec<f64> = points.iter().map(|point| point.utility).collect();
    check("MU95, model utility", &utilities, "a share between 0 and 1", is_share)?;
    let qualities: Vec<f64> = points.iter().map(|point| point.log10_forget_quality).collect();
    check("MU95, log10 of forget quality", &qualities, "a finite number of at most 0", |x| x.is_finite() && x <= 0.0)?;
    if let Some(pair) = points.windows(2).find(|pair| pair[0].step >= pair[1].step) {
        return Err(StatisticsError::Undefined(format!(
            "MU95: step {} comes after step {}, expected checkpoints in the order of training",
            pair[1].step, pair[0].step
        )));
    }
    let threshold = 0.95 * points[0].utility;
    let above = |point: &UtilityPoint| point.utility >= threshold;
    let crossings: Vec<Mu95> = points
        .windows(2)
        .filter(|pair| above(&pair[0]) != above(&pair[1]))
        .map(|pair| {
            let share = (pair[0].utility - threshold) / (pair[0].utility - pair[1].utility);
            let between = |a: f64, b: f64| a + share * (b - a);
            Mu95 {
                log10_forget_quality: between(pair[0].log10_forget_quality, pair[1].log10_forget_quality),
                step: between(pair[0].step as f64, pair[1].step as f64),
                rule: Mu95Rule::Crossing,
            }
        })
        .collect();
    let at = |point: &UtilityPoint, rule| Mu95 {
        log10_forget_quality: point.log10_forget_quality,
        step: point.step as f64,
        rule,
    };
    Ok(match crossings.as_slice() {
        [] => at(&points[points.len() - 1], Mu95Rule::NeverBelow),
        [one] => *one,
        several => points
            .iter()
            .filter(|point| above(point))
            .map(|point| at(point, Mu95Rule::SeveralCrossings))
            .chain(several.iter().map(|one| Mu95 { rule: Mu95Rule::SeveralCrossings, ..*one }))
            .max_by(|a, b| a.log10_forget_quality.total_cmp(&b.log10_forget_quality))
            .expect("invariant: there are crossings"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(pairs: &[(f64, f64)]) -> Vec<TradeoffPoint> {
        pairs.iter().map(|&(forget, retain)| TradeoffPoint { forget, retain }).collect()
    }

    const WORKED: [(f64, f64); 5] = [(0.20, 0.85), (0.50, 0.80), (0.70, 0.60), (0.90, 0.30), (0.95, 0.05)];

    #[test]
    fn the_worked_example() {
        let found = aues(&points(&WORKED)).unwrap();
        assert!((found.value - 0.65625).abs() < 1e-12, "{found:?}");
        assert!((found.raw - 0.65625 + 0.2 * 0.85).abs() < 1e-12, "{found:?}");
        // a dominated checkpoint changes the raw area alone, and the order of the checkpoints nothing
        let mut more = vec![(0.60, 0.55)];
        more.extend(WORKED.iter().rev());
        let with = aues(&points(&more)).unwrap();
        assert_eq!((with.value, with.front), (found.value, found.front));
        assert!(with.raw < found.raw);
    }

    #[test]
    fn corners() {
        assert_eq!(aues(&points(&[(1.0, 1.0)])).unwrap().value, 1.0);
        assert_eq!(aues(&points(&[(0.5, 1.0)])).unwrap().value, 0.5);
        assert_eq!(aues(&points(&[(0.0, 1.0)])).unwrap().value, 0.0);
        // equal forget scores: the better retain score, once
        let found = aues(&points(&[(0.5, 0.4), (0.5, 0.8), (0.5, 0.8)])).unwrap();
        assert_eq!((found.value, found.front.len()), (0.4, 1));
        let error = aues(&points(&[(0.5, 1.2)])).unwrap_err().to_string();
        assert_eq!(error, "AUES: value 1 (counted from 0) is 1.2, expected a share between 0 and 1");
        assert!(aues(&[]).is_err());
    }

    fn run(pairs: &[(f64, f64)]) -> Vec<UtilityPoint> {
        let point = |(index, &(utility, log10_forget_quality)): (usize, &(f64, f64))| UtilityPoint {
            step: 10 * index,
            utility,
            log10_forget_quality,
        };
        pairs.iter().enumerate().map(point).collect()
    }

    #[test]
    fn the_threshold_is_interpolated() {
        let found = mu95(&run(&[(0.60, -20.0), (0.59, -14.0), (0.58, -10.0), (0.54, -4.0)])).unwrap();
        assert!((found.log10_forget_quality + 8.5).abs() < 1e-12, "{found:?}");
        assert!((found.step - 22.5).abs() < 1e-12);
        assert_eq!(found.rule, Mu95Rule::Crossing);
    }

    #[test]
    fn other_ends_have_their_rules() {
        let found = mu95(&run(&[(0.60, -20.0), (0.59, -14.0), (0.60, -16.0)])).unwrap();
        assert_eq!((found.log10_forget_quality, found.rule), (-16.0, Mu95Rule::NeverBelow));
        // down, up, down through 0.57: the best is where it comes up again, 7 ninths of the way from step 10 to 20
        let found = mu95(&run(&[(0.60, -20.0), (0.50, -3.0), (0.59, -5.0), (0.55, -9.0)])).unwrap();
        assert!((found.log10_forget_quality + 3.0 + 14.0 / 9.0).abs() < 1e-12, "{found:?}");
        assert!((found.step - 10.0 - 70.0 / 9.0).abs() < 1e-12);
        assert_eq!(found.rule, Mu95Rule::SeveralCrossings);
        let mut steps = run(&[(0.6, -1.0), (0.6, -1.0)]);
        steps[1].step = 0;
        assert!(mu95(&steps).unwrap_err().to_string().contains("step 0 comes after step 0"));
        assert!(mu95(&run(&[(0.6, f64::NEG_INFINITY)])).is_err());
        assert!(mu95(&run(&[(0.6, 0.5)])).is_err());
    }
}
