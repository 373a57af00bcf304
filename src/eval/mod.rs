//! Numbers about a model on a data set. Work is spread over the data-parallel ranks; every rank gets the same result.

pub mod compare;
mod error;
pub mod generate;
pub mod likelihood;
pub mod record;
pub mod scores;
pub mod statistics;
pub mod suites;
pub mod text;
pub mod tradeoff;

pub use error::EvalError;
pub use likelihood::{LikelihoodScores, per_sample, summarise};
pub use record::{Better, Curve, Evaluation, Item, Metric, ModelFacts};
pub use scores::{Asked, ForwardOptions, Text, TextScore};
