//! Host side of `rms_norm.cu`.

use tch::{Kind, Tensor};

use super::{Launcher, lengths, size, threads};
use crate::abi::module::Grid;

/// Widest row that a warp takes alone.
const NARROW: usize = 512;
/// Dynamic shared memory that every device since compute capability 8.0 can give a block, in bytes.
const MOST_SHARED: usize = 96 << 10;

/// Whether rows belong to warps, threads of a block, and rows that a block has at a time.
fn layout(width: usize) -> (i64, usize, usize) {
    if width <= NARROW { (1, 256, 8) } else { (0, threads(width, 512), 1) }
}

pub(in crate::kernels) fn forward(on: &Launcher, x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let (rows, width) = size(x);
    lengths([(weight, width)]);
    let x = x.contiguous();
    let (y, rstd) = (on.empty(&x.size(), x.kind(), &x), on.empty(&[rows as i64], Kind::Float, &x));
    if x.numel() > 0 {
        let (narrow, threads, group) = layout(width);
        let grid = Grid { blocks: rows.div_ceil(group), threads, shared: 0 };
        let (rows, width) = ((rows as i64).into(), (width as i64).into());
        let arguments =
            [(&x).into(), weight.into(), (&y).into(), (&rstd).into(), rows, width, (eps as f32).into(), narrow.into()];
        on.launch("rms_norm_forward<T>", &[x.kind()], grid, &arguments);
    }
    (y, rstd)
}

pub(in crate::kernels) fn apply(on: &Launcher, x: &Tensor, weight: &Tensor, rstd: &Tensor) -> Tensor {
    let (rows, width) = size(x);
    lengths([(weight, width), (rstd, rows)]);
    let x = x.contiguous();
    let y = on.empty(&x.size(), x.kind(), &x);
    if x.numel() > 0 {
        let (narrow, threads, group) = layout(width);
        let grid = Grid { blocks: rows.div_ceil(group), threads, shared: 0 };
        let (rows, width) = ((rows as i64).into(), (width as i64).into());
        let arguments = [(&x).into(), weight.into(), (&y).into(), rstd.into(), rows, width, narrow.into()];
        on.launch("rms_norm_apply<T>", &[x.kind()], grid, &arguments);
    }
    y
}

/// Whether [`backward`] takes rows of this width.
pub(in crate::kernels) fn takes_backward(width: i64) -> bool {
    width as usize * size_of::<f32>() <= MOST_SHARED
}

pub(in crate::kernels) fn backward(
    on: &Launcher,
    grad: &mut Tensor,
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
) -> Tensor {
    let (rows, width) = size(x);
    if x.numel() == 0 {
        return Tensor::zeros([width as i64], (Kind::Float, x.device()));
    }
    lengths([(grad, rows * width), (dy, rows * width), (weight, width), (rstd, rows)]);
    let (x, dy) = (x.contiguous(), dy.contiguous());
    let (narrow, threads, group) = layout(width);
    // a fixed share of rows for each block, so that the sum does not depend on which block is first
    let block_rows = rows.div_ceil(512).max(16);
    let blocks = rows.div_ceil(block_rows);
    let partial = on.empty(&[blocks as i64, width as i64], Kind::Float, &x);
    let grid = Grid { blocks, threads, shared: group * width * size_of::<f32>() };
    let arguments = [
        (&*grad).into(),
        (&dy).into(),
        (&x).into(),
        weight.into(),
        rstd.into(),
        (&partial).into(),
        (rows as i64).into(),
        (width as i64).into(),
        (block_rows as i64).into(),
        narrow.into(),
    ];
    on.launch("rms_norm_backward<T>", &[x.kind()], grid, &arguments);
    let sums = on.empty(&[width as i64], Kind::Float, &x);
    let grid = Grid { blocks: width.div_ceil(32), threads: 1024, shared: 0 };
    on.launch(
        "column_sums",
        &[],
        grid,
        &[(&partial).into(), (&sums).into(), (blocks as i64).into(), (width as i64).into()],
    );
    sums
}
