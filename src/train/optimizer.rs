//! AdamW and SGD on the part of the parameters that this rank owns.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::parameters::Parameters;
use crate::abi::dispatcher::{self, AdamW};
use crate::config;
use crate::model::sharding::{Class, Table};

/// An update rule with its state.
pub struct Optimizer {
    rule: Rule,
    weight_decay: f64,
    /// Steps taken, the one under way included.
    steps: usize,
    /// For each bucket its segments that this rank owns a part of.
    state: Vec<Vec<Segment>>,
}

enum Rule {
    AdamW { betas: [f64; 2], eps: f64 },
    Sgd { momentum: f64 },
}

/// Neighbouring parameters of one class and one unit.
struct Segment {
    class: Class,
    unit: usize,
    /// Elements of this rank's own part of the bucket.
    own: Range<usize>,
    state: State,
}

/// f32, of the size of the segment.
enum State {
    Moments { first: Tensor, second: Tensor },
    Velocity(Tensor),
    Nothing,
}

/// What all segments of a step have in common.
pub struct Update<'a> {
    pub lr: f64,
    /// Factor of the gradients of a unit: `[1]` f32 on the device.
    pub scale: &'a dyn Fn(usize) -> Tensor,
    /// `[1]` f32 on the device: 1 where nothing may change any more.
    pub skip: &'a Tensor,
}

impl Optimizer {
    pub fn new(config: &config::Optimizer, table: &Table, parameters: &Parameters) -> Self {
        let rule = match config.name {
            config::OptimizerName::Adamw => Rule::AdamW {
                betas: config.betas.unwrap_or(config::Optimizer::BETAS),
                eps: config.eps.unwrap_or(config::Optimizer::EPS),
            },
            config::OptimizerName::Sgd => {
                Rule::Sgd { momentum: config.momentum.unwrap_or(config::Optimizer::MOMENTUM) }
            }
        };
        let state = parameters.layout.buckets.iter().zip(&parameters.masters).map(|(bucket, master)| {
            let segments = bucket.segments(table).into_iter().filter(|segment| !segment.own.is_empty());
            let with_state = segments.map(|segment| {
                let zeros = || Tensor::zeros([segment.own.len() as i64], (Kind::Float, master.device()));
                let state = match rule {
                    Rule::AdamW { .. } => State::Moments { first: zeros(), second: zeros() },
                    Rule::Sgd { momentum } if momentum > 0.0 => State::Velocity(zeros()),
                    Rule::Sgd { .. } => State::Nothing,
                };
                Segment { class: segment.class, unit: segment.unit, own: segment.own, state }
            });
            with_state.collect()
        });
        Self { state: state.collect(), rule, weight_decay: config.weight_decay, steps: 0 }
    }

    /// Begins a step.
    pub fn begin(&mut self) {
        self.steps += 1;
    }

    /// Moves the masters of one bucket by its gradients; the weights of the model follow when they are published.
    ///
    /// `grad`: this rank's own part of the bucket. Weight decay is decoupled and for matrices only:
    /// `w *= 1 - lr * weight_decay` before the update.
    pub fn update(&self, parameters: &Parameters, bucket: usize, grad: &Tensor, update: &Update) {
        for segment in &self.state[bucket] {
            let part = |t: &Tensor| t.narrow(0, segment.own.start as i64, segment.own.len() as i64);
            let (master, grad) = (part(&parameters.masters[bucket]), part(grad).to_kind(Kind::Float));
            let weight_decay = if segment.class == Class::Matrix { self.weight_decay } else { 0.0 };
            let scale = (update.scale)(segment.unit);
            match (&self.rule, &segment.state) {
                (Rule::AdamW { betas, eps }, State::Moments { first, second }) => {
                    let adamw = AdamW { lr: update.lr, beta1: betas[0], beta2: betas[1], weight_decay, eps: *eps };
                    let step = Tensor::full([1], self.steps as f64, (Kind::Float, master.device()));
                    let divisor = scale.reciprocal();
                    dispatcher::fused_adamw(
                        &[master],
                        &[grad],
                        &[first.shallow_clone()],
                        &[second.shallow_clone()],
                        &[step],
                        Some(&divisor),
                        Some(update.skip),
                        adamw,
                    );
                }
                (Rule::Sgd { momentum }, state) => {
                    // written so that a gradient that is no number does not reach the weights of a skipped step
                    let zero = grad.zeros_like();
                    let skip = update.skip.gt(0.0);
                    let mut move_by = zero.where_self(&skip, &(grad * scale));
                    if let State::Velocity(velocity) = state {
                        let mut velocity = velocity.shallow_clone();
                        let _ = velocity.g_mul_scalar_(*momentum);
                        move_by = velocity.g_add_(&move_by);
                    }
                    let mut master = master;
                    let keep = 1.0 - update.skip;
                    let _ = master.g_mul_(&(1.0 - &keep * (update.lr * weight_decay)));
                    let _ = master.g_add_(&(move_by * keep * -update.lr));
                }
                _ => unreachable!("invariant: the state belongs to the rule"),
            }
        }
    }

    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        let each = |segment: &Segment| match &segment.state {
            State::Moments { first, second } => size(first) + size(second),
            State::Velocity(velocity) => size(velocity),
            State::Nothing => 0,
        };
        self.state.iter().flatten().map(each).sum()
    }
}
