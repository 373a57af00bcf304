//! AdamW and SGD as one pass over memory: weights, gradient and moments are read once and written once.
//!
//! Weights are f32 or bf16 (rounded to nearest: a step below half a unit in the last place is lost), gradients f32 or bf16,
//! moments as [`Moment`] says; arithmetic is f32. The result does not depend on the number of threads.

use tch::{Device, Kind, Tensor};

use super::cuda;
use super::moment::{BLOCK, Book, Codes, Moment, Storage, decode, encode};
use super::real::{Real, vectorised};
use crate::abi::parallel::{self, Chunks};
use crate::abi::slices::{Bf16, slice, slice_mut};

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
        return plain_adamw(weights, grad, first, second, &factors, extras);
    }
    let factor = extras.scale.map_or(1.0, |scale| slice::<f32>(scale)[0]);
    blocks(weights, grad, Some(first), Some(second), extras, |w, g, m, v| adamw_block(w, g, m, v, factor, factors));
}

/// One step of stochastic gradient descent in place; without `first` there is no momentum. Else as [`adamw`].
pub fn sgd(weights: &mut Tensor, grad: &Tensor, mut first: Option<&mut Moment>, sgd: &Sgd, extras: Extras) {
    check(weights, grad, first.as_deref().as_slice(), &extras);
    assert!(first.as_deref().is_none_or(|first| first.codes == Codes::Signed), "invariant: a mean of gradients");
    if let Some(on) = cuda::launcher(weights) {
        return cuda::optimizer::sgd(on, weights, grad, first, sgd, extras);
    }
    if weights.device() != Device::Cpu {
        return plain_sgd(weights, grad, first.take(), sgd, extras);
    }
    let factor = extras.scale.map_or(1.0, |scale| slice::<f32>(scale)[0]);
    let (lr, momentum, decay) = (sgd.lr as f32, sgd.momentum as f32, sgd.weight_decay as f32);
    blocks(weights, grad, first, None, extras, |w, g, m, _| sgd_block(w, g, m, factor, lr, momentum, decay));
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

/// Elements of one step of the parallel loop: whole blocks.
const CHUNK: usize = 16 * BLOCK;

type Floats<'a> = (Option<Chunks<'a, f32>>, Option<Chunks<'a, Bf16>>);

fn floats(tensor: Option<&mut Tensor>) -> Floats<'_> {
    match tensor {
        Some(tensor) if tensor.kind() == Kind::Float => (Some(Chunks::new(slice_mut(tensor), CHUNK)), None),
        Some(tensor) if tensor.kind() == Kind::BFloat16 => (None, Some(Chunks::new(slice_mut(tensor), CHUNK))),
        _ => (None, None),
    }
}

type Stored<'a> = (Floats<'a>, Option<(Chunks<'a, u8>, Chunks<'a, f32>)>);

fn stored(moment: Option<&mut Moment>) -> Stored<'_> {
    match moment {
        Some(Moment { values, scales: Some(scales), .. }) => {
            let codes = Chunks::new(slice_mut(values), CHUNK);
            ((None, None), Some((codes, Chunks::new(slice_mut(scales), CHUNK / BLOCK))))
        }
        Some(moment) => (floats(Some(&mut moment.values)), None),
        None => ((None, None), None),
    }
}

/// A chunk of numbers in one of the storages.
enum Part<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [Bf16]),
    Block8 { codes: &'a mut [u8], scales: &'a mut [f32], book: &'static Book, least: u8 },
    Absent,
}

impl<'a> Part<'a> {
    fn of(floats: (Option<&'a mut [f32]>, Option<&'a mut [Bf16]>)) -> Self {
        match floats {
            (Some(part), _) => Self::F32(part),
            (_, Some(part)) => Self::Bf16(part),
            _ => Self::Absent,
        }
    }

    fn of_moment(
        (floats, codes): ((Option<&'a mut [f32]>, Option<&'a mut [Bf16]>), Option<(&'a mut [u8], &'a mut [f32])>),
        kind: Codes,
    ) -> Self {
        let least = u8::from(kind == Codes::Unsigned);
        match codes {
            Some((codes, scales)) => Self::Block8 { codes, scales, book: Book::of(kind), least },
            None => Self::of(floats),
        }
    }

