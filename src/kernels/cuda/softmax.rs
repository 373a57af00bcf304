//! Host side of `softmax.cu`.

use tch::{Kind, Tensor};

use super::{Launcher, lengths, size, threads};
use crate::abi::module::{Argument, Grid};
use crate::kernels::softmax::STATISTICS;

/// Launches a kernel with a block for each row of logits and their width as its last argument.
fn launch(on: &Launcher, kernel: &str, logits: &Tensor, arguments: &[Argument]) {
    let (rows, width) = size(logits);
    if logits.numel() > 0 {
        let grid = Grid { blocks: rows, threads: threads(width, 1024), shared: 0 };
        let width = Argument::Int(width as i64);
        on.launch(kernel, &[logits.kind()], grid, &[arguments, &[width]].concat());
    }
}

pub(in crate::kernels) fn statistics(on: &Launcher, logits: &Tensor, target: &Tensor) -> Tensor {
    let out = on.empty(&[logits.size()[0], STATISTICS], Kind::Float, logits);
    lengths([(target, logits.size()[0] as usize)]);
    launch(on, "softmax_statistics<T>", logits, &[logits.into(), target.into(), (&out).into()]);
    out
}

pub(in crate::kernels) fn gradient(
    on: &Launcher,
    logits: &mut Tensor,
    log_sum: &Tensor,
    weight: &Tensor,
    target: &Tensor,
) {
    let (rows, _) = size(logits);
    lengths([(log_sum, rows), (weight, rows), (target, rows)]);
    let arguments = [(&*logits).into(), log_sum.into(), weight.into(), target.into()];
    launch(on, "softmax_gradient<T>", logits, &arguments);
}

pub(in crate::kernels) fn cross_difference(
    on: &Launcher,
    logits: &Tensor,
    reference: &Tensor,
    ref_log_sum: &Tensor,
) -> Tensor {
    let out = on.empty(&[logits.size()[0]], Kind::Float, logits);
    lengths([(reference, logits.numel()), (ref_log_sum, size(logits).0)]);
    let arguments = [logits.into(), reference.into(), ref_log_sum.into(), (&out).into()];
    launch(on, "softmax_cross_difference<T>", logits, &arguments);
    out
}

pub(in crate::kernels) fn divergence_gradient(
    on: &Launcher,
    logits: &mut Tensor,
    log_sum: &Tensor,
    reference: &Tensor,
    ref_log_sum: &Tensor,
    weight: &Tensor,
) {
    let (rows, width) = size(logits);
    lengths([(log_sum, rows), (reference, rows * width), (ref_log_sum, rows), (weight, rows)]);
    let arguments = [(&*logits).into(), log_sum.into(), reference.into(), ref_log_sum.into(), weight.into()];
    launch(on, "softmax_divergence_gradient<T>", logits, &arguments);
}
