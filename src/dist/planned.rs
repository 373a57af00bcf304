//! Collectives that nobody answers: one rank of a large mesh runs alone, and what it would have sent is counted.
//!
//! Used to measure one rank of a model for which there are not enough devices. Results are those of a rank whose partners
//! bring nothing: shapes and costs of the computation are right, values are not.

use std::cell::RefCell;
use std::rc::Rc;

use tch::Tensor;

use super::group::{Reduce, Ticket, Transport};
use super::{Group, Mesh, Watchdog, World};

/// One collective as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Barrier,
}

impl Call {
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

/// The calls of one rank, in program order.
#[derive(Clone, Default)]
pub struct Record(Rc<RefCell<Vec<Call>>>);

impl Record {
    /// What was recorded so far; the record is empty afterwards.
    pub fn take(&self) -> Vec<Call> {
        self.0.take()
    }
}

impl World {
    /// Rank `mesh.rank` of a mesh whose other ranks are not there.
    pub fn planned(mesh: Mesh, record: &Record) -> Self {
        let watchdog = Watchdog::new(std::time::Duration::MAX);
        let group = |axis, rank, members: Vec<usize>| {
            let carrier = || Box::new(Planned { axis, rank, size: members.len(), record: record.clone() });
            let mut group = Group::new(axis, rank, &members, carrier(), &watchdog);
            group.carry_devices(carrier());
            Rc::new(group)
        };
        Self {
            mesh,
            world: group("world", mesh.rank, (0..mesh.world()).collect()),
            tp: group("tp", mesh.tp_rank(), mesh.row()),
            dp: group("dp", mesh.dp_rank(), mesh.column()),
            watchdog: watchdog.clone(),
            planned: true,
        }
    }
}

struct Planned {
    axis: &'static str,
    rank: usize,
    size: usize,
    record: Record,
}

impl Planned {
    fn note(&self, op: Op, tensor: &Tensor) {
        let bytes = (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let on_host = tensor.device() == tch::Device::Cpu && tensor.numel() <= 64;
        self.record.0.borrow_mut().push(Call { axis: self.axis, op, ranks: self.size, bytes, on_host });
    }

    /// This rank's part along dimension 0.
    fn own(&self, whole: &Tensor) -> Tensor {
        let each = whole.size()[0] / self.size as i64;
        whole.narrow(0, self.rank as i64 * each, each)
    }
}

impl Transport for Planned {
    fn all_reduce(&self, tensor: &mut Tensor, _: Reduce) {
        self.note(Op::AllReduce, tensor);
    }

    fn adds_bf16(&self) -> bool {
        true
    }

    fn reduce_scatter(&self, input: Tensor, mut output: Tensor) -> Box<dyn Ticket> {
        self.note(Op::ReduceScatter, &input);
        let own = self.own(&input);
        if own.data_ptr() != output.data_ptr() {
            output.copy_(&own.view_as(&output));
        }
        Box::new(Nothing(output))
    }

    fn all_gather(&self, input: &Tensor, output: &mut Tensor) {
        self.note(Op::AllGather, output);
        if self.own(output).data_ptr() == input.data_ptr() {
            return; // in place: the other parts hold something already
        }
        // numbers of the right size; the partners would have brought others
        let each = output.size()[0] / self.size as i64;
        for rank in 0..self.size as i64 {
            let mut part = output.narrow(0, rank * each, each);
            part.copy_(&input.view_as(&part));
        }
    }

    fn gathers_in_place(&self) -> bool {
        true
    }

    fn broadcast(&self, tensor: &mut Tensor, _: usize) {
        self.note(Op::Broadcast, tensor);
    }

    fn barrier(&self) {}

    fn progress(&self) {}
}

struct Nothing(Tensor);

impl Ticket for Nothing {
    fn wait(self: Box<Self>) -> Tensor {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn calls_are_counted_by_what_they_would_send() {
        let record = Record::default();
        let world = World::planned(Mesh { rank: 5, tp: 4, dp: 2 }, &record);
        let mut x = Tensor::ones([8, 16], (Kind::BFloat16, Device::Cpu));
        world.tp.all_reduce(&mut x, Reduce::Sum);
        let part = world.dp.reduce_scatter(&x).wait();
        assert_eq!(part.size(), [4, 16]);
        assert_eq!(world.tp.all_gather(&part).size(), [16, 16]);
        let calls = record.take();
        let seen: Vec<_> = calls.iter().map(|call| (call.axis, call.op, call.ranks, call.bytes)).collect();
        let expected =
            [("tp", Op::AllReduce, 4, 256), ("dp", Op::ReduceScatter, 2, 256), ("tp", Op::AllGather, 4, 512)];
        assert_eq!(seen, expected);
        let wire: Vec<f64> = calls.iter().map(Call::wire_bytes).collect();
        assert_eq!(wire, [384.0, 128.0, 384.0]);
        assert!(record.take().is_empty());
    }
}
