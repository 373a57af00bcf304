//! AdamW and SGD as one pass over memory: weights, gradient and moments are read once and written once.
//!
//! Weights are f32 or bf16 (rounded to nearest: a step below half a unit in the last place is lost), gradients f32 or bf16,
//! moments as [`Moment`] says; arithmetic is f32. The result does not depend on the number of threads.

use tch::{Device, Kind, Tensor};

use super::cuda;
use super::moment::{BLOCK, Codes, Moment, Storage};
use super::real::vectorised;
use crate::abi::slices::slice;

mod blocks;
mod plain;

/// Numbers of one AdamW step (arXiv 1711.05101 as PyTorch has it: decay by `lr * weight_decay`, moments corrected for their
/// start at 0).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: i64,
}

/// Numbers of one step of stochastic gradient descent as PyTorch has it: `m = momentum * m + g + weight_decay * w`,
/// `w -= lr * m`.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    pub lr: f64,
    pub momentum: f64,
    pub weight_decay: f64,
}

/// What else a step reads and writes.
#[derive(Debug, Default)]
pub struct Extras<'a> {
    /// One f32 on the device that the gradient is multiplied by: clipping without a wait.
    pub scale: Option<&'a Tensor>,
    /// One f32 on the device; anything but 0 there, and nothing changes.
    pub skip: Option<&'a Tensor>,
    /// bf16, gets the new weights.
    pub copy: Option<&'a mut Tensor>,
}

/// AdamW's numbers as a step uses them.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdamWFactors {
    pub decay: f32,
    pub new1: f32,
    pub old2: f32,
    pub new2: f32,
    pub step_size: f32,
    /// Of the second moment's correction.
    pub root: f32,
    pub eps: f32,
}

impl From<&AdamW> for AdamWFactors {
    fn from(adamw: &AdamW) -> Self {
        let left = |beta: f64| 1.0 - beta.powf(adamw.step as f64);
        Self {
            decay: (1.0 - adamw.lr * adamw.weight_decay) as f32,
            new1: (1.0 - adamw.beta1) as f32,
            old2: adamw.beta2 as f32,
            new2: (1.0 - adamw.beta2) as f32,
            step_size: (adamw.lr / left(adamw.beta1)) as f32,
            root: (1.0 / left(adamw.beta2).sqrt()) as f32,
            eps: adamw.eps as f32,
        }
    }
}

/// One AdamW step in place.
///
/// `weights, grad`: f32 or bf16, contiguous, equal lengths, on one device with `first` (signed) and `second` (unsigned).
/// 8-bit blocks count from the first element given here.
pub fn adamw(
    weights: &mut Tensor,
    grad: &Tensor,
    first: &mut Moment,
    second: &mut Moment,
    adamw: &AdamW,
    extras: Extras,
) {
    check(weights, grad, &[&*first, &*second], &extras);
    assert!(first.codes == Codes::Signed && second.codes == Codes::Unsigned, "invariant: a mean and a mean of squares");
    let factors = AdamWFactors::from(adamw);
    if let Some(on) = cuda::launcher(weights) {
        return cuda::optimizer::adamw(on, weights, grad, first, second, &factors, extras);
    }
    if weights.device() != Device::Cpu {
        return plain::adamw(weights, grad, first, second, &factors, extras);
    }
    let factor = extras.scale.map_or(1.0, |scale| slice::<f32>(scale)[0]);
    blocks::each(weights, grad, Some(first), Some(second), extras, |w, g, m, v| {
        adamw_block(w, g, m, v, factor, factors)
    });
}

/// One step of stochastic gradient descent in place; without `first` there is no momentum. Else as [`adamw`].
pub fn sgd(weights: &mut Tensor, grad: &Tensor, mut first: Option<&mut Moment>, sgd: &Sgd, extras: Extras) {
    check(weights, grad, first.as_deref().as_slice(), &extras);
    assert!(first.as_deref().is_none_or(|first| first.codes == Codes::Signed), "invariant: a mean of gradients");
    if let Some(on) = cuda::launcher(weights) {
        return cuda::optimizer::sgd(on, weights, grad, first, sgd, extras);
    }
    if weights.device() != Device::Cpu {
        return plain::sgd(weights, grad, first.take(), sgd, extras);
    }
    let factor = extras.scale.map_or(1.0, |scale| slice::<f32>(scale)[0]);
    let (lr, momentum, decay) = (sgd.lr as f32, sgd.momentum as f32, sgd.weight_decay as f32);
    blocks::each(weights, grad, first, None, extras, |w, g, m, _| sgd_block(w, g, m, factor, lr, momentum, decay));
}

