//! Gradients of one optimizer step: accumulated in flat buffers, summed over the data-parallel ranks bucket by bucket while
//! backward still runs.
//!
//! Sums everywhere, never averages: the denominators are in the losses.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::layout::{Bucket, Layout};
use super::selection::Selection;
use crate::dist::{Group, Pending, Reduce};
use crate::kernels::product::{add_product, widened_product_into};
use crate::kernels::reduce::sum_of_squares;
use crate::model::Gradients;
use crate::model::sharding::{Class, ParamId, Table};

/// How gradients are held and sent.
#[derive(Clone, Copy, Debug)]
pub struct GradientOptions {
    /// Of the buffers: f32, or bf16.
    pub kind: Kind,
    /// In which the data-parallel ranks add them up.
    pub reduce: Kind,
    /// Allocate a bucket when its first gradient comes and free it when it has been taken with
    /// [`GradientBuffers::next_summed`].
    pub release: bool,
    pub device: Device,
}

impl GradientOptions {
    /// f32 buffers that stay.
    pub fn f32(device: Device) -> Self {
        Self { kind: Kind::Float, reduce: Kind::Float, release: false, device }
    }
}

/// Where one rank's gradients of one step go.
pub struct GradientBuffers {
    table: Table,
    layout: Layout,
    options: GradientOptions,
    /// One a bucket.
    flat: Vec<Option<Tensor>>,
    /// Parameters that already hold something of this step; the others hold an older step's numbers.
    touched: Vec<bool>,
    tp: Rc<Group>,
    dp: Rc<Group>,
    /// Own parts are a proper part of the bucket (ZeRO-1).
    sharded: bool,
    /// Backward of the last micro-batch is running: complete buckets are summed.
    last: bool,
    /// Buckets whose sums were started.
    started: usize,
    /// Sums that have ended and were not yet taken, then those under way, in the order of the buckets.
    summed: VecDeque<Tensor>,
    under_way: VecDeque<(Pending, Instant)>,
    /// Most bytes that the buffers have held at once.
    peak: usize,
    /// Marks of what may change in this rank's own part of each bucket, where not all may.
    masks: Vec<Tensor>,
    /// When sums were under way, where that is asked for.
    flights: Option<Vec<Flight>>,
}

/// One bucket's sum over the data-parallel ranks, as the host saw it.
#[derive(Clone, Copy, Debug)]
pub struct Flight {
    pub start: Instant,
    /// The host began to wait for it: what was before was hidden behind other work.
    pub waited: Instant,
    pub end: Instant,
}

/// Sums under way at once; a transport may hold a copy of each bucket.
pub const MAX_UNDER_WAY: usize = 2;

/// The summed gradients of this rank's own part of each bucket.
pub struct Reduced {
    pub own: Vec<Tensor>,
    /// Global L2 norm over all parameters of the model: one f64 on the device.
    pub norm: Tensor,
}

impl GradientBuffers {
    pub fn new(table: &Table, layout: &Layout, tp: &Rc<Group>, dp: &Rc<Group>, options: GradientOptions) -> Self {
        let mut buffers = Self {
            table: table.clone(),
            layout: layout.clone(),
            options,
            flat: layout.buckets.iter().map(|_| None).collect(),
            touched: vec![false; table.params.len()],
            tp: Rc::clone(tp),
            dp: Rc::clone(dp),
            sharded: layout.buckets.iter().any(|bucket| bucket.own.len() < bucket.len),
            last: false,
            started: 0,
            summed: VecDeque::new(),
            under_way: VecDeque::new(),
            peak: 0,
            masks: Vec::new(),
            flights: None,
        };
        if !options.release {
            (0..layout.buckets.len()).for_each(|bucket| _ = buffers.flat(bucket));
        }
        buffers
    }

    /// From now on sums are 0 where nothing may change.
    pub fn select(&mut self, selection: &Selection) {
        self.masks = (0..self.layout.buckets.len()).map(|bucket| selection.mask(bucket).shallow_clone()).collect();
    }

    fn masked(&self, bucket: usize, mut sum: Tensor) -> Tensor {
        if let Some(mask) = self.masks.get(bucket) {
            let _ = sum.g_mul_(mask);
        }
        sum
    }

    /// Starts a step: what the buffers hold counts no more.
    pub fn begin(&mut self) {
        self.touched.fill(false);
        self.last = false;
        assert!(self.summed.is_empty() && self.under_way.is_empty(), "invariant: the previous step was finished");
        self.started = 0;
    }

    /// Says that the next backward is the last one of the step.
    pub fn last_micro_batch(&mut self) {
        self.last = true;
    }

    /// Starts the sums that are not yet under way. All ranks call it once a step, after their last micro-batch and before any
    /// other collective: ranks without work come here at once.
    pub fn start_all(&mut self) {
        while self.start_one(0) {}
    }

