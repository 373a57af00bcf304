//! Numbers about a model on a data set. Work is spread over the data-parallel ranks; every rank gets the same result.

mod error;
mod likelihood;
pub mod record;

pub use error::EvalError;
pub use likelihood::{ForwardOptions, LikelihoodScores, SampleScore, per_sample, summarise};
pub use record::{Better, Curve, Evaluation, Item, Metric, ModelFacts};
