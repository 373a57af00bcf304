//! The plan of a run beside the run: what its first step should need, and what it needed.

use serde_json::{Value, json};
use tch::Device;

use super::{Context, Inputs, Memory, RunError, process};
use crate::abi::{driver, host};
use crate::config::Config;
use crate::dist::Reduce;
use crate::dist::wire::{Call, Record, summarise};
use crate::plan::{self, Base, Engine, Job, Machine, Part, PlanError, Walked};

/// What the first step of this rank should need.
pub(super) struct Planned {
    walked: Walked,
    /// Resident bytes before the step.
    before: u64,
    record: Record,
    /// Whether seconds are planned: on a GPU whose sheet is known.
    timed: bool,
}

/// Share by which a plan may be wrong without a warning.
const TOLERANCE: f64 = 0.1;

/// Bytes by which memory may be off whatever the share: libraries take that much more or less.
const LEAST: u64 = 64 << 20;

impl Planned {
    /// Plans the step `first`, before the model is there. All ranks call it.
    pub(super) fn new(config: &Config, inputs: &Inputs, context: &Context, first: usize) -> Result<Self, RunError> {
        let mesh = context.world.mesh;
        let cpu = context.device == Device::Cpu;
        let sheet = match context.device {
            Device::Cuda(index) => driver::device(index).ok().and_then(|device| sheet(&device.name)),
            _ => None,
        };
        let timed = sheet.is_some();
        let base = base(config, inputs, context)?;
        let machine = sheet.unwrap_or_else(|| Machine::host(f64::MAX / 2.0, base, None));
        let engine = if cpu { Engine::HOST } else { Engine::GPU };
        let retain = inputs.retain.as_ref();
        let (anchors, arch, machine) = (&inputs.anchors, &inputs.arch, &machine);
        let job = Job { config, arch, anchors, retain, mesh, engine, machine, per_node: 8 };
        let walked = job.walk_from(mesh, first, 1)?.remove(0);
        let wire = sent(&walked.calls);
        tracing::info!(
            "planned: {} at most on this rank, in {}; {} sent in the first step{}",
            plan::gib(walked.peak.total()),
            walked.peak.place,
            plan::gib(wire as u64),
            if timed { format!(" of {:.2} s", walked.seconds.total()) } else { String::new() }
        );
        Ok(Self { walked, before: 0, record: Record::default(), timed })
    }

    /// What stays over the steps, before anything is allocated.
    pub(super) fn memory(&self) -> Memory {
        let Walked { held, peak, .. } = &self.walked;
        let bytes = |part: Part| held[part as usize] as usize;
        Memory {
            weights: bytes(Part::Weights),
            masters: bytes(Part::Masters),
            // those that come and go within a step are as many as there are at the peak
            gradients: bytes(Part::Gradients).max(peak.bytes[Part::Gradients as usize] as usize),
            optimizer: bytes(Part::Moments),
        }
    }

    /// From here on the step's memory counts, and its calls are noted.
    pub(super) fn watch(&mut self, context: &Context) {
        host::give_back_freed_memory();
        host::forget_peak();
        self.before = host::resident_bytes();
        for group in [&context.world.tp, &context.world.dp] {
            group.record(&self.record);
        }
    }

    /// The step has made its calls.
    pub(super) fn unwatch(&self, context: &Context) {
        for group in [&context.world.tp, &context.world.dp] {
            group.record_no_more();
        }
    }

    /// What came of it: a line for the metrics, and a warning where the two differ by more than a tenth. All ranks call it.
    pub(super) fn compare(self, seconds: f64, context: &Context) -> Value {
        let cpu = context.device == Device::Cpu;
        let peak = if cpu { host::peak_resident_bytes() } else { process::device_bytes(context.device) };
        let planned_peak = self.walked.own_peak.total();
        let (wire, planned_wire) = (sent(&self.record.take()), sent(&self.walked.calls));
        let off = |found: f64, planned: f64| if planned > 0.0 { (found / planned - 1.0).abs() } else { 0.0 };
        let memory_off = if peak.abs_diff(planned_peak) > LEAST { off(peak as f64, planned_peak as f64) } else { 0.0 };
        let mut worst = [memory_off, off(wire, planned_wire)];
        context.world.world.all_reduce_f64(&mut worst, Reduce::Max);
        let told = format!(
            "the first step against its plan: peak {} of {} planned, sent {} of {}",
            plan::gib(peak),
            plan::gib(planned_peak),
            plan::gib(wire as u64),
            plan::gib(planned_wire as u64)
        );
        if worst.iter().any(|&off| off > TOLERANCE) {
            tracing::warn!(
                "{told}; on some rank more than 10 % off; leave that much room (docs/plan.md says what the plan does not see)"
            );
        } else {
            tracing::debug!("{told}");
        }
        json!({
            "peak_bytes": peak,
            "planned_peak_bytes": planned_peak,
            "before_bytes": self.before,
            "planned_before_bytes": self.walked.before.iter().sum::<u64>(),
            "base_bytes": self.walked.own_peak.bytes[Part::Runtime as usize],
            "wire_bytes": wire,
            "planned_wire_bytes": planned_wire,
            "step_s": seconds,
            "planned_step_s": self.timed.then(|| self.walked.seconds.total()),
            "worst_memory_off": worst[0],
            "worst_wire_off": worst[1],
            "peak_in": self.walked.own_peak.place.to_string(),
            "planned_parts": plan::PARTS.iter().map(|&(part, name)| (name.replace(' ', "_"), json!(self.walked.own_peak.bytes[part as usize])))
                .collect::<serde_json::Map<_, _>>(),
        })
    }
}

/// What the process takes before the model, the buffers of its transport included; nothing on a GPU, whose sheet says what a context
/// takes. All ranks call it.
fn base(config: &Config, inputs: &Inputs, context: &Context) -> Result<Base, RunError> {
    if context.device != Device::Cpu {
        return Ok(Base::default());
    }
    Ok(plan::base(config, &inputs.arch, &context.world).map_err(PlanError::from)?)
}

/// Bytes that a rank sends.
fn sent(calls: &[Call]) -> f64 {
    summarise(calls).iter().fold(0.0, |sum, traffic| sum + traffic.wire_bytes)
}

/// The sheet of a device by the driver's name for it.
fn sheet(name: &str) -> Option<Machine> {
    let known = [("H200", "h200"), ("H100", "h100-80g"), ("A100-SXM4-80GB", "a100-80g"), ("B200", "b200")];
    known.iter().find(|(part, _)| name.contains(part)).and_then(|(_, sheet)| Machine::sheet(sheet))
}
