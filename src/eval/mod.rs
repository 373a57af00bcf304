//! Numbers about a model on a data set. Work is spread over the data-parallel ranks; every rank gets the same result.

mod likelihood;
pub mod statistics;
pub mod text;

pub use likelihood::{ForwardOptions, LikelihoodScores, SampleScore, per_sample, summarise};
