//! AdamW and SGD on the part of the parameters that this rank owns.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::layout::Layout;
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

/// How something remembered is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Bytes of each.
    Numbers { width: usize },
    /// 8 bits each, and a scale for each block.
    Codes,
}

/// Neighbouring parameters of one class and one unit.
struct Segment {
    class: Class,
    unit: usize,
    /// Elements of this rank's own part of the bucket.
    own: Range<usize>,
    /// Which of them may change, where not all may: `[chosen]` i32.
    chosen: Option<Tensor>,
    state: State,
}

/// Of the size of the segment, or of what is chosen of it.
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
    /// Which of them the moment is of, where not all: `[chosen]` i32.
    pub chosen: Option<&'a Tensor>,
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
    /// Changes nothing and remembers nothing.
    pub fn none() -> Self {
        Self { rule: Rule::Sgd { momentum: 0.0 }, weight_decay: 0.0, steps: 0, state: Vec::new() }
    }

    /// How AdamW's moments are stored.
    pub fn storage(config: &config::Optimizer) -> Storage {
        match config.state_dtype.unwrap_or_default() {
            config::StateDtype::F32 => Storage::F32,
            config::StateDtype::Bf16 => Storage::Bf16,
            config::StateDtype::Int8 => Storage::Block8,
        }
    }

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
        let storage = Self::storage(config);
        let state =
            parameters.layout.buckets.iter().zip(&parameters.masters).enumerate().map(|(index, (bucket, master))| {
                let segments = bucket.segments(table).into_iter().filter(|segment| !segment.own.is_empty());
                let with_state = segments.map(|segment| {
                    let chosen = parameters.selection.as_ref().map(|selection| selection.indices(index, &segment.own));
                    let len = chosen.as_ref().map_or(segment.own.len(), Tensor::numel);
                    let zeros = |storage, codes| Moment::zeros(storage, codes, len as i64, master.device());
                    let state = match rule {
                        Rule::AdamW { .. } => State::Moments {
                            first: zeros(storage, Codes::Signed),
                            second: zeros(storage, Codes::Unsigned),
                        },
                        Rule::Sgd { momentum } if momentum > 0.0 => State::Velocity(zeros(Storage::F32, Codes::Signed)),
                        Rule::Sgd { .. } => State::Nothing,
                    };
                    Segment { class: segment.class, unit: segment.unit, own: segment.own, chosen, state }
                });
                with_state.collect()
            });
        Self { state: state.collect(), rule, weight_decay: config.weight_decay, steps: 0 }
    }

    /// What [`Self::bytes`] of an optimizer would be, of which `chosen`, a share of each segment, may change: None for all.
    pub fn planned_bytes(config: &config::Optimizer, table: &Table, layout: &Layout, chosen: Option<f64>) -> usize {
        let segments = layout.buckets.iter().flat_map(|bucket| bucket.segments(table));
        let each = segments.map(|segment| {
            let len = chosen.map_or(segment.own.len(), |share| (share * segment.own.len() as f64).ceil() as usize);
            let state = match config.name {
                config::OptimizerName::Adamw => 2 * Self::storage(config).bytes(len),
                config::OptimizerName::Sgd if config.momentum.unwrap_or(config::Optimizer::MOMENTUM) > 0.0 => 4 * len,
                config::OptimizerName::Sgd => 0,
            };
            state + if chosen.is_some() { 4 * len } else { 0 }
        });
        each.sum()
    }

    /// What [`Self::look`] would show, in bytes: where only some may change, each element of a segment is a number, and its scale another.
    pub fn planned_look(config: &config::Optimizer, table: &Table, layout: &Layout, chosen: Option<f64>) -> usize {
        if chosen.is_none() {
            return Self::planned_bytes(config, table, layout, None);
        }
        let numbers = match config.name {
            config::OptimizerName::Adamw if config.state_dtype == Some(config::StateDtype::Int8) => 4,
            config::OptimizerName::Adamw => 2,
            config::OptimizerName::Sgd if config.momentum.unwrap_or(config::Optimizer::MOMENTUM) > 0.0 => 1,
            config::OptimizerName::Sgd => 0,
        };
        let segments = layout.buckets.iter().flat_map(|bucket| bucket.segments(table));
        segments.map(|segment| 4 * numbers * segment.own.len()).sum()
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
            if segment.chosen.as_ref().is_some_and(|chosen| chosen.numel() == 0) {
                continue;
            }
            let part = |t: &Tensor| t.narrow(0, segment.own.start as i64, segment.own.len() as i64);
            // copies of what may change, put back below
            let chosen = segment.chosen.as_ref().map(|chosen| chosen.to_kind(Kind::Int64));
            let take = |t: &Tensor| chosen.as_ref().map_or_else(|| part(t), |chosen| part(t).index_select(0, chosen));
            let (mut master, grad) = (take(&parameters.masters[bucket]), take(grad));
            let weight_decay = if segment.class.is_matrix() { self.weight_decay } else { 0.0 };
            let scale = (update.scale)(segment.unit);
            let rounded = parameters.rounded(bucket);
            let mut copy = rounded.as_ref().map(take);
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
            if let Some(chosen) = &chosen {
                let _ = part(&parameters.masters[bucket]).index_copy_(0, chosen, &master);
                if let (Some(own), Some(copy)) = (&rounded, &copy) {
                    let _ = part(own).index_copy_(0, chosen, copy);
                }
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

    /// What is remembered of one bucket: which number, of which elements of this rank's own part. Where only some may change, the
    /// others' is 0, and the scales of codes are numbers of their own.
    pub fn look(&self, bucket: usize) -> Vec<(What, Range<usize>, Moment)> {
        let each = |segment: &Segment, what: What, moment: &Moment| {
            let seen = segment.chosen.as_ref().map_or_else(
                || moment.shallow_clone(),
                |chosen| moment.spread(&chosen.to_kind(Kind::Int64), segment.own.len() as i64),
            );
            let scales = segment.chosen.as_ref().and_then(|chosen| {
                let scales = moment.spread_scales(&chosen.to_kind(Kind::Int64), segment.own.len() as i64)?;
                Some((what.scale()?, segment.own.clone(), scales))
            });
            [Some((what, segment.own.clone(), seen)), scales].into_iter().flatten()
        };
        let all = self.state[bucket].iter().flat_map(|segment| match &segment.state {
            State::Moments { first, second } => {
                each(segment, What::First, first).chain(each(segment, What::Second, second)).collect()
            }
            State::Velocity(velocity) => each(segment, What::Velocity, velocity).collect(),
            State::Nothing => Vec::new(),
        });
        all.collect()
    }

    /// Of each thing in [`Self::look`]: the elements of this rank's own part, and as what it is stored.
    pub fn forms(&self, bucket: usize) -> impl Iterator<Item = (Range<usize>, Form)> {
        let of_moment = |segment: &Segment, moment: &Moment| match (&segment.chosen, &moment.scales) {
            (None, None) => vec![Form::Numbers { width: moment.values.kind().elt_size_in_bytes() }],
            (None, Some(_)) => vec![Form::Codes],
            (Some(_), None) => vec![Form::Numbers { width: 4 }],
            (Some(_), Some(_)) => vec![Form::Numbers { width: 4 }; 2],
        };
        self.state[bucket].iter().flat_map(move |segment| {
            let moments = match &segment.state {
                State::Moments { first, second } => vec![first, second],
                State::Velocity(velocity) => vec![velocity],
                State::Nothing => Vec::new(),
            };
            let forms: Vec<Form> = moments.into_iter().flat_map(|moment| of_moment(segment, moment)).collect();
            forms.into_iter().map(|form| (segment.own.clone(), form))
        })
    }

    /// Numbers that the rule remembers of each element.
    pub fn whats(&self) -> &'static [What] {
        match self.rule {
            Rule::AdamW { .. } => &[What::First, What::Second],
            Rule::Sgd { momentum } if momentum > 0.0 => &[What::Velocity],
            Rule::Sgd { .. } => &[],
        }
    }

    /// As [`Self::look`], to be filled.
    pub fn remembered(&mut self, bucket: usize) -> Vec<Remembered<'_>> {
        let all = self.state[bucket].iter_mut().flat_map(|segment| {
            let (own, chosen) = (segment.own.clone(), segment.chosen.as_ref());
            let each = |what, moment| Remembered { what, own: own.clone(), chosen, moment };
            match &mut segment.state {
                State::Moments { first, second } => vec![each(What::First, first), each(What::Second, second)],
                State::Velocity(velocity) => vec![each(What::Velocity, velocity)],
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
        let indices = |segment: &Segment| segment.chosen.as_ref().map_or(0, |chosen| 4 * chosen.numel());
        self.state.iter().flatten().map(|segment| each(segment) + indices(segment)).sum()
    }
}
