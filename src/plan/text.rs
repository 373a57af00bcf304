//! A plan for people, and as JSON.

use serde_json::{Value, json};

use super::advice::Suggestion;
use super::tally::{Bytes, PARTS};
use super::{Plan, Seconds};
use crate::telemetry::table;

/// `12.34 GiB`, or MiB where that says more.
pub fn gib(bytes: u64) -> String {
    match bytes as f64 / 1073741824.0 {
        gib if gib >= 0.1 => format!("{gib:.2} GiB"),
        gib => format!("{:.1} MiB", gib * 1024.0),
    }
}

impl Plan {
    /// For people. `assumptions`: what was assumed beside the machine.
    pub fn text(&self, assumptions: &[String]) -> String {
        let Self { mesh, machine, .. } = self;
        let nodes = mesh.world().div_ceil(self.per_node);
        let places = if nodes > 1 { format!(", {nodes} nodes of {}", self.per_node) } else { String::new() };
        let head = format!(
            "{:.2} G parameters, {} trained on a rank; {} ranks (tp {} x dp {}) on {}{places}\n",
            self.parameters as f64 / 1e9,
            count(self.trained as f64),
            mesh.world(),
            mesh.tp,
            mesh.dp,
            machine.name
        );
        let rows = PARTS.iter().filter(|(part, _)| self.peak.bytes[*part as usize] > 0).map(|&(part, name)| {
            let (peak, stays) = (self.peak.bytes[part as usize], self.state[part as usize]);
            vec![name.to_owned(), gib(peak), if stays > 0 { gib(stays) } else { "-".to_owned() }]
        });
        let mut rows: Vec<Vec<String>> = rows.collect();
        rows.push(vec!["all".to_owned(), gib(self.peak.total()), gib(self.state.iter().sum())]);
        let verdict = if self.fits() {
            format!(
                "fits: {} of {} at most, in {}",
                gib(self.peak.total()),
                gib(machine.memory_bytes()),
                self.peak.place
            )
        } else {
            format!(
                "DOES NOT FIT: {} are needed in {}, {} has {}",
                gib(self.peak.total()),
                self.peak.place,
                machine.name,
                gib(machine.memory_bytes())
            )
        };
        let mut text = format!(
            "{head}\n{}  {verdict}\n\n{}\n",
            table(&["memory of the fullest rank", "at the peak", "between steps"], &rows),
            self.time_text()
        );
        if !self.traffic.is_empty() {
            text += &(self.traffic_text() + "\n");
        }
        text += &self.run_text();
        text += "\nassumed:\n";
        for line in self.assumptions().iter().chain(assumptions) {
            text += &format!("  - {line}\n");
        }
        text
    }

    fn time_text(&self) -> String {
        let Seconds { products, passes, optimizer, tp, dp, hidden } = self.seconds;
        let total = self.seconds.total();
        let row = |name: &str, seconds: f64| {
            vec![name.to_owned(), duration(seconds), format!("{:.1} %", 100.0 * seconds / total)]
        };
        let mut rows =
            vec![row("matrix products", products), row("passes over memory", passes), row("optimizer", optimizer)];
        if self.mesh.tp > 1 {
            rows.push(row("tensor-parallel traffic", tp));
        }
        if self.mesh.dp > 1 {
            rows.push(row("data-parallel traffic, waited for", dp));
        }
        rows.push(row("a step", total));
        if hidden > 0.0 {
            let beside = vec!["(data-parallel traffic beside backward)".to_owned(), duration(hidden), String::new()];
            rows.push(beside);
        }
        let useful = self.operations - self.repeated;
        format!(
            "{}  {:.0} tokens a step, {:.0} tokens/s; {} operations on a rank, {} of them computed twice; {:.0} % of the sheet's rate\n",
            table(&["time of the slowest rank", "", "share"], &rows),
            self.tokens,
            self.tokens / total,
            count(self.operations),
            count(self.repeated),
            100.0 * useful / total / self.machine.peak_rate()
        )
    }

    fn traffic_text(&self) -> String {
        let rows = self.traffic.iter().map(|traffic| {
            let beside = if traffic.axis == "dp" && traffic.op == "reduce-scatter" && self.machine.overlaps {
                "beside backward"
            } else {
                "waited for"
            };
            vec![
                format!("{} {}", traffic.axis, traffic.op),
                traffic.calls.to_string(),
                gib(traffic.bytes),
                gib(traffic.wire_bytes as u64),
                beside.to_owned(),
            ]
        });
        table(&["a rank's collectives in a step", "calls", "tensors", "sent", ""], &rows.collect::<Vec<_>>())
    }

