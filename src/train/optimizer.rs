//! AdamW and SGD on the part of the parameters that this rank owns.

use std::ops::Range;

use tch::Tensor;

use super::parameters::Parameters;
use crate::checkpoint::state::What;
use crate::config;
use crate::kernels::moment::{Codes, Moment, Storage};
use crate::kernels::optimizer::{self as kernel, AdamW, Extras, Sgd};
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

/// Of the size of the segment.
enum State {
    Moments {
        first: Moment,
        second: Moment,
    },
    /// f32.
    Velocity(Moment),
    Nothing,
}

/// A moment that is to be filled.
pub struct Remembered<'a> {
    pub what: What,
    /// Elements of this rank's own part of the bucket.
    pub own: Range<usize>,
    pub moment: &'a mut Moment,
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
        let storage = match config.state_dtype.unwrap_or_default() {
            config::StateDtype::F32 => Storage::F32,
            config::StateDtype::Bf16 => Storage::Bf16,
            config::StateDtype::Int8 => Storage::Block8,
        };
        let state = parameters.layout.buckets.iter().zip(&parameters.masters).map(|(bucket, master)| {
            let segments = bucket.segments(table).into_iter().filter(|segment| !segment.own.is_empty());
            let segments = segments.filter(|segment| segment.class != Class::Frozen);
            let with_state = segments.map(|segment| {
                let zeros = |storage, codes| Moment::zeros(storage, codes, segment.own.len() as i64, master.device());
                let state = match rule {
                    Rule::AdamW { .. } => {
                        State::Moments { first: zeros(storage, Codes::Signed), second: zeros(storage, Codes::Unsigned) }
                    }
                    Rule::Sgd { momentum } if momentum > 0.0 => State::Velocity(zeros(Storage::F32, Codes::Signed)),
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

    /// Moves the masters of one bucket by its gradients, and this rank's own part of the model's weights with them; the other
    /// parts follow with [`Parameters::gather`].
    ///
    /// `grad`: this rank's own part of the bucket. Weight decay is decoupled and for matrices only:
    /// `w *= 1 - lr * weight_decay` before the update.
    pub fn update(&mut self, parameters: &Parameters, bucket: usize, grad: &Tensor, update: &Update) {
        for segment in &mut self.state[bucket] {
            let part = |t: &Tensor| t.narrow(0, segment.own.start as i64, segment.own.len() as i64);
            let (mut master, grad) = (part(&parameters.masters[bucket]), part(grad));
            let weight_decay = if segment.class == Class::Matrix { self.weight_decay } else { 0.0 };
            let scale = (update.scale)(segment.unit);
            let mut copy = parameters.rounded(bucket).map(|own| part(&own));
            let extras = Extras { scale: Some(&scale), skip: Some(update.skip), copy: copy.as_mut() };
            match (&self.rule, &mut segment.state) {
                (Rule::AdamW { betas: [beta1, beta2], eps }, State::Moments { first, second }) => {
                    let (beta1, beta2, eps, step) = (*beta1, *beta2, *eps, self.steps as i64);
                    let numbers = AdamW { lr: update.lr, beta1, beta2, eps, weight_decay, step };
                    kernel::adamw(&mut master, &grad, first, second, &numbers, extras);
                }
                (Rule::Sgd { momentum }, state) => {
                    if weight_decay > 0.0 {
                        let keep = 1.0 - update.skip;
                        let _ = master.g_mul_(&(1.0 - keep * (update.lr * weight_decay)));
                    }
                    let velocity = match state {
                        State::Velocity(velocity) => Some(velocity),
                        _ => None,
                    };
                    let numbers = Sgd { lr: update.lr, momentum: *momentum, weight_decay: 0.0 };
                    kernel::sgd(&mut master, &grad, velocity, &numbers, extras);
                }
                _ => unreachable!("invariant: the state belongs to the rule"),
            }
        }
    }

    /// Goes on after `steps` steps.
    pub fn set_steps(&mut self, steps: usize) {
        self.steps = steps;
    }

    pub fn steps(&self) -> usize {
        self.steps
    }

    /// What is remembered of one bucket: which number, of which elements of this rank's own part.
    pub fn look(&self, bucket: usize) -> Vec<(What, Range<usize>, &Moment)> {
        let each = |segment: &Segment| segment.own.clone();
        let all = self.state[bucket].iter().flat_map(|segment| match &segment.state {
            State::Moments { first, second } => {
                vec![(What::First, each(segment), first), (What::Second, each(segment), second)]
            }
            State::Velocity(velocity) => vec![(What::Velocity, each(segment), velocity)],
            State::Nothing => Vec::new(),
        });
        all.collect()
    }

    /// As [`Self::look`], to be filled.
    pub fn remembered(&mut self, bucket: usize) -> Vec<Remembered<'_>> {
        let all = self.state[bucket].iter_mut().flat_map(|segment| {
            let own = || segment.own.clone();
            match &mut segment.state {
                State::Moments { first, second } => vec![
                    Remembered { what: What::First, own: own(), moment: first },
                    Remembered { what: What::Second, own: own(), moment: second },
                ],
                State::Velocity(velocity) => vec![Remembered { what: What::Velocity, own: own(), moment: velocity }],
                State::Nothing => Vec::new(),
            }
        });
        all.collect()
    }

    pub fn bytes(&self) -> usize {
        let each = |segment: &Segment| match &segment.state {
            State::Moments { first, second } => first.bytes() + second.bytes(),
            State::Velocity(velocity) => velocity.bytes(),
            State::Nothing => 0,
        };
        self.state.iter().flatten().map(each).sum()
    }
}
