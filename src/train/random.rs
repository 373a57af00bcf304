//! A trainer whose weights are drawn: for benchmarks, and for what a step needs of a machine whatever it trains.

use std::convert::Infallible;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::{
    GradientBuffers, GradientOptions, Layout, Method, Optimizer, Parameters, Schedule, Trainer, TrainerOptions,
};
use crate::config;
use crate::dist::World;
use crate::model::sharding::{Piece, Table};
use crate::model::{Architecture, Decoder, Keep, LogitsPool, ModelError, init};
use crate::telemetry::Clock;

/// What is trained and how; of `train`, epochs and steps are not used.
pub struct RandomTrainer<'a> {
    pub arch: &'a Architecture,
    pub parallel: &'a config::Parallel,
    pub train: &'a config::Train,
    pub optimizer: &'a config::Optimizer,
    pub method: Method,
    pub device: Device,
    pub steps: usize,
}

impl RandomTrainer<'_> {
    /// All ranks call it.
    ///
    /// # Errors
    /// A model that does not divide into the mesh.
    pub fn build(self, world: &World) -> Result<Trainer, ModelError> {
        let Self { arch, parallel, train, optimizer, method, device, steps } = self;
        let mesh = world.mesh;
        let table = Table::new(arch, mesh.tp, mesh.tp_rank(), parallel.sequence_parallel)?;
        let layout = Layout::of(&table, parallel, mesh);
        let source = |id: usize, piece: &Piece| {
            let param = &table.params[id];
            Ok::<Tensor, Infallible>(if device == Device::Cpu || param.shape.len() == 1 {
                init::initial(param, piece, 0, 0.02)
            } else {
                // billions of numbers that only have to be numbers: drawn where they are used
                Tensor::randn(&piece.size, (Kind::BFloat16, device)) * 0.02
            })
        };
        let kind = match train.precision {
            config::Precision::Bf16 => Kind::BFloat16,
            config::Precision::F32 => Kind::Float,
        };
        let Ok(parameters) = Parameters::new(&table, layout, kind, device, source);
        let decoder = Decoder {
            arch: arch.clone(),
            table,
            tp: Rc::clone(&world.tp),
            sequence_parallel: parallel.sequence_parallel,
            device,
            clock: Clock::default(),
            logits: LogitsPool::default(),
        };
        let holding = GradientOptions {
            kind: super::kind(train.grad_dtype),
            reduce: super::kind(parallel.reduce_dtype),
            release: optimizer.in_backward,
            device,
        };
        Ok(Trainer {
            gradients: GradientBuffers::new(&decoder.table, &parameters.layout, &world.tp, &world.dp, holding),
            optimizer: Optimizer::new(optimizer, &decoder.table, &parameters),
            schedule: Schedule::new(&config::Schedule::default(), optimizer.lr, steps, 1),
            method,
            options: TrainerOptions {
                keep: match train.recompute {
                    config::Recompute::None => Keep::Everything,
                    config::Recompute::HalfBlock => Keep::Inputs,
                },
                logits_bytes: train.logits_mib * 1048576.0,
                max_grad_norm: optimizer.max_grad_norm,
                in_backward: optimizer.in_backward,
            },
            broken: Trainer::whole(device),
            decoder,
            parameters,
        })
    }
}
