//! One rank of a large mesh, run alone: real shapes, real kernels, real optimizer shards; the other ranks are not there.
//!
//! Collectives bring nothing and are counted. What they would take is modelled from the bytes and a rate for each axis.

use serde::Serialize;

use super::step::{StepBench, StepResult, step};
use crate::dist::wire::{Record, Traffic, summarise};
use crate::dist::{Mesh, World};
use crate::model::ModelError;
use crate::telemetry::table;

/// Which rank of which mesh, and the network that it is imagined on.
#[derive(Clone, Copy, Debug)]
pub struct RankBench {
    pub mesh: Mesh,
    /// Ring bandwidth of the tensor-parallel ranks. Unit: bytes a second for each rank.
    pub tp_rate: f64,
    /// The same for the data-parallel ranks.
    pub dp_rate: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct RankResult {
    pub rank: usize,
    pub tp: usize,
    pub dp: usize,
    /// Measured on the one rank; rates are those of the whole job if all ranks computed as fast and no collective took time.
    pub computed: StepResult,
    /// Per step, measured by counting; by axis and operation.
    pub traffic: Vec<Traffic>,
    /// Seconds a step that the collectives would take if nothing overlapped: `modelled`, not measured.
    pub tp_seconds: f64,
    pub dp_seconds: f64,
}

/// Runs the rank.
pub fn rank(bench: &StepBench, rank: &RankBench) -> Result<RankResult, ModelError> {
    let record = Record::default();
    let world = World::planned(rank.mesh, &record);
    let mut last = Vec::new();
    let computed = step(bench, &world, |_| last = record.take())?;
    let traffic = summarise(&last);
    let seconds = |axis: &str, rate: f64| {
        traffic.iter().filter(|traffic| traffic.axis == axis).map(|traffic| traffic.wire_bytes).sum::<f64>() / rate
    };
    let (tp_seconds, dp_seconds) = (seconds("tp", rank.tp_rate), seconds("dp", rank.dp_rate));
    let Mesh { rank, tp, dp } = rank.mesh;
    Ok(RankResult { rank, tp, dp, computed, traffic, tp_seconds, dp_seconds })
}

impl RankResult {
    /// For people.
    pub fn text(&self) -> String {
        let mib = |bytes: f64| format!("{:.1}", bytes / 1048576.0);
        let memory = self.computed.memory.iter().map(|(name, bytes)| vec![name.clone(), mib(*bytes as f64)]);
        let mut memory: Vec<Vec<String>> = memory.collect();
        let known: u64 = self.computed.memory.iter().map(|(_, bytes)| bytes).sum();
        if self.computed.device_bytes > known {
            let rest = (self.computed.device_bytes - known) as f64;
            memory.push(vec!["activations, workspace, cache of the allocator".to_owned(), mib(rest)]);
            memory.push(vec!["all, as the device sees it".to_owned(), mib(self.computed.device_bytes as f64)]);
        }
        let traffic = self.traffic.iter().map(|traffic| {
            let Traffic { axis, op, calls, bytes, wire_bytes } = traffic;
            vec![(*axis).to_owned(), (*op).to_owned(), calls.to_string(), mib(*bytes as f64), mib(*wire_bytes)]
        });
        format!(
            "rank {} of tp {} x dp {}, alone; collectives are counted, not carried out\n\n{}\n{}\n{}\n\
             modelled, not measured: {:.3} s of tensor-parallel and {:.3} s of data-parallel traffic a step if none of it overlapped\n",
            self.rank,
            self.tp,
            self.dp,
            self.computed.text(),
            table(&["memory of this rank", "MiB"], &memory),
            table(&["axis", "operation", "calls", "MiB", "MiB sent"], &traffic.collect::<Vec<_>>()),
            self.tp_seconds,
            self.dp_seconds
        )
    }
}
