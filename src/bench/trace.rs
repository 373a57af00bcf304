//! One step as a timeline: parts of the computation, and the data-parallel sums beside them.

use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use crate::dist::World;
use crate::telemetry::{PARTS, Span};
use crate::train::Flight;

/// A step of all ranks as their hosts saw it. On a GPU the host runs ahead of the device: take its profiler there.
#[derive(Clone, Debug, Serialize)]
pub struct Trace {
    /// Events in the format of Chrome's tracing (`chrome://tracing`, Perfetto): a process a rank. Unit of times: microseconds.
    #[serde(skip)]
    pub events: Vec<Value>,
    /// Data-parallel sums of rank 0. Unit: milliseconds from start to end, and of that in which the host waited.
    pub sums_ms: f64,
    pub waited_ms: f64,
}

impl Trace {
    /// All ranks call it; all get the same.
    pub fn of(spans: &[Span], flights: &[Flight], start: Instant, world: &World) -> Self {
        let rank = world.mesh.rank;
        let event = |name: &str, track: usize, from: Instant, to: Instant| {
            let (at, lasts) = (micros(start, from), micros(from, to));
            json!({ "name": name, "ph": "X", "pid": rank, "tid": track, "ts": at, "dur": lasts })
        };
        let named = |track: usize, name: &str| json!({ "name": "thread_name", "ph": "M", "pid": rank, "tid": track, "args": { "name": name } });
        let mut events = vec![
            named(0, "compute"),
            named(1, "gradients under way"),
            named(2, "gradients waited for"),
            named(3, "gradients under way"),
        ];
        events.extend(spans.iter().map(|span| event(PARTS[span.part as usize].1, 0, span.start, span.end)));
        for (index, flight) in flights.iter().enumerate() {
            let name = format!("bucket {index}");
            events.push(event(&name, 1 + 2 * (index % 2), flight.start, flight.waited));
            events.push(event(&name, 2, flight.waited, flight.end));
        }
        let text = serde_json::to_vec(&events).expect("invariant: events are JSON");
        let all = world.world.gather_bytes(&text);
        let read = |text: &Vec<u8>| serde_json::from_slice::<Vec<Value>>(text).expect("invariant: written above");
        let ms = |from: fn(&Flight) -> Instant| -> f64 {
            flights.iter().map(|flight| micros(from(flight), flight.end) / 1e3).sum()
        };
        let mut sums = [ms(|flight| flight.start), ms(|flight| flight.waited)];
        if rank > 0 {
            sums = [0.0; 2];
        }
        world.world.all_reduce_f64(&mut sums, crate::dist::Reduce::Sum);
        Self { events: all.iter().flat_map(read).collect(), sums_ms: sums[0], waited_ms: sums[1] }
    }

    /// For people.
    pub fn text(&self) -> String {
        if self.sums_ms == 0.0 {
            return "one data-parallel rank: nothing to add up\n".to_owned();
        }
        format!(
            "data-parallel sums of a step: {:.1} ms under way, {:.1} ms waited for: {:.0} % beside other work\n",
            self.sums_ms,
            self.waited_ms,
            100.0 * (1.0 - self.waited_ms / self.sums_ms)
        )
    }
}

fn micros(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e6
}
