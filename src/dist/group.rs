//! A group of ranks and its collectives.

use std::cell::{Cell, RefCell};
use std::panic::Location;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::flight::CallState;
use super::watchdog::Watchdog;
use super::wire::{Call, Op, Record};

/// How the ranks' numbers become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Max,
}

/// What carries a group's collectives. Tensors are contiguous; reductions come as f32, f64 or i64, and as bf16 where
/// [`Transport::adds_bf16`] says so.
pub(super) trait Transport {
    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce);
    /// Starts the sum; this rank's part of `input` arrives in `output`.
    fn reduce_scatter(&self, input: Tensor, output: Tensor) -> Box<dyn Ticket>;
    fn all_gather(&self, input: &Tensor, output: &mut Tensor);
    /// Whether bf16 may be reduced as it is; otherwise the group widens it to f32.
    fn adds_bf16(&self) -> bool {
        false
    }
    /// Whether the input of a gather may be this rank's place in its output.
    fn gathers_in_place(&self) -> bool {
        false
    }
    fn broadcast(&self, tensor: &mut Tensor, root: usize);
    fn barrier(&self);
    /// Gives what was started a chance to move.
    fn progress(&self);
}

/// A collective under way.
pub(super) trait Ticket {
    fn wait(self: Box<Self>) -> Tensor;
}

/// The ranks along one axis of the mesh, seen from one of them.
///
/// A group of one rank has no transport: its collectives are the identity and cost nothing. Tensors on the host go through
/// the host's network, tensors on a device through the devices': control numbers never wait in a device's queue.
pub struct Group {
    axis: &'static str,
    rank: usize,
    size: usize,
    /// Number of this communicator in the flight record.
    channel: usize,
    host: Option<Box<dyn Transport>>,
    device: Option<Box<dyn Transport>>,
    watchdog: Watchdog,
    traffic: Rc<Cell<Traffic>>,
    /// Where the calls are noted, where that is asked for.
    record: RefCell<Option<Record>>,
}

/// What a group's collectives cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Time this rank spent inside collectives.
    pub time: Duration,
    /// Bytes handed to collectives (not what the wire saw).
    pub bytes: u64,
    pub calls: u64,
}

/// A reduce-scatter under way; it owns its tensors until it is waited for.
#[must_use = "a collective must be waited for by all ranks of its group"]
pub struct Pending(State);

enum State {
    Done(Tensor),
    Open { ticket: Box<dyn Ticket>, call: u64, after: CallState, watchdog: Watchdog, traffic: Rc<Cell<Traffic>> },
}

impl Group {
    /// A group of one.
    pub fn solo(axis: &'static str) -> Self {
        let watchdog = Watchdog::new(Duration::MAX);
        Self {
            axis,
            rank: 0,
            size: 1,
            channel: 0,
            host: None,
            device: None,
            watchdog,
            traffic: Rc::default(),
            record: RefCell::default(),
        }
    }

    /// `members`: ranks of the job, in the group's order; this is the one at `rank`.
    pub(super) fn new(
        axis: &'static str,
        rank: usize,
        members: &[usize],
        carrier: Box<dyn Transport>,
        dog: &Watchdog,
    ) -> Self {
        let size = members.len();
        let host = (size > 1).then_some(carrier);
        let channel = if size > 1 { dog.channel(axis, members) } else { 0 };
        Self {
            axis,
            rank,
            size,
            channel,
            host,
            device: None,
            watchdog: dog.clone(),
            traffic: Rc::default(),
            record: RefCell::default(),
        }
    }

    /// A digest of the collectives that were called so far: equal on all ranks of the group as long as they do the same.
    pub(super) fn digest(&self) -> Option<f64> {
        (self.size > 1).then(|| self.watchdog.digest(self.channel))
    }

