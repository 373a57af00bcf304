//! What a run tells of its steps: a line of metrics each, and the bar.

use std::time::Instant;

use serde_json::{Value, json};

use super::{Context, RunError, process};
use crate::abi::host;
use crate::dist::World;
use crate::telemetry::{Metrics, Progress};
use crate::train::{StepReport, StepWork, Trainer};

/// What a run tells of its steps.
pub(super) struct Journal<'a> {
    pub(super) metrics: &'a mut Metrics,
    pub(super) progress: Progress,
    pub(super) per_epoch: usize,
    /// Through the model so far, all ranks.
    pub(super) tokens: usize,
    /// Spent in collectives when the last step was told.
    pub(super) comm_seconds: f64,
    /// Of this process when the last step was told.
    pub(super) cpu_seconds: f64,
    pub(super) told: Instant,
    /// From the start of the process to the first step that it told of.
    pub(super) seconds_to_first_step: f64,
    /// Further keys of a line; none where it is null.
    pub(super) stage: Value,
}

impl Journal<'_> {
    /// A line of metrics and a step of the bar.
    pub(super) fn tell(
        &mut self,
        step: usize,
        work: &StepWork,
        report: &StepReport,
        trainer: &Trainer,
        context: &Context,
    ) -> Result<(), RunError> {
        let seconds = std::mem::replace(&mut self.told, Instant::now()).elapsed().as_secs_f64();
        if self.seconds_to_first_step == 0.0 {
            self.seconds_to_first_step = context.started.elapsed().as_secs_f64();
        }
        let communication = comm_seconds(&context.world);
        let losses = report.losses;
        let mut line = json!({
            "step": step + 1,
            "epoch": (step + 1) as f64 / self.per_epoch as f64,
            "loss": losses.total,
            "forget_loss": losses.forget,
            "retain_loss": losses.retain,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "tokens": work.tokens,
            "forget_tokens": work.scored.0,
            "retain_tokens": work.scored.1,
            "tokens_per_s": work.tokens as f64 / seconds,
            "step_s": seconds,
            "cpu_s": host::cpu_seconds() - self.cpu_seconds,
            "comm_s": communication - self.comm_seconds,
            "rss_bytes": process::resident_bytes(),
            "device_bytes": process::device_bytes(context.device),
            "time": process::unix_seconds(),
        });
        for (name, value) in trainer.method.numbers().iter().zip(&report.numbers) {
            line[name] = json!(value);
        }
        if trainer.method.dual.is_some() {
            line["retain_weight"] = json!(trainer.method.retain_weight);
        }
        for (name, value) in self.stage.as_object().into_iter().flatten() {
            line[name] = value.clone();
        }
        self.metrics.write(&line)?;
        context.board.step(step + 1, losses.total, seconds, work.tokens);
        context.board.update(|status| status.device_bytes = line["device_bytes"].as_u64().unwrap_or(0));
        self.tokens += work.tokens;
        self.comm_seconds = communication;
        self.cpu_seconds = host::cpu_seconds();
        tracing::debug!(step = step + 1, loss = losses.total, grad_norm = report.grad_norm, seconds);
        self.progress.advance(1, &format!("loss {:.4}  grad {:.2e}", losses.total, report.grad_norm));
        Ok(())
    }

    /// What was done since the last step belongs to no step.
    pub(super) fn between_steps(&mut self, world: &World) {
        self.told = Instant::now();
        self.comm_seconds = comm_seconds(world);
        self.cpu_seconds = host::cpu_seconds();
    }
}

/// Seconds that this rank has spent in collectives.
pub(super) fn comm_seconds(world: &World) -> f64 {
    [&world.world, &world.tp, &world.dp].iter().map(|group| group.traffic().time.as_secs_f64()).sum()
}
