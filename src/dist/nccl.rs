//! Collectives over NCCL and device memory.
//!
//! Tensor-parallel traffic goes on libtorch's current stream: its order with the computation is then free of charge. Data-parallel
//! traffic goes on a stream of its own beside the backward pass, with events both ways; a collective under way owns its
//! tensors until the current stream has been told to wait for it, so the allocator cannot give their memory away.

use std::rc::Rc;

use tch::Tensor;

use super::group::{Reduce, Ticket, Transport};
use crate::abi::driver::{self, Event, Stream};
use crate::abi::nccl::{Comm, Op};
use crate::abi::torch_cuda;

/// One NCCL communicator as a transport.
#[derive(Clone)]
pub(super) struct Nccl {
    comm: Rc<Comm>,
    device: usize,
    /// None: libtorch's current one.
    beside: Option<Stream>,
}

impl Nccl {
    /// `beside`: use a stream of its own, so that what is started runs while the computation goes on.
    pub(super) fn new(comm: Comm, device: usize, beside: bool) -> Self {
        Self { comm: Rc::new(comm), device, beside: beside.then(|| torch_cuda::stream_from_pool(device)) }
    }

    /// Calls `start` on the transport's stream, after everything that the current stream holds so far.
    fn launch(&self, start: impl FnOnce(Stream)) -> Option<Event> {
        let current = self.current();
        let Some(beside) = self.beside else {
            start(current);
            return None;
        };
        works(beside.wait(&mark(current)));
        start(beside);
        Some(mark(beside))
    }

    /// As [`Self::launch`]; what comes later on the current stream waits for the result.
    fn run(&self, start: impl FnOnce(Stream)) {
        if let Some(done) = self.launch(start) {
            works(self.current().wait(&done));
        }
    }

    fn current(&self) -> Stream {
        works(Stream::current(self.device))
    }
}

/// The end of what is on a stream now.
fn mark(stream: Stream) -> Event {
    let event = works(Event::new(stream.device(), false));
    works(event.record(stream));
    event
}

/// The driver refuses such calls only when an earlier piece of work has failed; the job ends with its words.
fn works<T>(result: Result<T, driver::Error>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

impl Transport for Nccl {
    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) {
        let op = match op {
            Reduce::Sum => Op::Sum,
            Reduce::Max => Op::Max,
        };
        self.run(|stream| self.comm.all_reduce(tensor, op, stream));
    }

    fn adds_bf16(&self) -> bool {
        true
    }

    fn reduce_scatter(&self, input: Tensor, output: Tensor) -> Box<dyn Ticket> {
        let done = self.launch(|stream| self.comm.reduce_scatter(&input, &output, stream));
        Box::new(Launched { done, input, output, nccl: self.clone() })
    }

    fn all_gather(&self, input: &Tensor, output: &mut Tensor) {
        self.run(|stream| self.comm.all_gather(input, output, stream));
    }

    fn gathers_in_place(&self) -> bool {
        true
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) {
        self.run(|stream| self.comm.broadcast(tensor, root, stream));
    }

    fn barrier(&self) {
        works(self.current().synchronize());
    }

    fn progress(&self) {}
}

struct Launched {
    done: Option<Event>,
    input: Tensor,
    output: Tensor,
    nccl: Nccl,
}

impl Ticket for Launched {
    fn wait(self: Box<Self>) -> Tensor {
        let Self { done, input, output, nccl } = *self;
        if let Some(done) = done {
            works(nccl.current().wait(&done));
        }
        // only now: memory that is freed is used again by what comes later on the current stream
        drop(input);
        output
    }
}