    /// Starts the next sum if all its parameters belong to unit `unit` or later ones, whose backward is done; says whether it did.
    ///
    /// Who takes sums between the starts ([`Self::next_summed`]) must do so after the same starts on all ranks, with work or without.
    pub fn start_one(&mut self, unit: usize) -> bool {
        let ready = self.layout.buckets.get(self.started).is_some_and(|bucket| bucket.last_unit >= unit);
        if ready {
            self.start_next();
        }
        ready
    }

    /// Waits for all sums. All ranks call it once a step.
    pub fn finish(&mut self) -> Reduced {
        self.start_all();
        let mut own: Vec<Tensor> = std::mem::take(&mut self.summed).into();
        while let Some(sum) = self.wait_oldest() {
            own.push(sum);
        }
        let own: Vec<Tensor> = own.into_iter().enumerate().map(|(bucket, sum)| self.masked(bucket, sum)).collect();
        let norm = self.norm(&own);
        Reduced { own, norm }
    }

    /// The oldest sum that has ended and its bucket, which is then free; with `all`, the oldest at all.
    ///
    /// All ranks call it at the same places of a step.
    pub fn next_summed(&mut self, all: bool) -> Option<(usize, Tensor)> {
        let bucket = self.started - self.summed.len() - self.under_way.len();
        let sum = match self.summed.pop_front() {
            Some(sum) => sum,
            None if all => self.wait_oldest()?,
            None => return None,
        };
        if self.options.release {
            self.flat[bucket] = None;
        }
        Some((bucket, self.masked(bucket, sum)))
    }

    /// The first parameter, in the order of backward, whose gradient on this rank alone is not finite, by its Hugging Face name.
    pub fn find_non_finite(&self) -> Option<String> {
        let params = self.layout.buckets.iter().flat_map(|bucket| &bucket.params).map(|(id, _)| *id);
        let mut order: Vec<ParamId> = params.collect();
        order.sort_by_key(|&id| std::cmp::Reverse(self.table.params[id].unit));
        order.retain(|&id| self.touched[id] && self.flat[self.bucket(id)].is_some());
        let bad =
            order.into_iter().find(|&id| !f64::try_from(self.view(id).sum(Kind::Double)).is_ok_and(f64::is_finite));
        bad.map(|id| self.table.params[id].pieces[0].name.clone())
    }

    /// The gradient of one parameter on this rank, before anything is summed. For tests and probes.
    pub fn view(&self, param: ParamId) -> Tensor {
        let bucket = self.bucket(param);
        view(&self.table, &self.layout, param, self.flat[bucket].as_ref().expect("invariant: the bucket is there"))
    }

    /// Bytes of the buffers, at most so far.
    pub fn bytes(&self) -> usize {
        self.peak
    }

    /// The bucket of a parameter that is trained.
    fn bucket(&self, param: ParamId) -> usize {
        self.layout.places[param].expect("invariant: it is trained").0
    }

    /// The buffer of a bucket, made now if it is not there.
    fn flat(&mut self, bucket: usize) -> &Tensor {
        if self.flat[bucket].is_none() {
            let GradientOptions { kind, device, .. } = self.options;
            self.flat[bucket] = Some(Tensor::zeros([self.layout.buckets[bucket].len as i64], (kind, device)));
            let held: usize = self.flat.iter().flatten().map(|flat| flat.numel() * kind.elt_size_in_bytes()).sum();
            self.peak = self.peak.max(held);
        }
        self.flat[bucket].as_ref().expect("invariant: just made")
    }

    /// A parameter's place in its bucket.
    fn target(&mut self, param: ParamId) -> Tensor {
        let flat = self.flat(self.bucket(param)).shallow_clone();
        view(&self.table, &self.layout, param, &flat)
    }

    /// Finishes the sums over TP of the next bucket and starts its sum over DP.
    fn start_next(&mut self) {
        let index = self.started;
        if self.under_way.len() == MAX_UNDER_WAY {
            // every rank waits here for the same bucket, after having started it
            let sum = self.wait_oldest();
            self.summed.extend(sum);
        }
        for (id, _) in self.layout.buckets[index].params.clone() {
            if !self.touched[id] {
                let _ = self.target(id).zero_();
                self.touched[id] = true;
            }
        }
        let flat = self.flat(index).shallow_clone();
        let bucket = &self.layout.buckets[index];
        for class in [Class::PartialMatrix, Class::PartialVector] {
            let partial = bucket.class(&self.table, class);
            if !partial.is_empty() {
                let mut partial = flat.narrow(0, partial.start as i64, partial.len() as i64);
                self.tp.all_reduce(&mut partial, Reduce::Sum);
            }
        }
        let start = Instant::now();
        let sent = if self.dp.size() > 1 { flat.to_kind(self.options.reduce) } else { flat };
        let pending = if self.sharded {
            // the sum takes the place of this rank's own share of it
            self.dp.reduce_scatter_into(&sent, sent.narrow(0, bucket.own.start as i64, bucket.own.len() as i64))
        } else {
            let mut sum = sent;
            self.dp.all_reduce(&mut sum, Reduce::Sum);
            Pending::done(sum)
        };
        self.under_way.push_back((pending, start));
        self.started += 1;
        if self.dp.size() == 1 {
            let sum = self.wait_oldest();
            self.summed.extend(sum);
        }
    }

