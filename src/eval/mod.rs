//! Numbers about a model on a data set. Work is spread over the data-parallel ranks; every rank gets the same result.

pub mod attack;
pub mod generate;
mod likelihood;

pub use likelihood::{ForwardOptions, LikelihoodScores, SampleScore, per_sample, summarise};
