//! What a rank runs on: memory and rates, from a data sheet with the share that programs reach, from a file, or measured.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::tally::{Pass, Product};
use crate::abi::host::MAPPED;
use crate::config::Precision;
use crate::dist::Mesh;
use crate::dist::wire::Call;
use crate::kernels::product::has_bf16;

/// One device and the links to the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub name: String,
    /// Memory that a process can have. Unit: GiB.
    pub memory_gib: f64,
    /// Rate of matrix products on the data sheet, and the share of it that a step's products reach. Unit: 1e12 operations a second.
    pub bf16_tflops: f64,
    pub f32_tflops: f64,
    pub matrix_share: f64,
    /// Rate of the memory on the data sheet, and the share that passes over memory reach. Unit: 1e9 bytes a second.
    pub memory_gbs: f64,
    pub memory_share: f64,
    /// What a process takes before its first tensor: context, kernels, the products' workspace. Unit: GiB.
    pub runtime_gib: f64,
    /// Reserve of one communicator of several ranks. Unit: GiB.
    pub communicator_gib: f64,
    /// Bandwidth of a ring inside a node, and of one device's link to other nodes. Unit: 1e9 bytes a second of one rank.
    pub node_gbs: f64,
    pub network_gbs: f64,
    /// Of one collective inside a node, and between nodes. Unit: 1e-6 seconds.
    pub node_latency_us: f64,
    pub network_latency_us: f64,
    /// Files, of one rank. Unit: 1e9 bytes a second.
    pub disk_gbs: f64,
    /// Whether data-parallel sums run beside computing.
    #[serde(default = "yes")]
    pub overlaps: bool,
    /// What the library keeps of each distinct product that it has met. Unit: bytes.
    #[serde(skip)]
    pub product_bytes: u64,
    /// What an all-reduce takes beside its input and output, as a share of them.
    #[serde(skip)]
    pub reduce_share: f64,
    /// Operands of bf16 are copied to f32 to be multiplied, see [`crate::kernels::product`].
    #[serde(skip)]
    pub widens: bool,
    /// Freed memory in smaller pieces than this stays with the process. Unit: bytes.
    #[serde(skip)]
    pub kept_below: u64,
    #[serde(skip)]
    pub precision: Precision,
    #[serde(skip)]
    pub measured: Option<Measured>,
    #[serde(skip)]
    pub rings: Rings,
}

fn yes() -> bool {
    true
}

/// Rings of the mesh's axes on the nodes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rings {
    /// Ranks of one ring on one node, 0 where the whole ring is on one.
    tp: usize,
    dp: usize,
}

/// What a process on a CPU takes besides tensors. Unit: bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Base {
    /// Before the model: libraries, code, threads and what they keep.
    pub process: u64,
    /// More for each distinct product: oneDNN generates code for every size that it meets, and keeps it.
    pub product: u64,
    /// What an all-reduce takes beside its input and output, as a share of them: the transport's own buffer.
    pub reduce_share: f64,
}

/// Times of the machine at hand.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Seconds of each product.
    pub products: BTreeMap<Product, f64>,
    /// Amounts a second, by the unit of [`Pass`].
    pub passes: BTreeMap<Pass, f64>,
    /// Seconds of each collective, where the ranks were there to measure it.
    pub calls: BTreeMap<Call, f64>,
}

