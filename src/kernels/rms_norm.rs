//! RMS normalisation of rows: `y = x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467).

use tch::{Kind, Tensor};

use super::cuda;
use super::real::{Real, grain, on_cpu, sum, vectorised};
use crate::abi::parallel;
use crate::abi::slices::{slice, slice_mut};

/// Normalises rows.
///
/// `x: [rows, width]`, `weight: [width]` of the same kind. Gives `y: [rows, width]` and `1/rms: [rows]` f32.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    if let Some(on) = cuda::launcher(x) {
        return cuda::rms_norm::forward(on, x, weight, eps);
    }
    let rms = rstd(x, eps);
    (apply(x, weight, &rms), rms)
}

/// `x` normalised with `1/rms` already known.
pub fn apply(x: &Tensor, weight: &Tensor, rstd: &Tensor) -> Tensor {
    if let Some(on) = cuda::launcher(x) {
        return cuda::rms_norm::apply(on, x, weight, rstd);
    }
    let width = x.size()[1] as usize;
    let x = x.contiguous();
    let fused = on_cpu!(x, T => {
        let mut y = x.empty_like();
        let (input, weight, rstd) = (slice::<T>(&x), slice::<T>(weight), slice::<f32>(rstd));
        parallel::for_chunks(slice_mut::<T>(&mut y), width, grain(width), |row, out| {
            scale_row(&input[row * width..][..width], weight, rstd[row], out);
        });
        y
    });
    fused.unwrap_or_else(|| {
        let scaled = x.to_kind(Kind::Float) * rstd.unsqueeze(1);
        (scaled * weight.to_kind(Kind::Float)).to_kind(x.kind())
    })
}

/// Adds the gradient of the rows to `grad` and gives the gradient of the weight.
///
/// With `g = dy * weight` and `n = x * rstd`: `dx = rstd * (g - n * mean(g * n))`, `dweight = sum over rows of dy * n`.
/// `dy, x: [rows, width]`, `grad: [rows, width]` accumulated in its own kind; the result is `[width]` f32.
pub fn backward(grad: &mut Tensor, dy: &Tensor, x: &Tensor, weight: &Tensor, rstd: &Tensor) -> Tensor {
    if let Some(on) = cuda::launcher(x).filter(|_| cuda::rms_norm::takes_backward(x.size()[1])) {
        return cuda::rms_norm::backward(on, grad, dy, x, weight, rstd);
    }
    let (rows, width) = (x.size()[0] as usize, x.size()[1] as usize);
    let (x, dy) = (x.contiguous(), dy.contiguous());
    let fused = on_cpu!(x, T => {
        let (dy, input) = (slice::<T>(&dy), slice::<T>(&x));
        let (weight, rstd) = (slice::<T>(weight), slice::<f32>(rstd));
        // Partial weight gradients over fixed blocks of rows: the sum does not depend on the number of threads.
        const BLOCK: usize = 64;
        let mut partial = Tensor::zeros([rows.div_ceil(BLOCK) as i64, width as i64], (Kind::Float, x.device()));
        let (grad, partials) = (slice_mut::<T>(grad), slice_mut::<f32>(&mut partial));
        parallel::for_chunks2((grad, BLOCK * width), (partials, width), 1, |block, out, dweight| {
            for (i, out) in out.chunks_mut(width).enumerate() {
                let row = block * BLOCK + i;
                let at = row * width..(row + 1) * width;
                backward_row(&dy[at.clone()], &input[at], weight, rstd[row], out, dweight);
            }
        });
        partial.sum_dim_intlist(0i64, false, Kind::Float)
    });
    fused.unwrap_or_else(|| {
        let (x, dy) = (x.to_kind(Kind::Float), dy.to_kind(Kind::Float));
        let n = &x * rstd.unsqueeze(1);
        let g = &dy * weight.to_kind(Kind::Float);
        let mean = (&g * &n).mean_dim(-1i64, true, Kind::Float);
        let dx = (&g - &n * mean) * rstd.unsqueeze(1);
        let _ = grad.g_add_(&dx.to_kind(grad.kind()));
        (dy * n).sum_dim_intlist(0i64, false, Kind::Float)
    })
}

