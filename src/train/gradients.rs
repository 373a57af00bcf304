//! Gradients of one optimizer step: accumulated in f32 flat buffers, summed over the data-parallel ranks bucket by bucket
//! while backward still runs.
//!
//! Sums everywhere, never averages: the denominators are in the losses.

use std::collections::VecDeque;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::layout::Layout;
use super::parameters::views;
use crate::dist::{Group, Pending, Reduce};
use crate::kernels::reduce::sum_of_squares;
use crate::model::Gradients;
use crate::model::sharding::{Class, ParamId, Table};

/// Where one rank's gradients of one step go.
pub struct GradientBuffers {
    table: Table,
    layout: Layout,
    flat: Vec<Tensor>,
    views: Vec<Tensor>,
    /// Parameters that already hold something of this step; the others hold an older step's numbers.
    touched: Vec<bool>,
    tp: Rc<Group>,
    dp: Rc<Group>,
    /// Own parts are a proper part of the bucket (ZeRO-1).
    sharded: bool,
    /// Backward of the last micro-batch is running: complete buckets are summed.
    last: bool,
    /// Sums that have ended, then those under way, in the order of the buckets.
    summed: Vec<Tensor>,
    under_way: VecDeque<Pending>,
}

/// Sums under way at once; a transport may hold a copy of each bucket.
const MAX_UNDER_WAY: usize = 2;

/// The summed gradients of this rank's own part of each bucket.
pub struct Reduced {
    pub own: Vec<Tensor>,
    /// Global L2 norm over all parameters of the model.
    pub norm: f64,
}

impl GradientBuffers {
    pub fn new(table: &Table, layout: &Layout, tp: &Rc<Group>, dp: &Rc<Group>, device: Device) -> Self {
        let zeros = |len: usize| Tensor::zeros([len as i64], (Kind::Float, device));
        let flat: Vec<Tensor> = layout.buckets.iter().map(|bucket| zeros(bucket.len)).collect();
        Self {
            table: table.clone(),
            layout: layout.clone(),
            views: views(table, layout, &flat),
            flat,
            touched: vec![false; table.params.len()],
            tp: Rc::clone(tp),
            dp: Rc::clone(dp),
            sharded: layout.buckets.iter().any(|bucket| bucket.own.len() < bucket.len),
            last: false,
            summed: Vec::new(),
            under_way: VecDeque::new(),
        }
    }

    /// Starts a step: what the buffers hold counts no more.
    pub fn begin(&mut self) {
        self.touched.fill(false);
        self.last = false;
        assert!(self.num_started() == 0, "invariant: the previous step was finished");
    }

    /// Says that the next backward is the last one of the step.
    pub fn last_micro_batch(&mut self) {
        self.last = true;
    }

    /// Starts the sums that are not yet under way. All ranks call it once a step, after their last micro-batch and before any
    /// other collective: ranks without work come here at once.
    pub fn start_all(&mut self) {
        self.last = true;
        while self.num_started() < self.layout.buckets.len() {
            self.start_next();
        }
    }

    /// Waits for all sums. All ranks call it once a step.
    pub fn finish(&mut self) -> Reduced {
        self.start_all();
        let mut own = std::mem::take(&mut self.summed);
        own.extend(self.under_way.drain(..).map(Pending::wait));
        let norm = self.norm(&own);
        Reduced { own, norm }
    }

    /// The first parameter, in the order of backward, whose gradient on this rank alone is not finite, by its Hugging Face name.
    pub fn find_non_finite(&self) -> Option<String> {
        let params = self.layout.buckets.iter().flat_map(|bucket| &bucket.params).map(|(id, _)| *id);
        let mut order: Vec<ParamId> = params.collect();
        order.sort_by_key(|&id| std::cmp::Reverse(self.table.params[id].unit));
        order.retain(|&id| self.touched[id]);
        let bad =
            order.into_iter().find(|&id| !f64::try_from(self.views[id].sum(Kind::Double)).is_ok_and(f64::is_finite));
        bad.map(|id| self.table.params[id].pieces[0].name.clone())
    }

