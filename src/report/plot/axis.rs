//! Axes: where round ticks are, and where a value lies.

use crate::report::html::{decade, number, tick};

/// How values are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::report) enum Scale {
    Linear,
    /// By powers of ten; values of 0 or less have no place.
    Log,
}

/// An axis from `low` to `high`, in the values of the scale (logarithms on a log scale).
#[derive(Clone, Debug)]
pub(super) struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    pub(super) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// An axis that holds all values, with about `wanted` ticks; None where no value has a place on it. `tight`: it ends at the values and not
    /// at ticks.
    pub(super) fn new(scale: Scale, values: impl Iterator<Item = f64>, wanted: usize, tight: bool) -> Option<Self> {
        let places = values.filter_map(|x| place(scale, x));
        let (low, high) = places.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
        if low > high {
            return None;
        }
        // a constant lies in the middle
        let (low, high) = if high - low <= 1e-9 * low.abs().max(1e-12) {
            let margin = if scale == Scale::Log { 0.5 } else { (0.1 * low.abs()).max(1e-3) };
            (low - margin, high + margin)
        } else {
            (low, high)
        };
        let step = match scale {
            Scale::Log if high - low < 1.0 => return Self::within_a_decade(low, high),
            Scale::Log => ((high - low) / wanted as f64).ceil().max(1.0),
            Scale::Linear => round_step((high - low) / wanted as f64),
        };
        let (first, last) = if tight {
            ((low / step - 1e-9).ceil(), (high / step + 1e-9).floor())
        } else {
            ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil())
        };
        let ticks: Vec<(f64, String)> = (0..=(last - first).max(0.0) as usize)
            .map(|index| {
                let at = (first + index as f64) * step;
                let label = if scale == Scale::Log { decade(at) } else { tick(at, step) };
                (at, label)
            })
            .collect();
        let (low, high) = if tight { (low, high) } else { (first * step, last * step) };
        Some(Self { scale, low, high, ticks })
    }

    /// A log axis of less than a power of ten: ticks at 1, 2 and 5 times one, or at its ends where too few of them are inside.
    fn within_a_decade(low: f64, high: f64) -> Option<Self> {
        let decade = 10f64.powf(low.floor());
        let round = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0].map(|factor| factor * decade);
        let inside = |x: &f64| (low - 1e-9..=high + 1e-9).contains(&x.log10());
        let mut ticks: Vec<(f64, String)> =
            round.into_iter().filter(inside).map(|x| (x.log10(), tick(x, x.min(1.0)))).collect();
        if ticks.len() < 2 {
            ticks = [low, high].map(|at| (at, number(10f64.powf(at)))).to_vec();
        }
        Some(Self { scale: Scale::Log, low, high, ticks })
    }

    /// Where a value lies, from 0 to 1; None: it has no place.
    pub(super) fn share(&self, x: f64) -> Option<f64> {
        place(self.scale, x).map(|x| self.share_of_place(x))
    }

    /// The same for a tick.
    pub(super) fn share_of_place(&self, x: f64) -> f64 {
        (x - self.low) / (self.high - self.low)
    }
}

fn place(scale: Scale, x: f64) -> Option<f64> {
    match scale {
        Scale::Linear => Some(x).filter(|x| x.is_finite()),
        Scale::Log => Some(x).filter(|x| x.is_finite() && *x > 0.0).map(f64::log10),
    }
}

/// The next of 1, 2, 2.5, 5 times a power of ten.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|step| step * power >= least * (1.0 - 1e-9));
    step.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round() {
        let axis = |values: &[f64]| Axis::new(Scale::Linear, values.iter().copied(), 4, false).unwrap();
        assert_eq!(labels(&axis(&[0.003, 0.98])), ["0", "0.25", "0.50", "0.75", "1.00"]);
        assert_eq!(labels(&axis(&[-3.0, 47.0])), ["-20", "0", "20", "40", "60"]);
        assert_eq!(axis(&[0.0, 1.0]).share(0.25), Some(0.25));
        let log = Axis::new(Scale::Log, [3e-4, 20.0, 0.0].into_iter(), 4, false).unwrap();
        assert_eq!(labels(&log), ["10⁻⁴", "0.01", "1", "100"]);
        assert_eq!(log.share(0.0), None);
        let narrow = |low, high| Axis::new(Scale::Log, [low, high].into_iter(), 4, true).unwrap();
        assert_eq!(labels(&narrow(0.0788, 0.4)), ["0.1", "0.2"]);
        assert_eq!(labels(&narrow(0.9, 8.0)), ["1", "2", "5"]);
        assert_eq!(labels(&narrow(0.11, 0.19)), ["0.1100", "0.1900"]);
    }

    #[test]
    fn a_constant_has_an_axis_and_nothing_has_none() {
        let axis = Axis::new(Scale::Linear, [0.5; 3].into_iter(), 4, false).unwrap();
        assert!((0.0..=1.0).contains(&axis.share(0.5).unwrap()) && axis.ticks.len() >= 2);
        assert!(Axis::new(Scale::Linear, [f64::NAN].into_iter(), 4, false).is_none());
        assert!(Axis::new(Scale::Log, [0.0, -1.0].into_iter(), 4, false).is_none());
    }

    #[test]
    fn a_tight_axis_ends_at_its_values() {
        let axis = Axis::new(Scale::Linear, [0.0, 49.0].into_iter(), 4, true).unwrap();
        assert_eq!((axis.share(49.0), labels(&axis)), (Some(1.0), vec!["0", "20", "40"]));
    }
}