    /// Block `block` of the chunk as f32: itself, or read into `buffer` (0 where there is nothing to read).
    fn open<'b>(&'b mut self, block: usize, len: usize, buffer: &'b mut [f32; BLOCK]) -> &'b mut [f32] {
        let at = block * BLOCK..block * BLOCK + len;
        let buffer = &mut buffer[..len];
        match self {
            Self::F32(part) => return &mut part[at],
            Self::Bf16(part) => widen(&part[at], buffer),
            Self::Block8 { codes, scales, book, .. } => decode(&codes[at], scales[block], &book.codes, buffer),
            Self::Absent => buffer.fill(0.0),
        }
        buffer
    }

    /// Writes back what `open` had read.
    fn close(&mut self, block: usize, len: usize, buffer: &[f32; BLOCK]) {
        let at = block * BLOCK..block * BLOCK + len;
        match self {
            Self::Bf16(part) => narrow(&buffer[..len], &mut part[at]),
            Self::Block8 { codes, scales, book, least } => {
                scales[block] = encode(&buffer[..len], book, *least, &mut codes[at]);
            }
            Self::F32(_) | Self::Absent => {}
        }
    }
}

/// Calls `update(weights, gradient, first, second)` for each block as f32, and stores what it left there.
fn blocks(
    weights: &mut Tensor,
    grad: &Tensor,
    first: Option<&mut Moment>,
    second: Option<&mut Moment>,
    extras: Extras,
    update: impl Fn(&mut [f32], &[f32], &mut [f32], &mut [f32]) + Sync,
) {
    if extras.skip.is_some_and(|skip| slice::<f32>(skip)[0] != 0.0) {
        return;
    }
    let len = weights.numel();
    let (wide, half) = match grad.kind() {
        Kind::Float => (Some(slice::<f32>(grad)), None),
        _ => (None, Some(slice::<Bf16>(grad))),
    };
    let outputs = (floats(Some(weights)), stored(first), stored(second), floats(extras.copy));
    parallel::for_outputs(outputs, 4, |chunk, (w, m, v, copy)| {
        let mut w = Part::of(w);
        let (mut m, mut v) = (Part::of_moment(m, Codes::Signed), Part::of_moment(v, Codes::Unsigned));
        let mut buffers = [[0.0f32; BLOCK]; 4];
        let [w_buffer, g_buffer, m_buffer, v_buffer] = &mut buffers;
        let mut copy = copy.1;
        for (block, at) in (chunk * CHUNK..len.min((chunk + 1) * CHUNK)).step_by(BLOCK).enumerate() {
            let count = BLOCK.min(len - at);
            let g = match (wide, half) {
                (Some(wide), _) => &wide[at..at + count],
                (_, Some(half)) => {
                    widen(&half[at..at + count], &mut g_buffer[..count]);
                    &g_buffer[..count]
                }
                _ => &[],
            };
            let open = w.open(block, count, w_buffer);
            update(open, g, m.open(block, count, m_buffer), v.open(block, count, v_buffer));
            if let Some(copy) = &mut copy {
                narrow(open, &mut copy[block * BLOCK..block * BLOCK + count]);
            }
            w.close(block, count, w_buffer);
            m.close(block, count, m_buffer);
            v.close(block, count, v_buffer);
        }
    });
}

vectorised! {
    fn widen(x: &[Bf16], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x.get();
        }
    }

    fn narrow(x: &[f32], out: &mut [Bf16]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = Bf16::put(*x);
        }
    }

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

/// The step by plain tensor operations, for devices without kernels.
fn plain_adamw(
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

fn plain_sgd(weights: &mut Tensor, grad: &Tensor, first: Option<&mut Moment>, sgd: &Sgd, extras: Extras) {
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
                        plain_adamw(&mut plain, &grad, &mut b.0, &mut b.1, &by, with(two));
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
                    plain_sgd(&mut two, &grad, Some(&mut n), &by, Extras::default());
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