    /// The gradient of one parameter on this rank, before anything is summed. For tests and probes.
    pub fn view(&self, param: ParamId) -> &Tensor {
        &self.views[param]
    }

    pub fn bytes(&self) -> usize {
        self.flat.iter().map(|flat| flat.numel() * 4).sum()
    }

    /// Finishes the sums over TP of the next bucket and starts its sum over DP.
    fn start_next(&mut self) {
        let index = self.num_started();
        if self.under_way.len() == MAX_UNDER_WAY {
            // every rank waits here for the same bucket, after having started it
            self.summed.extend(self.under_way.pop_front().map(Pending::wait));
        }
        let bucket = &self.layout.buckets[index];
        for (id, _) in &bucket.params {
            if !self.touched[*id] {
                let _ = self.views[*id].zero_();
                self.touched[*id] = true;
            }
        }
        let flat = &self.flat[index];
        let partial = bucket.class(&self.table, Class::PartialVector);
        if !partial.is_empty() {
            let mut partial = flat.narrow(0, partial.start as i64, partial.len() as i64);
            self.tp.all_reduce(&mut partial, Reduce::Sum);
        }
        let pending = if self.sharded {
            // the sum takes the place of this rank's own share of it
            self.dp.reduce_scatter_into(flat, flat.narrow(0, bucket.own.start as i64, bucket.own.len() as i64))
        } else {
            let mut sum = flat.shallow_clone();
            self.dp.all_reduce(&mut sum, Reduce::Sum);
            Pending::done(sum)
        };
        self.under_way.push_back(pending);
    }

    fn num_started(&self) -> usize {
        self.summed.len() + self.under_way.len()
    }

    /// Sum of squares over what each rank owns; what is the same on all tensor-parallel ranks is counted by the first.
    fn norm(&self, own: &[Tensor]) -> f64 {
        let mut total = 0.0;
        for (bucket, own) in self.layout.buckets.iter().zip(own) {
            for class in [Class::Matrix, Class::Bias, Class::PartialVector, Class::Vector] {
                let replicated = matches!(class, Class::PartialVector | Class::Vector);
                let range = bucket.owned(&bucket.class(&self.table, class));
                if !range.is_empty() && (!replicated || self.tp.is_first()) {
                    total += sum_of_squares(&own.narrow(0, range.start as i64, range.len() as i64));
                }
            }
        }
        let mut total = [total];
        self.tp.all_reduce_f64(&mut total, Reduce::Sum);
        if self.sharded {
            self.dp.all_reduce_f64(&mut total, Reduce::Sum);
        }
        total[0].sqrt()
    }

    /// Whether this is the first contribution to a parameter in this step; from now on it is not.
    fn first(&mut self, param: ParamId) -> bool {
        !std::mem::replace(&mut self.touched[param], true)
    }
}

impl Gradients for GradientBuffers {
    fn product(&mut self, param: ParamId, dy: &Tensor, x: &Tensor) {
        let first = self.first(param);
        let target = &mut self.views[param];
        let dy = dy.tr();
        match (x.kind() == Kind::Float, first) {
            (true, true) => _ = dy.mm_out(target, x),
            (true, false) => _ = target.addmm_(&dy, x),
            (false, true) => target.copy_(&dy.mm(x)),
            (false, false) => _ = target.g_add_(&dy.mm(x)),
        }
    }

    fn vector(&mut self, param: ParamId, grad: &Tensor) {
        if self.first(param) {
            self.views[param].copy_(grad);
        } else {
            let _ = self.views[param].g_add_(grad);
        }
    }

    fn rows(&mut self, param: ParamId, rows: &Tensor, grad: &Tensor) {
        if self.first(param) {
            let _ = self.views[param].zero_();
        }
        let _ = self.views[param].index_add_(0, rows, &grad.to_kind(Kind::Float));
    }

    fn complete(&mut self, unit: usize) {
        self.dp.progress();
        if !self.last {
            return;
        }
        while self.layout.buckets.get(self.num_started()).is_some_and(|bucket| bucket.last_unit >= unit) {
            self.start_next();
        }
    }
}