    pub(super) fn axis(&self) -> &'static str {
        self.axis
    }

    /// From here on tensors on devices go through `carrier`.
    pub(super) fn carry_devices(&mut self, carrier: Box<dyn Transport>) {
        self.device = (self.size > 1).then_some(carrier);
    }

    /// What carries a tensor; None where there is nobody else.
    fn transport(&self, tensor: &Tensor) -> Option<&dyn Transport> {
        let transport = match tensor.device() {
            Device::Cpu => &self.host,
            _ => &self.device,
        };
        assert!(self.size == 1 || transport.is_some(), "invariant: groups carry tensors of the devices in use");
        transport.as_deref()
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.size
    }

    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    pub fn traffic(&self) -> Traffic {
        self.traffic.get()
    }

    /// From now on notes every call there, as the transport gets it.
    pub fn record(&self, record: &Record) {
        *self.record.borrow_mut() = Some(record.clone());
    }

    /// From now on notes no calls.
    pub fn record_no_more(&self) {
        *self.record.borrow_mut() = None;
    }

    fn note(&self, op: Op, tensor: &Tensor) {
        if let Some(record) = &*self.record.borrow() {
            record.note(Call::of(self.axis, op, self.size, tensor));
        }
    }

    /// Replaces `tensor` by the element-wise sum or maximum over the group. All ranks of the group call it.
    ///
    /// On the host bf16 is added up in f32 and rounded once.
    #[track_caller]
    pub fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) {
        let what = tensor.shallow_clone();
        let Some(transport) = self.transport(&what) else { return };
        self.timed("all_reduce", &what, Location::caller(), || {
            if tensor.kind() == Kind::BFloat16 && !transport.adds_bf16() {
                let mut wide = tensor.to_kind(Kind::Float).contiguous();
                self.note(Op::AllReduce, &wide);
                transport.all_reduce(&mut wide, op);
                tensor.copy_(&wide);
                return;
            }
            self.note(Op::AllReduce, tensor);
            if tensor.is_contiguous() {
                transport.all_reduce(tensor, op);
            } else {
                let mut dense = tensor.contiguous();
                transport.all_reduce(&mut dense, op);
                tensor.copy_(&dense);
            }
        });
    }

    /// As [`Self::all_reduce`] for a few numbers on the host.
    #[track_caller]
    pub fn all_reduce_f64(&self, values: &mut [f64], op: Reduce) {
        if self.size > 1 {
            let mut tensor = Tensor::from_slice(values);
            self.all_reduce(&mut tensor, op);
            values.copy_from_slice(crate::abi::slices::slice(&tensor));
        }
    }

    /// Starts the sum over the group of `input` (`size` equal parts along dimension 0); waiting gives this rank's part.
    ///
    /// All ranks of the group call it, and wait in the same order.
    #[track_caller]
    pub fn reduce_scatter(&self, input: &Tensor) -> Pending {
        if self.size == 1 {
            return Pending(State::Done(input.shallow_clone()));
        }
        self.reduce_scatter_into(input, self.part(input))
    }

    /// As [`Self::reduce_scatter`] into `output`, which may be this rank's part of `input` itself.
    #[track_caller]
    pub fn reduce_scatter_into(&self, input: &Tensor, output: Tensor) -> Pending {
        let Some(transport) = self.transport(input) else {
            return Pending(State::Done(input.shallow_clone()));
        };
        self.note(Op::ReduceScatter, input);
        let start = || transport.reduce_scatter(input.contiguous(), output);
        let (ticket, call) = self.recorded("reduce_scatter", input, Location::caller(), CallState::Started, start);
        let (after, watchdog, traffic) = (Self::after(input), self.watchdog.clone(), Rc::clone(&self.traffic));
        Pending(State::Open { ticket, call, after, watchdog, traffic })
    }

    /// The sum over the group of `input` (`size` equal parts along dimension 0), this rank's part of it, in `input`'s kind.
    ///
    /// On the host bf16 is added up in f32 and rounded once. All ranks of the group call it.
    #[track_caller]
    pub fn reduce_scatter_now(&self, input: &Tensor) -> Tensor {
        let kind = input.kind();
        match self.transport(input) {
            None => input.shallow_clone(),
            Some(transport) if kind == Kind::BFloat16 && !transport.adds_bf16() => {
                self.reduce_scatter(&input.to_kind(Kind::Float)).wait().to_kind(kind)
            }
            Some(_) => self.reduce_scatter(input).wait(),
        }
    }

    /// The ranks' `part`s in rank order, concatenated along dimension 0. All ranks of the group call it with equal shapes.
    #[track_caller]
    pub fn all_gather(&self, part: &Tensor) -> Tensor {
        if self.size == 1 {
            return part.shallow_clone();
        }
        let mut shape = part.size();
        shape[0] *= self.size as i64;
        let mut output = Tensor::empty(&shape, (part.kind(), part.device()));
        self.all_gather_into(part, &mut output);
        output
    }

    /// As [`Self::all_gather`] into `output`, which may contain `part` at this rank's place.
    #[track_caller]
    pub fn all_gather_into(&self, part: &Tensor, output: &mut Tensor) {
        match self.transport(part) {
            Some(transport) => {
                // MPI forbids the same memory on both sides; a part is small against the whole.
                let part = if transport.gathers_in_place() { part.contiguous() } else { part.copy() };
                let what = output.shallow_clone();
                self.note(Op::AllGather, &what);
                self.timed("all_gather", &what, Location::caller(), || transport.all_gather(&part, output));
            }
            None if part.data_ptr() != output.data_ptr() => {
                output.copy_(part);
            }
            None => {}
        }
    }

    /// Every rank's `bytes` in rank order. All ranks of the group call it; lengths may differ.
    #[track_caller]
    pub fn gather_bytes(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        if self.size == 1 {
            return vec![bytes.to_vec()];
        }
        let lengths = self.all_gather(&Tensor::from_slice(&[bytes.len() as i64]));
        let lengths: Vec<usize> = crate::abi::slices::slice::<i64>(&lengths).iter().map(|&n| n as usize).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = bytes.to_vec();
        padded.resize(longest, 0);
        let all = self.all_gather(&Tensor::from_slice(&padded));
        let all = crate::abi::slices::slice::<u8>(&all);
        lengths.iter().enumerate().map(|(rank, &len)| all[rank * longest..][..len].to_vec()).collect()
    }

    /// Rank `root`'s bytes on every rank. All ranks of the group call it.
    #[track_caller]
    pub fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Vec<u8> {
        if self.size == 1 {
            return bytes.to_vec();
        }
        let mut length = Tensor::from_slice(&[bytes.len() as i64]);
        self.broadcast(&mut length, root);
        let mut tensor = if self.rank == root {
            Tensor::from_slice(bytes)
        } else {
            Tensor::zeros([length.int64_value(&[0])], (Kind::Uint8, Device::Cpu))
        };
        self.broadcast(&mut tensor, root);
        crate::abi::slices::slice::<u8>(&tensor).to_vec()
    }

    /// Copies rank `root`'s contiguous `tensor` into everybody's. All ranks of the group call it.
    #[track_caller]
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) {
        let what = tensor.shallow_clone();
        if let Some(transport) = self.transport(&what) {
            self.note(Op::Broadcast, &what);
            self.timed("broadcast", &what, Location::caller(), || transport.broadcast(tensor, root));
        }
    }

    /// Returns when every rank of the group has called it and, where devices are in use, their work is done.
    #[track_caller]
    pub fn barrier(&self) {
        let nothing = Tensor::zeros([0], (Kind::Uint8, Device::Cpu));
        let site = Location::caller();
        for transport in [&self.device, &self.host].into_iter().flatten() {
            self.timed("barrier", &nothing, site, || transport.barrier());
        }
    }

    /// Gives collectives that were started a chance to move; cheap, and any number of ranks may call it.
    pub fn progress(&self) {
        if let Some(transport) = &self.host {
            transport.progress();
        }
    }

    fn part(&self, input: &Tensor) -> Tensor {
        let mut shape = input.size();
        assert_eq!(shape[0] % self.size as i64, 0, "invariant: {shape:?} divides into {} parts", self.size);
        shape[0] /= self.size as i64;
        Tensor::empty(&shape, (input.kind(), input.device()))
    }

    /// What a collective of `tensor` is once the transport has returned.
    fn after(tensor: &Tensor) -> CallState {
        if tensor.device() == Device::Cpu { CallState::Done } else { CallState::Queued }
    }

    fn timed<T>(&self, op: &'static str, tensor: &Tensor, site: &'static Location, call: impl FnOnce() -> T) -> T {
        self.recorded(op, tensor, site, Self::after(tensor), call).0
    }

    fn recorded<T>(
        &self,
        op: &'static str,
        tensor: &Tensor,
        site: &'static Location,
        after: CallState,
        call: impl FnOnce() -> T,
    ) -> (T, u64) {
        let (kind, count) = (tensor.kind(), tensor.numel());
        let start = Instant::now();
        let result = self.watchdog.collective((self.channel, op, kind, count, site), after, call);
        let mut traffic = self.traffic.get();
        traffic.time += start.elapsed();
        traffic.bytes += (count * kind.elt_size_in_bytes()) as u64;
        traffic.calls += 1;
        self.traffic.set(traffic);
        result
    }
}

impl Pending {
    /// A collective that has nothing left to wait for.
    pub fn done(result: Tensor) -> Self {
        Self(State::Done(result))
    }

    /// This rank's part of the sum. All ranks of the group wait for their collectives in the same order.
    pub fn wait(self) -> Tensor {
        match self.0 {
            State::Done(tensor) => tensor,
            State::Open { ticket, call, after, watchdog, traffic } => {
                let start = Instant::now();
                let tensor = watchdog.rejoin(call, after, || ticket.wait());
                let mut total = traffic.get();
                total.time += start.elapsed();
                traffic.set(total);
                tensor
            }
        }
    }
}