    /// Waits for the oldest sum under way.
    fn wait_oldest(&mut self) -> Option<Tensor> {
        let (pending, start) = self.under_way.pop_front()?;
        let waited = Instant::now();
        let sum = pending.wait();
        if let Some(flights) = &mut self.flights {
            flights.push(Flight { start, waited, end: Instant::now() });
        }
        Some(sum)
    }

    /// From now on notes when sums are under way.
    pub fn record(&mut self) {
        self.flights = Some(Vec::new());
    }

    /// What was noted since [`Self::record`], and no more from now on.
    pub fn recorded(&mut self) -> Vec<Flight> {
        self.flights.take().unwrap_or_default()
    }

    /// Sum of squares over what each rank owns; what is the same on all tensor-parallel ranks is counted by the first.
    fn norm(&self, own: &[Tensor]) -> Tensor {
        let mut total = Tensor::zeros([1], (Kind::Double, self.options.device));
        for (bucket, own) in self.layout.buckets.iter().zip(own) {
            for class in Class::TRAINED {
                let range = bucket.owned(&bucket.class(&self.table, class));
                if !range.is_empty() && self.counts(class) {
                    total += sum_of_squares(&own.narrow(0, range.start as i64, range.len() as i64));
                }
            }
        }
        self.sum_over_owners(&mut total);
        total.sqrt_().squeeze_dim(0)
    }

    /// The square of the L2 norm of each unit with parameters in a bucket, from this rank's part of its sum: the units, and
    /// `[units]` f64 on the device. All ranks call it.
    pub fn unit_norms(&self, bucket: usize, own: &Tensor) -> (Vec<usize>, Tensor) {
        let bucket: &Bucket = &self.layout.buckets[bucket];
        let segments = bucket.segments(&self.table);
        let mut units: Vec<usize> = segments.iter().map(|segment| segment.unit).collect();
        units.sort_unstable();
        units.dedup();
        let mut squares = Tensor::zeros([units.len() as i64], (Kind::Double, self.options.device));
        for segment in segments.iter().filter(|segment| !segment.own.is_empty() && self.counts(segment.class)) {
            let at = units.iter().position(|&unit| unit == segment.unit).expect("invariant: collected above");
            let part = own.narrow(0, segment.own.start as i64, segment.own.len() as i64);
            let _ = squares.narrow(0, at as i64, 1).g_add_(&sum_of_squares(&part));
        }
        self.sum_over_owners(&mut squares);
        (units, squares)
    }

    /// Whether this rank counts a class in a norm over the whole model.
    fn counts(&self, class: Class) -> bool {
        !class.is_replicated() || self.tp.is_first()
    }

    fn sum_over_owners(&self, total: &mut Tensor) {
        self.tp.all_reduce(total, Reduce::Sum);
        if self.sharded {
            self.dp.all_reduce(total, Reduce::Sum);
        }
    }

    /// Whether a parameter is not trained.
    fn is_frozen(&self, param: ParamId) -> bool {
        self.table.params[param].class == Class::Frozen
    }

    /// Whether this is the first contribution to a parameter in this step; from now on it is not.
    fn first(&mut self, param: ParamId) -> bool {
        !std::mem::replace(&mut self.touched[param], true)
    }
}

/// One parameter's place in a buffer of its bucket.
fn view(table: &Table, layout: &Layout, param: ParamId, flat: &Tensor) -> Tensor {
    let (_, start) = layout.places[param].expect("invariant: it is trained");
    let param = &table.params[param];
    flat.narrow(0, start as i64, param.num_elements()).view(param.shape.as_slice())
}

impl Gradients for GradientBuffers {
    fn product(&mut self, param: ParamId, dy: &Tensor, x: &Tensor) {
        if self.is_frozen(param) {
            return;
        }
        let first = self.first(param);
        let mut target = self.target(param);
        let dy = dy.tr();
        match first {
            true => widened_product_into(&mut target, &dy, x),
            false => add_product(&mut target, &dy, x),
        }
    }

    fn vector(&mut self, param: ParamId, grad: &Tensor) {
        if self.is_frozen(param) {
            return;
        }
        let first = self.first(param);
        let mut target = self.target(param);
        if first {
            target.copy_(grad);
        } else {
            let _ = target.g_add_(&grad.to_kind(target.kind()));
        }
    }

    fn rows(&mut self, param: ParamId, rows: &Tensor, grad: &Tensor) {
        if self.is_frozen(param) {
            return;
        }
        let first = self.first(param);
        let mut target = self.target(param);
        if first {
            let _ = target.zero_();
        }
        let grad = grad.to_kind(target.kind());
        if target.device() == Device::Cpu {
            let _ = target.index_add_(0, rows, &grad);
        } else {
            // sorts the indices first: the order of additions, and so the result, is always the same
            let _ = target.index_put_(&[Some(rows)], &grad, true);
        }
    }

    fn complete(&mut self, unit: usize) {
        self.dp.progress();
        while self.last && self.start_one(unit) {}
    }
}
