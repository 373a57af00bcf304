//! AdamW and SGD on the part of the parameters that this rank owns.

use tch::{Device, Kind, Tensor};

use super::parameters::Parameters;
use crate::abi::dispatcher::{self, AdamW};
use crate::config;
use crate::model::sharding::{Class, Table};

/// An update rule with its state.
pub struct Optimizer {
    rule: Rule,
    weight_decay: f64,
    /// Steps taken.
    steps: usize,
    /// One entry a bucket.
    state: Vec<State>,
}

enum Rule {
    AdamW { betas: [f64; 2], eps: f64 },
    Sgd { momentum: f64 },
}

/// f32, of the size of this rank's own part of the bucket.
enum State {
    Moments { first: Tensor, second: Tensor },
    Velocity(Tensor),
    Nothing,
}

impl Optimizer {
    pub fn new(config: &config::Optimizer, parameters: &Parameters) -> Self {
        let rule = match config.name {
            config::OptimizerName::Adamw => Rule::AdamW {
                betas: config.betas.unwrap_or(config::Optimizer::BETAS),
                eps: config.eps.unwrap_or(config::Optimizer::EPS),
            },
            config::OptimizerName::Sgd => {
                Rule::Sgd { momentum: config.momentum.unwrap_or(config::Optimizer::MOMENTUM) }
            }
        };
        let state: Vec<State> = parameters
            .masters
            .iter()
            .map(|master| match rule {
                Rule::AdamW { .. } => State::Moments { first: master.zeros_like(), second: master.zeros_like() },
                Rule::Sgd { momentum } if momentum > 0.0 => State::Velocity(master.zeros_like()),
                Rule::Sgd { .. } => State::Nothing,
            })
            .collect();
        Self { rule, weight_decay: config.weight_decay, steps: 0, state }
    }

    /// One step: masters move by the gradients times `scale`; the weights of the model follow when they are published.
    ///
    /// Weight decay is decoupled and for matrices only: `w *= 1 - lr * weight_decay` before the update.
    pub fn step(&mut self, table: &Table, parameters: &mut Parameters, grads: &[Tensor], scale: f64, lr: f64) {
        self.steps += 1;
        let decays =
            [(Class::Matrix, self.weight_decay), (Class::Bias, 0.0), (Class::PartialVector, 0.0), (Class::Vector, 0.0)];
        for (class, weight_decay) in decays {
            match self.rule {
                Rule::AdamW { betas, eps } => {
                    let adamw = AdamW { lr, beta1: betas[0], beta2: betas[1], weight_decay, eps };
                    self.adamw(table, parameters, grads, scale, class, adamw);
                }
                Rule::Sgd { momentum } => {
                    self.sgd(table, parameters, grads, scale, class, [lr, weight_decay, momentum])
                }
            }
        }
    }

    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.numel() * 4;
        let each = |state: &State| match state {
            State::Moments { first, second } => size(first) + size(second),
            State::Velocity(velocity) => size(velocity),
            State::Nothing => 0,
        };
        self.state.iter().map(each).sum()
    }

    /// All buckets' segments of one class in one fused call.
    fn adamw(&self, table: &Table, parameters: &Parameters, grads: &[Tensor], scale: f64, class: Class, adamw: AdamW) {
        let (mut params, mut gradients, mut firsts, mut seconds) = (vec![], vec![], vec![], vec![]);
        for (index, bucket) in parameters.layout.buckets.iter().enumerate() {
            let range = bucket.owned(&bucket.class(table, class));
            let State::Moments { first, second } = &self.state[index] else {
                continue;
            };
            if !range.is_empty() {
                let part = |t: &Tensor| t.narrow(0, range.start as i64, range.len() as i64);
                params.push(part(&parameters.masters[index]));
                gradients.push(part(&grads[index]));
                firsts.push(part(first));
                seconds.push(part(second));
            }
        }
        if params.is_empty() {
            return;
        }
        let options = (Kind::Float, Device::Cpu);
        let step = Tensor::full([], self.steps as f64, options).to_device(params[0].device());
        let steps: Vec<Tensor> = params.iter().map(|_| step.shallow_clone()).collect();
        let divisor = (scale != 1.0).then(|| Tensor::full([], 1.0 / scale, options).to_device(params[0].device()));
        dispatcher::fused_adamw(&params, &gradients, &firsts, &seconds, &steps, divisor.as_ref(), adamw);
    }

    fn sgd(
        &self,
        table: &Table,
        parameters: &Parameters,
        grads: &[Tensor],
        scale: f64,
        class: Class,
        [lr, weight_decay, momentum]: [f64; 3],
    ) {
        for (index, bucket) in parameters.layout.buckets.iter().enumerate() {
            let range = bucket.owned(&bucket.class(table, class));
            if range.is_empty() {
                continue;
            }
            let part = |t: &Tensor| t.narrow(0, range.start as i64, range.len() as i64);
            let mut master = part(&parameters.masters[index]);
            let mut update = part(&grads[index]) * scale;
            if let State::Velocity(velocity) = &self.state[index] {
                let mut velocity = part(velocity);
                let _ = velocity.g_mul_scalar_(momentum);
                let _ = velocity.g_add_(&update);
                update = velocity;
            }
            let _ = master.g_mul_scalar_(1.0 - lr * weight_decay);
            let _ = master.g_add_(&(update * -lr));
        }
    }
}
