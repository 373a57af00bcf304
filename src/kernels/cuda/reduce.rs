//! Host side of `reduce.cu`.

use tch::{Kind, Tensor};

use super::Launcher;
use crate::abi::module::Grid;

/// Elements of one partial sum.
const PART: usize = 1 << 16;

pub(in crate::kernels) fn sum_of_squares(on: &Launcher, x: &Tensor) -> Tensor {
    let parts = x.numel().div_ceil(PART);
    let out = on.empty(&[], Kind::Double, x);
    let partial = on.empty(&[parts as i64], Kind::Double, x);
    if parts > 0 {
        let arguments = [x.into(), (&partial).into(), (x.numel() as i64).into(), (PART as i64).into()];
        let grid = Grid { blocks: parts, threads: 256, shared: 0 };
        on.launch("sum_of_squares<T>", &[x.kind()], grid, &arguments);
    }
    let grid = Grid { blocks: 1, threads: 256, shared: 0 };
    on.launch("sum_doubles", &[], grid, &[(&partial).into(), (&out).into(), (parts as i64).into()]);
    out
}