    fn run_text(&self) -> String {
        let mut rows = vec![
            vec![format!("{} steps", self.steps), duration(self.steps as f64 * self.seconds.total())],
            vec!["reference and evaluation".to_owned(), duration(2.0 * self.scoring_seconds)],
            vec!["reading and export".to_owned(), duration(self.load_seconds())],
        ];
        if self.saves > 0 {
            rows.push(vec![format!("{} saves, copies that steps wait for", self.saves), duration(self.save_seconds())]);
        }
        rows.push(vec!["the run".to_owned(), duration(self.run_seconds())]);
        rows.push(vec![format!("{} devices", self.mesh.world()), format!("{:.2} device hours", self.device_hours())]);
        format!(
            "{}  a checkpoint: {} in all, {} a rank, on disk after {}{}; the exported model: {}\n",
            table(&["the run", ""], &rows),
            gib(self.checkpoint.1),
            gib(self.checkpoint.0),
            duration(self.write_seconds()),
            if self.snapshot > 0 {
                format!("; for copies of it a rank keeps {} of host memory", gib(self.snapshot))
            } else {
                String::new()
            },
            gib(self.export)
        )
    }

    /// What the machine's numbers stand on.
    fn assumptions(&self) -> Vec<String> {
        let m = &self.machine;
        if let Some(measured) = &m.measured {
            let mut lines = vec!["times of products and passes were measured on this machine just now".to_owned()];
            if !measured.calls.is_empty() {
                lines.push("so were its collectives, all ranks at work; nothing runs beside computing".to_owned());
            } else if self.mesh.world() > 1 {
                lines.push(format!(
                    "{} GB/s between processes, not measured (start plan as the run would be, with mpirun, and it is); nothing runs beside computing",
                    m.node_gbs
                ));
            }
            return lines;
        }
        vec![
            format!(
                "{}: {:.0} TFLOP/s on the sheet, of which large products reach {:.0} %; {:.0} GB/s of memory, of which passes reach {:.0} %",
                m.name,
                m.peak_rate() / 1e12,
                100.0 * m.matrix_share,
                m.memory_gbs,
                100.0 * m.memory_share
            ),
            format!(
                "rings of {:.0} GB/s inside a node and {:.0} GB/s of network for each device; {:.0} and {:.0} microseconds a call",
                m.node_gbs, m.network_gbs, m.node_latency_us, m.network_latency_us
            ),
            format!(
                "{} GiB for contexts and workspaces, {} GiB for each communicator, 3 % left free; {} GB/s of files a rank",
                m.runtime_gib, m.communicator_gib, m.disk_gbs
            ),
            "none of these was measured on a GPU; a file with --gpu FILE replaces them".to_owned(),
        ]
    }

    /// For programs.
    pub fn json(&self, assumptions: &[String], suggestions: &[Suggestion]) -> Value {
        let by_part = |bytes: &Bytes| -> Value {
            PARTS
                .iter()
                .map(|&(part, name)| (name.replace(' ', "_"), json!(bytes[part as usize])))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let Seconds { products, passes, optimizer, tp, dp, hidden } = self.seconds;
        json!({
            "mesh": { "tp": self.mesh.tp, "dp": self.mesh.dp, "ranks": self.mesh.world(), "devices_per_node": self.per_node },
            "machine": self.machine,
            "parameters": self.parameters,
            "trained_on_a_rank": self.trained,
            "fits": self.fits(),
            "memory": {
                "available": self.machine.memory_bytes(),
                "peak": self.peak.total(),
                "place": self.peak.place.to_string(),
                "at_peak": by_part(&self.peak.bytes),
                "between_steps": by_part(&self.state),
            },
            "step": {
                "seconds": self.seconds.total(),
                "products": products, "passes": passes, "optimizer": optimizer,
                "tp_traffic": tp, "dp_traffic": dp, "dp_traffic_hidden": hidden,
                "tokens": self.tokens, "micro_batches": self.micro_batches,
                "operations": self.operations, "repeated_operations": self.repeated,
                "traffic": self.traffic,
            },
            "run": {
                "steps": self.steps, "seconds": self.run_seconds(), "device_hours": self.device_hours(),
                "scoring_seconds": self.scoring_seconds, "saves": self.saves,
            },
            "checkpoint": { "rank_bytes": self.checkpoint.0, "host_bytes": self.snapshot,"bytes": self.checkpoint.1, "seconds": self.write_seconds() },
            "export_bytes": self.export,
            "assumptions": self.assumptions().iter().chain(assumptions).collect::<Vec<_>>(),
            "suggestions": suggestions,
        })
    }
}

/// `8.82 G`.
fn count(n: f64) -> String {
    let (n, unit) = match n {
        n if n >= 1e15 => (n / 1e15, " P"),
        n if n >= 1e12 => (n / 1e12, " T"),
        n if n >= 1e9 => (n / 1e9, " G"),
        n if n >= 1e6 => (n / 1e6, " M"),
        n => (n, ""),
    };
    format!("{n:.2}{unit}")
}

/// `1.25 s`, `3.4 min`, `12.0 h`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s >= 5400.0 => format!("{:.1} h", s / 3600.0),
        s if s >= 120.0 => format!("{:.1} min", s / 60.0),
        s if s >= 1.0 => format!("{s:.2} s"),
        s => format!("{:.1} ms", s * 1e3),
    }
}