impl Measured {
    /// Seconds of a product: as measured, or at the rate of the one that is most like it.
    fn product(&self, product: Product) -> f64 {
        if let Some(&seconds) = self.products.get(&product) {
            return seconds;
        }
        let sizes = |p: &Product| [p.rows, p.inner, p.columns, p.batch].map(|n| (n as f64).ln());
        let apart = |p: &Product| {
            let sizes = sizes(p).into_iter().zip(sizes(&product)).map(|(a, b)| (a - b).abs());
            (p.operands != product.operands, sizes.sum::<f64>())
        };
        let nearest = self.products.iter().min_by(|(a, _), (b, _)| {
            let (a, b) = (apart(a), apart(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        nearest.map_or(product.operations() / 1e11, |(p, seconds)| seconds * product.operations() / p.operations())
    }

    /// Seconds of a collective: as measured, or at the rate of the one of its kind that is nearest in size; None where none was.
    fn call(&self, call: &Call) -> Option<f64> {
        let apart = |bytes: u64| (bytes.max(1) as f64 / call.bytes.max(1) as f64).ln().abs();
        let alike = self.calls.iter().filter(|(known, _)| (known.axis, known.op) == (call.axis, call.op));
        let (known, seconds) = alike.min_by(|(a, _), (b, _)| apart(a.bytes).total_cmp(&apart(b.bytes)))?;
        Some(seconds * (call.bytes as f64 / known.bytes.max(1) as f64).max(1.0))
    }
}

/// Names of all machines that are known.
pub fn names() -> Vec<&'static str> {
    SHEETS.iter().map(|sheet| sheet.0).collect()
}

/// Name, GiB that a process can have, bf16 and f32 (not TF32) TFLOP/s without sparsity, GB/s of memory, GB/s of a ring over NVLink
/// and of one network card.
const SHEETS: [(&str, f64, f64, f64, f64, f64, f64); 4] = [
    ("h100-80g", 79.0, 989.0, 67.0, 3350.0, 360.0, 45.0),
    ("h200", 139.0, 989.0, 67.0, 4800.0, 360.0, 45.0),
    ("a100-80g", 79.0, 312.0, 19.5, 2039.0, 230.0, 22.5),
    ("b200", 178.0, 2250.0, 75.0, 8000.0, 650.0, 45.0),
];

impl Machine {
    /// A machine by name, with the shares that are assumed where nothing was measured.
    pub fn sheet(name: &str) -> Option<Self> {
        let known = SHEETS.iter().find(|sheet| sheet.0.eq_ignore_ascii_case(name))?;
        let &(name, memory_gib, bf16_tflops, f32_tflops, memory_gbs, node_gbs, network_gbs) = known;
        Some(Self {
            name: name.to_owned(),
            memory_gib,
            bf16_tflops,
            f32_tflops,
            matrix_share: 0.6,
            memory_gbs,
            memory_share: 0.75,
            runtime_gib: 1.5,
            communicator_gib: 1.0,
            node_gbs,
            network_gbs,
            node_latency_us: 20.0,
            network_latency_us: 50.0,
            disk_gbs: 1.0,
            overlaps: true,
            product_bytes: 0,
            reduce_share: 0.0,
            widens: false,
            kept_below: 0,
            precision: Precision::Bf16,
            measured: None,
            rings: Rings::default(),
        })
    }

    /// A CPU at hand, whose rates are measured.
    ///
    /// `memory`: of one rank, in bytes.
    pub fn host(memory: f64, base: Base, measured: Option<Measured>) -> Self {
        let gib = 1073741824.0;
        Self {
            name: "this machine".to_owned(),
            memory_gib: memory / gib,
            bf16_tflops: 0.4,
            f32_tflops: 0.2,
            matrix_share: 0.8,
            memory_gbs: 10.0,
            memory_share: 1.0,
            runtime_gib: base.process as f64 / gib,
            communicator_gib: 0.0,
            node_gbs: 1.0,
            network_gbs: 1.0,
            node_latency_us: 50.0,
            network_latency_us: 50.0,
            disk_gbs: 1.0,
            overlaps: false,
            product_bytes: base.product,
            reduce_share: base.reduce_share,
            widens: !has_bf16(),
            kept_below: MAPPED as u64,
            precision: Precision::Bf16,
            measured,
            rings: Rings::default(),
        }
    }

    /// The same with a mesh on nodes of so many devices.
    pub fn placed(&self, mesh: Mesh, per_node: usize, precision: Precision) -> Self {
        let per_node = per_node.max(1);
        let inside = |ranks: usize, reach: usize| if reach <= per_node { 0 } else { ranks.max(1) };
        // tensor-parallel ranks are neighbours; data-parallel ones are tp apart
        let tp = inside(per_node.min(mesh.tp), if per_node.is_multiple_of(mesh.tp) { 1 } else { per_node + 1 });
        let dp = inside(per_node / mesh.tp, mesh.world());
        Self { rings: Rings { tp, dp }, precision, ..self.clone() }
    }

    pub fn memory_bytes(&self) -> u64 {
        (self.memory_gib * 1073741824.0) as u64
    }

    /// Operations a second on the data sheet.
    pub fn peak_rate(&self) -> f64 {
        1e12 * if self.precision == Precision::Bf16 { self.bf16_tflops } else { self.f32_tflops }
    }

    /// Seconds of a product.
    pub fn product(&self, product: Product) -> f64 {
        match &self.measured {
            Some(measured) => measured.product(product),
            None => {
                let Product { rows, inner, columns, batch, .. } = product;
                let bytes = 2.0 * batch as f64 * (rows * inner + inner * columns + rows * columns) as f64;
                let arithmetic = product.operations() / (self.peak_rate() * self.matrix_share);
                // a thin product is as slow as the memory; one column stands for scores that never leave the chip
                if columns == 1 { arithmetic } else { arithmetic.max(bytes / self.memory_rate()) }
            }
        }
    }

    /// Seconds of a pass over memory.
    pub fn pass(&self, pass: Pass, amount: f64) -> f64 {
        match &self.measured {
            Some(measured) => measured.passes.get(&pass).map_or(0.0, |rate| amount / rate),
            None => amount * pass.bytes() / self.memory_rate(),
        }
    }

    /// Seconds of a collective that has the links for itself.
    pub fn collective(&self, call: &Call) -> f64 {
        if call.ranks == 1 {
            return 0.0;
        }
        if let Some(seconds) = self.measured.as_ref().and_then(|measured| measured.call(call)) {
            return seconds;
        }
        let on_a_node = if call.axis == "tp" { self.rings.tp } else { self.rings.dp };
        let (gbs, latency) = match on_a_node {
            0 => (self.node_gbs, self.node_latency_us),
            // the ring's ranks on a node share their cards
            n => ((n as f64 * self.network_gbs).min(self.node_gbs), self.network_latency_us),
        };
        latency * 1e-6 + call.wire_bytes() / (gbs * 1e9)
    }

    fn memory_rate(&self) -> f64 {
        self.memory_gbs * 1e9 * self.memory_share
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::wire::Op;
    use crate::plan::Operands;

    fn product(operands: Operands, rows: u64) -> Product {
        Product { operands, rows, inner: 64, columns: 64, batch: 1 }
    }

    /// What was not measured goes at the rate of its like: never of other operands, whose code may be ten times as slow.
    #[test]
    fn products_that_were_not_measured_take_the_rate_of_their_like() {
        let known = [(Operands::Nt, 100, 1.0), (Operands::Nt, 1000, 5.0), (Operands::Nn, 100, 80.0)];
        let products = known.map(|(operands, rows, seconds)| (product(operands, rows), seconds)).into();
        let measured = Measured { products, ..Measured::default() };
        assert_eq!(measured.product(product(Operands::Nt, 100)), 1.0);
        assert_eq!(measured.product(product(Operands::Nt, 120)), 1.2);
        assert_eq!(measured.product(product(Operands::Nt, 2000)), 10.0);
        assert_eq!(measured.product(product(Operands::Nn, 1000)), 800.0);
    }

    #[test]
    fn collectives_that_were_not_measured_take_the_rate_of_their_like() {
        let call = |axis, op, bytes| Call { axis, op, ranks: 2, bytes, on_host: false };
        let calls = [(call("tp", Op::AllReduce, 1 << 20), 1.0), (call("dp", Op::AllReduce, 1 << 20), 4.0)].into();
        let mut machine = Machine::host(1e9, Base::default(), Some(Measured { calls, ..Measured::default() }));
        assert_eq!(machine.collective(&call("tp", Op::AllReduce, 2 << 20)), 2.0);
        assert_eq!(machine.collective(&call("dp", Op::AllReduce, 1 << 20)), 4.0);
        // a small one takes no less than what its message costs at all: as long as the nearest
        assert_eq!(machine.collective(&call("tp", Op::AllReduce, 1 << 19)), 1.0);
        machine.node_latency_us = 0.0;
        assert_eq!(machine.collective(&call("tp", Op::AllGather, 2e9 as u64)), 1.0);
    }
}
