//! Collectives over MPI and host memory.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::group::{Reduce, Ticket, Transport};
use crate::abi::mpi::{Comm, Op, Request};

/// One MPI communicator as a transport.
#[derive(Clone)]
pub(super) struct Mpi(Rc<Comm>);

impl Mpi {
    pub(super) fn new(comm: Comm) -> Self {
        Self(Rc::new(comm))
    }

    /// Polls until the operation ended: spins first, then gives the core to whom we wait for.
    fn finish(&self, mut request: Request) -> Tensor {
        let start = Instant::now();
        let mut polls = 0u32;
        while !self.0.is_done(&mut request) {
            polls += 1;
            if polls > 200 {
                if start.elapsed() < Duration::from_millis(20) {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        }
        request.take()
    }
}

impl Transport for Mpi {
    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) {
        let op = match op {
            Reduce::Sum => Op::Sum,
            Reduce::Max => Op::Max,
        };
        let sum = self.finish(self.0.all_reduce(tensor.shallow_clone(), tensor.empty_like(), op));
        tensor.copy_(&sum);
    }

    /// Exchanges the parts and adds them up here, in rank order.
    ///
    /// Open MPI's own non-blocking reduce-scatter sums everything on one rank, over buffers twice as large as the input.
    fn reduce_scatter(&self, input: Tensor, output: Tensor) -> Box<dyn Ticket> {
        let parts = input.empty_like();
        Box::new(Started { request: self.0.all_to_all(input, parts), output, mpi: self.clone() })
    }

    fn all_gather(&self, input: &Tensor, output: &mut Tensor) {
        let _ = self.finish(self.0.all_gather(input.contiguous(), output.shallow_clone()));
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) {
        let _ = self.finish(self.0.broadcast(tensor.shallow_clone(), root));
    }

    fn barrier(&self) {
        let _ = self.finish(self.0.barrier());
    }

    fn progress(&self) {
        self.0.progress();
    }
}

struct Started {
    request: Request,
    output: Tensor,
    mpi: Mpi,
}

impl Ticket for Started {
    fn wait(self: Box<Self>) -> Tensor {
        let Self { request, output, mpi } = *self;
        let parts = mpi.finish(request).view([mpi.0.size() as i64, -1]);
        let _ = parts.sum_intlist_out(&output.view([-1]), 0i64, false, output.kind());
        output
    }
}
