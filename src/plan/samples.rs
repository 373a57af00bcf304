//! Samples where there are none: lengths and answers as somebody assumes them.

use crate::data::{Dataset, Sample, Wanted};
use crate::model::init::Stream;

/// What is assumed of a data set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assumed {
    pub samples: usize,
    /// Mean length; lengths vary by a half up and down. Unit: tokens.
    pub length: usize,
    /// Longest that is possible. Unit: tokens.
    pub longest: usize,
    /// Share of a sample that is its answer.
    pub scored: f64,
}

/// Random tokens of a vocabulary of so many.
pub fn assumed(name: &str, assumed: Assumed, vocab: i64, wanted: Wanted) -> Dataset {
    let draw = Stream::new(0, name);
    let samples = (0..assumed.samples as u64).map(|i| {
        let spread = 0.5 + (draw.bits(i) % 1001) as f64 / 1000.0;
        let len = ((assumed.length as f64 * spread) as u64).clamp(2, assumed.longest.max(2) as u64);
        let prompt = ((len as f64 * (1.0 - assumed.scored)) as u64).clamp(1, len - 1);
        let id = |t| (draw.bits((i + 1) << 32 | t) % vocab as u64) as i32;
        Sample { tokens: (0..len).map(id).collect(), scored: (prompt as u32..len as u32).collect() }
    });
    let mut set = Dataset::from_samples(name, samples.collect());
    if wanted != Wanted::Nothing {
        // another answer of the same length
        set.preferred = set.samples.clone();
    }
    set
}
