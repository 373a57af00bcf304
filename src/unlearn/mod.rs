//! Methods: objectives over log-probabilities. One file each; none of them knows ranks.

mod likelihood;
mod npo;
#[cfg(test)]
mod toy;

pub use likelihood::{GradientAscent, NegativeLogLikelihood};
pub use npo::Npo;

use crate::config;
use crate::train::{Method, Objective, Retain};

/// The method that a configuration asks for.
pub fn method(config: &config::Method) -> Method {
    let forget: Box<dyn Objective> = match config.objective {
        config::Objective::Finetune => Box::new(NegativeLogLikelihood),
        config::Objective::Ga => Box::new(GradientAscent),
        config::Objective::Npo => Box::new(Npo { beta: config.beta.unwrap_or(config::Method::BETA) }),
    };
    let retain = match config.retain {
        config::Retain::None => Retain::None,
        config::Retain::Nll => Retain::Likelihood(Box::new(NegativeLogLikelihood)),
        config::Retain::Kl => Retain::Divergence,
    };
    Method {
        forget,
        forget_weight: config.forget_weight.unwrap_or(config::Method::WEIGHT),
        retain,
        retain_weight: config.retain_weight.unwrap_or(config::Method::WEIGHT),
    }
}
