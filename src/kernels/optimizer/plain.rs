//! The same steps by plain tensor operations, for devices without kernels.

use tch::{Kind, Tensor};

use super::{AdamWFactors, Extras, Sgd};
use crate::kernels::moment::Moment;

pub(super) fn adamw(
    weights: &mut Tensor,
    grad: &Tensor,
    first: &mut Moment,
    second: &mut Moment,
    by: &AdamWFactors,
    extras: Extras,
) {
    let f = f64::from;
    let g = scaled(grad, &extras);
    let (m0, v0, w0) = (first.read(), second.read(), weights.to_kind(Kind::Float).flatten(0, -1));
    let m = &m0 + (&g - &m0) * f(by.new1);
    let v = &v0 * f(by.old2) + g.square() * f(by.new2);
    let w = &w0 * f(by.decay) - &m * f(by.step_size) / (v.sqrt() * f(by.root) + f(by.eps));
    first.write_unless(&m, extras.skip);
    second.write_unless(&v, extras.skip);
    finish(weights, &kept(w, &w0, extras.skip), extras);
}

pub(super) fn sgd(weights: &mut Tensor, grad: &Tensor, first: Option<&mut Moment>, sgd: &Sgd, extras: Extras) {
    let w0 = weights.to_kind(Kind::Float).flatten(0, -1);
    let mut m = scaled(grad, &extras) + &w0 * sgd.weight_decay;
    if let Some(first) = first {
        let m0 = first.read();
        m += &m0 * sgd.momentum;
        first.write_unless(&m, extras.skip);
    }
    let w = kept(&w0 - m * sgd.lr, &w0, extras.skip);
    finish(weights, &w, extras);
}

fn scaled(grad: &Tensor, extras: &Extras) -> Tensor {
    let g = grad.to_kind(Kind::Float).flatten(0, -1);
    extras.scale.map_or_else(|| g.shallow_clone(), |scale| &g * scale)
}

fn kept(new: Tensor, old: &Tensor, skip: Option<&Tensor>) -> Tensor {
    match skip {
        Some(skip) => new.where_self(&skip.eq(0.0), old),
        None => new,
    }
}

fn finish(weights: &mut Tensor, new: &Tensor, extras: Extras) {
    if let Some(copy) = extras.copy {
        let old = copy.to_kind(Kind::Float).flatten(0, -1);
        let new = kept(new.shallow_clone(), &old, extras.skip);
        copy.copy_(&new.view_as(copy));
    }
    weights.copy_(&new.view_as(weights));
}
