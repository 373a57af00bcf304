//! The learning rate of each step.

use crate::config::{self, ScheduleName, Warmup};

/// Learning rate over a run of known length.
#[derive(Clone, Debug)]
pub struct Schedule {
    name: ScheduleName,
    peak: f64,
    warmup: usize,
    total: usize,
}

impl Schedule {
    /// `total`: steps of the whole run.
    pub fn new(config: &config::Schedule, peak: f64, total: usize, steps_per_epoch: usize) -> Self {
        let warmup = match config.warmup {
            Warmup::Steps(n) => n,
            Warmup::Epochs(n) => (n * steps_per_epoch as f64).round() as usize,
            Warmup::Fraction(x) => (x * total as f64).round() as usize,
        };
        Self { name: config.name, peak, warmup, total }
    }

    /// The rate of step `step`, counted from 0.
    ///
    /// Rises as `(step + 1) / warmup`, so that no step is lost at rate 0; then `linear` falls as
    /// `(total - step) / (total - warmup)` and `cosine` as half a cosine over the same steps.
    pub fn lr(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let rest = (self.total.saturating_sub(self.warmup)).max(1) as f64;
        let left = self.total.saturating_sub(step) as f64 / rest;
        match self.name {
            ScheduleName::Constant => self.peak,
            ScheduleName::Linear => self.peak * left,
            ScheduleName::Cosine => self.peak * 0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(name: ScheduleName, warmup: Warmup) -> Vec<f64> {
        let schedule = Schedule::new(&config::Schedule { name, warmup }, 2.0, 10, 5);
        (0..10).map(|step| schedule.lr(step)).collect()
    }

    #[test]
    fn shapes() {
        let linear = rates(ScheduleName::Linear, Warmup::Steps(2));
        assert_eq!(linear[..4], [1.0, 2.0, 2.0, 1.75]);
        assert_eq!(linear[9], 0.25);
        let cosine = rates(ScheduleName::Cosine, Warmup::Epochs(0.4));
        assert_eq!(cosine[..3], [1.0, 2.0, 2.0]);
        assert!((cosine[6] - 1.0).abs() < 1e-12);
        assert_eq!(rates(ScheduleName::Constant, Warmup::Fraction(0.2))[1..], [2.0; 9]);
        // without a warm-up: lr * (1 - step / total), as the usual frameworks have it
        assert_eq!(rates(ScheduleName::Linear, Warmup::Fraction(0.0))[5], 1.0);
    }
}
