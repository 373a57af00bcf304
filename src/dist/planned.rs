//! Collectives that nobody answers: one rank of a large mesh runs alone, and what it would have sent is counted.
//!
//! Used to measure one rank of a model for which there are not enough devices. Results are those of a rank whose partners
//! bring nothing: shapes and costs of the computation are right, values are not.

use std::rc::Rc;

use tch::Tensor;

use super::group::{Reduce, Ticket, Transport};
use super::wire::Record;
use super::{Group, Mesh, Watchdog, World};

impl World {
    /// Rank `mesh.rank` of a mesh whose other ranks are not there.
    pub fn planned(mesh: Mesh, record: &Record) -> Self {
        let watchdog = Watchdog::new(std::time::Duration::MAX);
        let group = |axis, rank, members: Vec<usize>| {
            let carrier = || Box::new(Planned { rank, size: members.len() });
            let mut group = Group::new(axis, rank, &members, carrier(), &watchdog);
            group.carry_devices(carrier());
            group.record(record);
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
    rank: usize,
    size: usize,
}

impl Planned {
    /// This rank's part along dimension 0.
    fn own(&self, whole: &Tensor) -> Tensor {
        let each = whole.size()[0] / self.size as i64;
        whole.narrow(0, self.rank as i64 * each, each)
    }
}

impl Transport for Planned {
    fn all_reduce(&self, _: &mut Tensor, _: Reduce) {}

    fn adds_bf16(&self) -> bool {
        true
    }

    fn reduce_scatter(&self, input: Tensor, mut output: Tensor) -> Box<dyn Ticket> {
        let own = self.own(&input);
        if own.data_ptr() != output.data_ptr() {
            output.copy_(&own.view_as(&output));
        }
        Box::new(Nothing(output))
    }

    fn all_gather(&self, input: &Tensor, output: &mut Tensor) {
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

    fn broadcast(&self, _: &mut Tensor, _: usize) {}

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
    use crate::dist::wire::{Call, Op};

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
