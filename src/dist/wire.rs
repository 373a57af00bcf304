//! What a rank hands to the wire: collectives as they were asked for, and the bytes that they send.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use serde::Serialize;
use tch::Tensor;

use super::Mesh;

/// One collective as a transport got it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    pub axis: &'static str,
    pub op: Op,
    /// Ranks of the group.
    pub ranks: usize,
    /// Bytes of the whole tensor: of the output of a gather, of the input of everything else.
    pub bytes: u64,
    /// Numbers on the host, which do not go through the devices' network.
    pub on_host: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Barrier,
}

impl Op {
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        }
    }
}

impl Call {
    /// `tensor`: what is handed over, or what a gather fills.
    pub(super) fn of(axis: &'static str, op: Op, ranks: usize, tensor: &Tensor) -> Self {
        let bytes = (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let on_host = tensor.device() == tch::Device::Cpu && tensor.numel() <= FEW;
        Self { axis, op, ranks, bytes, on_host }
    }

    /// Bytes that one rank sends over the wire by the usual ring: 2 (n-1)/n of the tensor for an all-reduce, (n-1)/n for its
    /// two halves, all of it for a broadcast.
    pub fn wire_bytes(&self) -> f64 {
        let share = (self.ranks - 1) as f64 / self.ranks as f64;
        self.bytes as f64
            * match self.op {
                Op::AllReduce => 2.0 * share,
                Op::ReduceScatter | Op::AllGather => share,
                Op::Broadcast => 1.0,
                Op::Barrier => 0.0,
            }
    }
}

/// Numbers that count as control where everything is on the host.
pub const FEW: usize = 64;

/// The calls of one rank, in program order.
#[derive(Clone, Default)]
pub struct Record(Rc<RefCell<Vec<Call>>>);

impl Record {
    pub(super) fn note(&self, call: Call) {
        self.0.borrow_mut().push(call);
    }

    /// What was recorded so far; the record is empty afterwards.
    pub fn take(&self) -> Vec<Call> {
        self.0.take()
    }
}

/// Collectives of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Traffic {
    pub axis: &'static str,
    pub op: &'static str,
    pub calls: usize,
    /// Bytes of the tensors.
    pub bytes: u64,
    /// Bytes that this rank sends, by the usual ring.
    pub wire_bytes: f64,
}

/// Traffic of the mesh's axes by operation, control numbers left out.
pub fn summarise(calls: &[Call]) -> Vec<Traffic> {
    let mut sums = BTreeMap::<(&'static str, Op), Traffic>::new();
    for call in calls.iter().filter(|call| !call.on_host && call.axis != "world") {
        let nothing = Traffic { axis: call.axis, op: call.op.name(), calls: 0, bytes: 0, wire_bytes: 0.0 };
        let sum = sums.entry((call.axis, call.op)).or_insert(nothing);
        sum.calls += 1;
        sum.bytes += call.bytes;
        sum.wire_bytes += call.wire_bytes();
    }
    sums.into_values().collect()
}

/// Bytes that cross from one host to another, by `(from, to)`, if every rank makes the same `calls` and every collective is a ring
/// in rank order. Hosts hold `per_host` ranks each, in rank order.
pub fn bytes_between_hosts(calls: &[Call], mesh: Mesh, per_host: usize) -> BTreeMap<(usize, usize), f64> {
    let mut links = BTreeMap::new();
    let world = mesh.world();
    for (axis, sent) in ["tp", "dp", "world"].map(|axis| {
        let of_axis = calls.iter().filter(|call| call.axis == axis);
        (axis, of_axis.map(Call::wire_bytes).sum::<f64>())
    }) {
        for rank in 0..world {
            let place = Mesh { rank, ..mesh };
            let next = match axis {
                "tp" => rank - place.tp_rank() + (place.tp_rank() + 1) % mesh.tp,
                "dp" => (rank + mesh.tp) % world,
                _ => (rank + 1) % world,
            };
            let (from, to) = (rank / per_host, next / per_host);
            if from != to && sent > 0.0 {
                *links.entry((from, to)).or_insert(0.0) += sent;
            }
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rings_that_span_hosts_cross_the_link() {
        let call = |axis, op, ranks| Call { axis, op, ranks, bytes: 1200, on_host: false };
        let mesh = Mesh { rank: 0, tp: 2, dp: 2 };
        let tp = call("tp", Op::AllReduce, 2);
        assert!(bytes_between_hosts(&[tp], mesh, 2).is_empty(), "tensor-parallel ranks share a host");
        // two columns of two: each sends half of what it has to its partner on the other host
        let links = bytes_between_hosts(&[tp, call("dp", Op::ReduceScatter, 2)], mesh, 2);
        assert_eq!(links.into_iter().collect::<Vec<_>>(), [((0, 1), 1200.0), ((1, 0), 1200.0)]);
        // one rank a host: rings of both axes, rank 0 to 1 for tp and 0 to 2 for dp
        let links = bytes_between_hosts(&[tp, call("dp", Op::ReduceScatter, 2)], mesh, 1);
        assert_eq!((links[&(0, 1)], links[&(0, 2)], links.len()), (1200.0, 600.0, 8));
    }
}
