//! Probes of what a model still holds inside: values of one model put into another.

mod depth;
mod krs;

pub use depth::{Models, depth, depth_score};
pub use krs::{Component, Krs, krs};

use tch::{Kind, Tensor};

use crate::abi::upload::upload;
use crate::data::Sample;
use crate::model::{Batch, Decoder};

/// A sample as a batch of its own, and the positions before the given tokens.
fn alone(decoder: &Decoder, sample: &Sample, tokens: &[u32]) -> (Batch, Tensor) {
    let ids: Vec<i64> = sample.tokens.iter().map(|&id| i64::from(id)).collect();
    let before: Vec<i64> = tokens.iter().map(|&at| i64::from(at) - 1).collect();
    (decoder.batch(&ids, &[ids.len()]), upload(&before, decoder.device))
}

/// Sum of squares of a difference.
fn square_distance(a: &Tensor, b: &Tensor) -> f64 {
    f64::try_from((a - b).to_kind(Kind::Double).square().sum(Kind::Double)).expect("invariant: a sum is one number")
}
