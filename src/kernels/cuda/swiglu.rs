//! Host side of `swiglu.cu`.

use tch::Tensor;

use super::{Launcher, lengths, size, threads};
use crate::abi::module::Grid;

pub(in crate::kernels) fn forward(on: &Launcher, gate_up: &Tensor) -> Tensor {
    let (rows, width) = size(gate_up);
    let width = width / 2;
    let out = on.empty(&[rows as i64, width as i64], gate_up.kind(), gate_up);
    if out.numel() > 0 {
        let grid = Grid { blocks: rows, threads: threads(width, 512), shared: 0 };
        let arguments = [gate_up.into(), (&out).into(), (width as i64).into()];
        on.launch("swiglu_forward<T>", &[gate_up.kind()], grid, &arguments);
    }
    out
}

pub(in crate::kernels) fn backward(on: &Launcher, grad: &Tensor, gate_up: &Tensor) -> (Tensor, Tensor) {
    let (rows, width) = size(grad);
    lengths([(gate_up, 2 * rows * width)]);
    let kind = gate_up.kind();
    let (d_gate_up, activation) = (on.empty(&gate_up.size(), kind, grad), on.empty(&grad.size(), kind, grad));
    if grad.numel() > 0 {
        let grid = Grid { blocks: rows, threads: threads(width, 512), shared: 0 };
        let arguments = [grad.into(), gate_up.into(), (&d_gate_up).into(), (&activation).into(), (width as i64).into()];
        on.launch("swiglu_backward<T>", &[kind], grid, &arguments);
    }
    (d_gate_up, activation)
}
