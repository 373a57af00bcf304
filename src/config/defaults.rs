//! Defaults that depend on other keys: absent in the file, they are filled in once the configuration is known to be good, so
//! that what a run records says every number.

use super::data::{Kind, Template, TemplateName};
use super::method::{Method, Objective, Retain};
use super::schema::{Config, Optimizer, OptimizerName};

impl Optimizer {
    pub const BETAS: [f64; 2] = [0.9, 0.999];
    pub const EPS: f64 = 1e-8;
    pub const MOMENTUM: f64 = 0.0;
}

/// Gives every key that has an effect its value.
pub(super) fn fill(config: &mut Config) {
    let method = &mut config.method;
    method.fill_own_keys();
    if method.objective.is_weight_space() {
        config.subspace.get_or_insert_default();
    } else if method.objective != Objective::Finetune {
        method.forget_weight.get_or_insert(Method::WEIGHT);
    }
    if method.retain != Retain::None && method.dual_start.is_none() {
        method.retain_weight.get_or_insert(Method::WEIGHT);
    }
    let optimizer = &mut config.optimizer;
    match optimizer.name {
        OptimizerName::Adamw => {
            optimizer.betas.get_or_insert(Optimizer::BETAS);
            optimizer.eps.get_or_insert(Optimizer::EPS);
            optimizer.state_dtype.get_or_insert_default();
        }
        OptimizerName::Sgd => _ = optimizer.momentum.get_or_insert(Optimizer::MOMENTUM),
    }
    if config.data.sources().any(|(_, source)| source.kind != Kind::Text) {
        config.data.template.get_or_insert(Template::Named(TemplateName::Chat));
    }
}