/// `1 / sqrt(mean of squares + eps)` of each row, f32.
fn rstd(x: &Tensor, eps: f64) -> Tensor {
    let (rows, width) = (x.size()[0] as usize, x.size()[1] as usize);
    let x = x.contiguous();
    let fused = on_cpu!(x, T => {
        let mut result = Tensor::empty([rows as i64], (Kind::Float, x.device()));
        let input = slice::<T>(&x);
        parallel::for_chunks(slice_mut::<f32>(&mut result), 1, grain(width), |row, out| {
            out[0] = rstd_row(&input[row * width..][..width], eps as f32);
        });
        result
    });
    fused.unwrap_or_else(|| {
        let squares = x.to_kind(Kind::Float).square().mean_dim(-1i64, false, Kind::Float);
        (squares + eps).rsqrt()
    })
}

vectorised! {
    fn rstd_row<T: Real>(x: &[T], eps: f32) -> f32 {
        let squares = sum(x.len(), |i| x[i].get() * x[i].get());
        1.0 / (squares / x.len() as f32 + eps).sqrt()
    }

    fn scale_row<T: Real>(x: &[T], weight: &[T], rstd: f32, out: &mut [T]) {
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = T::put(x.get() * rstd * weight.get());
        }
    }

    fn backward_row<T: Real>(dy: &[T], x: &[T], weight: &[T], rstd: f32, grad: &mut [T], dweight: &mut [f32]) {
        let width = grad.len();
        let (dy, x, weight, dweight) = (&dy[..width], &x[..width], &weight[..width], &mut dweight[..width]);
        let dot = sum(width, |i| dy[i].get() * weight[i].get() * x[i].get()) * rstd / width as f32;
        for i in 0..width {
            let n = x[i].get() * rstd;
            let g = dy[i].get();
            grad[i] = T::put(grad[i].get() + rstd * (g * weight[i].get() - n * dot));
            dweight[i] += g * n;
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn close(a: &Tensor, b: &Tensor, tolerance: f64) {
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        let error = f64::try_from((&a - &b).abs().max()).unwrap() / f64::try_from(b.abs().max()).unwrap();
        assert!(error < tolerance, "relative error {error:e}");
    }

    /// Values, row gradients and weight gradients against autograd on plain tensors, in both kinds.
    #[test]
    fn forward_and_backward_match_autograd() {
        tch::manual_seed(1);
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2), (Kind::Double, 2e-6)] {
            for (rows, width) in [(3, 40), (130, 64), (1, 7)] {
                let options = (Kind::Float, Device::Cpu);
                let x = Tensor::randn([rows, width], options).to_kind(kind);
                let w = (Tensor::rand([width], options) + 0.5).to_kind(kind);
                let dy = Tensor::randn([rows, width], options).to_kind(kind);
                let before = Tensor::randn([rows, width], options).to_kind(kind);

                let (y, rstd) = forward(&x, &w, 1e-5);
                let mut grad = before.copy();
                let dw = backward(&mut grad, &dy, &x, &w, &rstd);

                let xd = x.to_kind(Kind::Double).set_requires_grad(true);
                let wd = w.to_kind(Kind::Double).set_requires_grad(true);
                let rms = (xd.square().mean_dim(-1i64, true, Kind::Double) + 1e-5).rsqrt();
                let yd = &xd * rms * &wd;
                let loss = (&yd * dy.to_kind(Kind::Double)).sum(Kind::Double);
                let grads = Tensor::run_backward(&[loss], &[&xd, &wd], false, false);
                close(&y, &yd.detach(), tolerance);
                close(&grad, &(&grads[0] + before.to_kind(Kind::Double)), tolerance);
                close(&dw, &grads[1], tolerance);
            }
        }
    }
}
