//! The gated activation `silu(gate) * up` (arXiv 2002.05202) on rows that hold gate and up side by side.

use tch::{Kind, Tensor};

use super::cuda;
use super::real::{Real, exp, grain, on_cpu, vectorised};
use crate::abi::parallel;
use crate::abi::slices::{slice, slice_mut};

/// `gate_up: [rows, 2 * width]` (gate first) to `[rows, width]`.
pub fn forward(gate_up: &Tensor) -> Tensor {
    if let Some(on) = cuda::launcher(gate_up) {
        return cuda::swiglu::forward(on, gate_up);
    }
    let (rows, width) = (gate_up.size()[0], gate_up.size()[1] / 2);
    let fused = on_cpu!(gate_up, T => {
        let mut out = Tensor::empty([rows, width], (gate_up.kind(), gate_up.device()));
        let (input, width) = (slice::<T>(gate_up), width as usize);
        parallel::for_chunks(slice_mut::<T>(&mut out), width, grain(width), |row, out| {
            let (gate, up) = input[row * 2 * width..][..2 * width].split_at(width);
            forward_row(gate, up, out);
        });
        out
    });
    fused.unwrap_or_else(|| {
        let wide = gate_up.to_kind(Kind::Float);
        (wide.narrow(1, 0, width).silu() * wide.narrow(1, width, width)).to_kind(gate_up.kind())
    })
}

/// The gradient of gate and up, and the activation again.
///
/// `grad: [rows, width]` to `(d_gate_up: [rows, 2 * width], activation: [rows, width])`.
pub fn backward(grad: &Tensor, gate_up: &Tensor) -> (Tensor, Tensor) {
    let width = gate_up.size()[1] / 2;
    let grad = grad.contiguous();
    if let Some(on) = cuda::launcher(gate_up) {
        return cuda::swiglu::backward(on, &grad, gate_up);
    }
    let fused = on_cpu!(gate_up, T => {
        let mut d_gate_up = gate_up.empty_like();
        let mut activation = grad.empty_like();
        let (grad, input, width) = (slice::<T>(&grad), slice::<T>(gate_up), width as usize);
        let (d_out, a_out) = (slice_mut::<T>(&mut d_gate_up), slice_mut::<T>(&mut activation));
        parallel::for_chunks2((d_out, 2 * width), (a_out, width), grain(width), |row, d_part, out| {
            let (gate, up) = input[row * 2 * width..][..2 * width].split_at(width);
            let (d_gate, d_up) = d_part.split_at_mut(width);
            backward_row(&grad[row * width..][..width], gate, up, d_gate, d_up, out);
        });
        (d_gate_up, activation)
    });
    fused.unwrap_or_else(|| {
        let (wide, grad) = (gate_up.to_kind(Kind::Float), grad.to_kind(Kind::Float));
        let (gate, up) = (wide.narrow(1, 0, width), wide.narrow(1, width, width));
        let sigmoid = gate.sigmoid();
        let silu = &gate * &sigmoid;
        let d_gate = &grad * &up * (&sigmoid + &silu - &silu * &sigmoid);
        let d_gate_up = Tensor::cat(&[d_gate, &grad * &silu], 1).to_kind(gate_up.kind());
        (d_gate_up, (silu * up).to_kind(gate_up.kind()))
    })
}

vectorised! {
    fn forward_row<T: Real>(gate: &[T], up: &[T], out: &mut [T]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = gate.get();
            *out = T::put(gate / (1.0 + exp(-gate)) * up.get());
        }
    }

    fn backward_row<T: Real>(grad: &[T], gate: &[T], up: &[T], d_gate: &mut [T], d_up: &mut [T], activation: &mut [T]) {
        let width = grad.len();
        let (gate, up) = (&gate[..width], &up[..width]);
        let (d_gate, d_up, activation) = (&mut d_gate[..width], &mut d_up[..width], &mut activation[..width]);
        for i in 0..width {
            let (g, z, u) = (grad[i].get(), gate[i].get(), up[i].get());
            let sigmoid = 1.0 / (1.0 + exp(-z));
            let silu = z * sigmoid;
            d_gate[i] = T::put(g * u * (sigmoid + silu - silu * sigmoid));
            d_up[i] = T::put(g * silu);
            activation[i] = T::put(silu * u);
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn forward_and_backward_match_autograd() {
        tch::manual_seed(2);
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2), (Kind::Double, 2e-6)] {
            for (rows, width) in [(5, 33), (200, 48)] {
                let options = (Kind::Float, Device::Cpu);
                let gate_up = (Tensor::randn([rows, 2 * width], options) * 3.0).to_kind(kind);
                let grad = Tensor::randn([rows, width], options).to_kind(kind);
                let (d_gate_up, activation) = backward(&grad, &gate_up);

                let wide = gate_up.to_kind(Kind::Double).set_requires_grad(true);
                let out = wide.narrow(1, 0, width).silu() * wide.narrow(1, width, width);
                let loss = (&out * grad.to_kind(Kind::Double)).sum(Kind::Double);
                let want = Tensor::run_backward(&[loss], &[&wide], false, false).remove(0);
                for (got, want) in [(&d_gate_up, &want), (&activation, &out), (&forward(&gate_up), &out)] {
                    let scale = f64::try_from(want.abs().max()).unwrap();
                    let error = f64::try_from((got.to_kind(Kind::Double) - want).abs().max()).unwrap() / scale;
                    assert!(error < tolerance, "{kind:?}: {error:e}");
                }
            }
        }
    }
}