fn check(weights: &Tensor, grad: &Tensor, moments: &[&Moment], extras: &Extras) {
    let len = weights.numel();
    let float = |t: &Tensor| matches!(t.kind(), Kind::Float | Kind::BFloat16);
    let fits = |t: &Tensor| t.numel() == len && t.is_contiguous() && t.device() == weights.device();
    assert!(float(weights) && float(grad) && fits(weights) && fits(grad), "invariant: weights and gradient alike");
    for moment in moments {
        let scales = moment.scales.as_ref().map(Tensor::numel);
        let blocks = (moment.storage() == Storage::Block8).then_some(len.div_ceil(BLOCK));
        assert!(
            fits(&moment.values) && scales == blocks,
            "invariant: a moment for each weight, a scale for each block"
        );
    }
    for one in [extras.scale, extras.skip].into_iter().flatten() {
        assert!(
            one.numel() == 1 && one.kind() == Kind::Float && one.device() == weights.device(),
            "invariant: one f32"
        );
    }
    let bf16 = |t: &&mut Tensor| fits(t) && t.kind() == Kind::BFloat16;
    assert!(extras.copy.as_ref().is_none_or(bf16), "invariant: the copy is bf16 and as long as the weights");
}

vectorised! {
    fn adamw_block(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], factor: f32, by: AdamWFactors) {
        let len = w.len();
        let (g, m, v) = (&g[..len], &mut m[..len], &mut v[..len]);
        for i in 0..len {
            let g = g[i] * factor;
            m[i] += (g - m[i]) * by.new1;
            v[i] = v[i] * by.old2 + g * g * by.new2;
            w[i] = w[i] * by.decay - by.step_size * m[i] / (v[i].sqrt() * by.root + by.eps);
        }
    }

    fn sgd_block(w: &mut [f32], g: &[f32], m: &mut [f32], factor: f32, lr: f32, momentum: f32, decay: f32) {
        let len = w.len();
        let (g, m) = (&g[..len], &mut m[..len]);
        for i in 0..len {
            m[i] = m[i] * momentum + (g[i] * factor + decay * w[i]);
            w[i] -= lr * m[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::dispatcher;

    const STORAGES: [Storage; 3] = [Storage::F32, Storage::Bf16, Storage::Block8];

    fn randn(len: i64) -> Tensor {
        Tensor::randn([len], (Kind::Float, Device::Cpu))
    }

    fn moments(storage: Storage, len: i64) -> (Moment, Moment) {
        let zeros = |codes| Moment::zeros(storage, codes, len, Device::Cpu);
        (zeros(Codes::Signed), zeros(Codes::Unsigned))
    }

    fn hyper(step: i64) -> AdamW {
        AdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step }
    }

    fn error(got: &Tensor, want: &Tensor) -> f64 {
        let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
        f64::try_from((got - &want).abs().max() / want.abs().max()).unwrap()
    }

    #[test]
    fn with_f32_moments_it_is_pytorchs_adamw() {
        tch::manual_seed(31);
        let len = 10_001;
        let (mut ours, scale) = (randn(len), 0.25);
        let theirs = ours.copy();
        let (mut first, mut second) = moments(Storage::F32, len);
        let (m, v) = (Tensor::zeros_like(&theirs), Tensor::zeros_like(&theirs));
        let mut copy = Tensor::zeros([len], (Kind::BFloat16, Device::Cpu));
        for step in 1..=20 {
            let grad = randn(len) * 1e-2;
            let by = hyper(step);
            let factor = Tensor::from(scale as f32);
            let extras = Extras { scale: Some(&factor), skip: None, copy: Some(&mut copy) };
            adamw(&mut ours, &grad, &mut first, &mut second, &by, extras);
            let adamw = dispatcher::AdamW {
                lr: by.lr,
                beta1: by.beta1,
                beta2: by.beta2,
                weight_decay: by.weight_decay,
                eps: by.eps,
            };
            let one = |t: &Tensor| [t.shallow_clone()];
            let steps = [Tensor::from(step as f32)];
            dispatcher::fused_adamw(&one(&theirs), &[grad * scale], &one(&m), &one(&v), &steps, None, adamw);
        }
        assert!(error(&ours, &theirs) < 1e-6, "{}", error(&ours, &theirs));
        assert!(error(&first.values, &m) < 1e-6 && error(&second.values, &v) < 1e-6);
        assert!(copy.equal(&ours.to_kind(Kind::BFloat16)));
    }

    /// The loop over blocks against plain tensor operations, for every storage.
    #[test]
    fn every_storage_follows_the_plain_form() {
        tch::manual_seed(32);
        let len = 5000;
        for (kind, grad_kind) in [(Kind::Float, Kind::BFloat16), (Kind::BFloat16, Kind::Float)] {
            for storage in STORAGES {
                let start = randn(len).to_kind(kind);
                let (mut fused, mut plain) = (start.copy(), start.copy());
                let (mut a, mut b) = (moments(storage, len), moments(storage, len));
                let mut copies = [0, 1].map(|_| Tensor::zeros([len], (Kind::BFloat16, Device::Cpu)));
                let scale = Tensor::from(0.5f32);
                for step in 1..=5 {
                    let grad = (randn(len) * 0.1).to_kind(grad_kind);
                    for skip in [Tensor::from(1.0f32), Tensor::from(0.0f32)] {
                        let [one, two] = &mut copies;
                        let with = |copy| Extras { scale: Some(&scale), skip: Some(&skip), copy: Some(copy) };
                        adamw(&mut fused, &grad, &mut a.0, &mut a.1, &hyper(step), with(one));
                        let by = AdamWFactors::from(&hyper(step));
                        plain::adamw(&mut plain, &grad, &mut b.0, &mut b.1, &by, with(two));
                    }
                }
                let tolerance = if kind == Kind::Float { 2e-6 } else { 4e-3 };
                let pairs = [(&fused, &plain), (&copies[0], &copies[1])];
                for (got, want) in pairs {
                    let tolerance = if got.kind() == Kind::BFloat16 { 4e-3 } else { tolerance };
                    assert!(error(got, want) < tolerance, "{kind:?} {storage:?}: {}", error(got, want));
                }
                for (got, want) in [(&a.0, &b.0), (&a.1, &b.1)] {
                    assert!(error(&got.read(), &want.read()) < 8e-3, "{kind:?} {storage:?}");
                }
                let (mut one, mut two) = (start.copy(), start.copy());
                let (mut m, mut n) = (moments(storage, len).0, moments(storage, len).0);
                let by = Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.01 };
                for _ in 0..3 {
                    let grad = randn(len).to_kind(grad_kind);
                    sgd(&mut one, &grad, Some(&mut m), &by, Extras::default());
                    plain::sgd(&mut two, &grad, Some(&mut n), &by, Extras::default());
                }
                assert!(error(&one, &two) < tolerance, "{kind:?} {storage:?}: {}", error(&one, &two));
            }
        }
    }

    #[test]
    fn sgd_follows_its_formula() {
        let mut w = Tensor::from_slice(&[1.0f32, -2.0]);
        let mut first = Moment::zeros(Storage::F32, Codes::Signed, 2, Device::Cpu);
        let by = Sgd { lr: 0.1, momentum: 0.5, weight_decay: 0.2 };
        let (mut want, mut m) = ([1.0f64, -2.0], [0.0f64; 2]);
        for grad in [[0.3f32, 0.1], [-0.2, 0.4]] {
            sgd(&mut w, &Tensor::from_slice(&grad), Some(&mut first), &by, Extras::default());
            for i in 0..2 {
                m[i] = 0.5 * m[i] + f64::from(grad[i]) + 0.2 * want[i];
                want[i] -= 0.1 * m[i];
            }
        }
        for (i, want) in want.iter().enumerate() {
            assert!((w.double_value(&[i as i64]) - want).abs() < 1e-6);
        }
        sgd(&mut w, &Tensor::from_slice(&[1.0f32, 1.0]), None, &Sgd { momentum: 0.0, ..by }, Extras::default());
        assert!((w.double_value(&[0]) - (want[0] - 0.1 * (1.0 + 0.2 * want[0]))).abs() < 1e-6);
    }

    /// Least squares with gradients of very different sizes: 8-bit moments end where f32 moments end.
    #[test]
    fn small_moments_train_as_well() {
        tch::manual_seed(33);
        let (len, samples) = (600, 900);
        let sizes = (Tensor::rand([len], (Kind::Float, Device::Cpu)) * -4.0).exp();
        let x = Tensor::randn([samples, len], (Kind::Float, Device::Cpu)) * sizes;
        let y = x.matmul(&randn(len)) + randn(samples) * 0.1;
        let loss = |storage| {
            let mut w = Tensor::zeros([len], (Kind::Float, Device::Cpu));
            let (mut first, mut second) = moments(storage, len);
            for step in 1..=400 {
                let grad = x.tr().matmul(&(x.matmul(&w) - &y)) * (2.0 / samples as f64);
                let by = AdamW { lr: 0.02 * (1.0 - step as f64 / 400.0), weight_decay: 0.0, ..hyper(step) };
                adamw(&mut w, &grad, &mut first, &mut second, &by, Extras::default());
            }
            f64::try_from((x.matmul(&w) - &y).square().mean(Kind::Float)).unwrap()
        };
        let [wide, half, small] = STORAGES.map(loss);
        let start = f64::try_from(y.square().mean(Kind::Float)).unwrap();
        assert!(wide < start / 50.0, "{start} to {wide}");
        let worse = |loss: f64| (loss - wide) / start;
        assert!(worse(half) < 0.002 && worse(small) < 0.005, "{start} to {wide}, {half}, {small}");
    }

    /// The same bits for one thread and for two.
    #[test]
    fn threads_change_nothing() {
        tch::manual_seed(34);
        let len = 100_000;
        let (start, grad) = (randn(len), randn(len));
        let threads = tch::get_num_threads();
        let [one, two] = [1, 2].map(|threads| {
            tch::set_num_threads(threads);
            let (mut w, (mut first, mut second)) = (start.copy(), moments(Storage::Block8, len));
            adamw(&mut w, &grad, &mut first, &mut second, &hyper(1), Extras::default());
            [w, first.values, second.values]
        });
        tch::set_num_threads(threads);
        assert!(one.iter().zip(&two).all(|(a, b)| a.equal(b)));
    }
}
