//! Host side of `rotary.cu`.

use tch::Tensor;

use super::{Launcher, lengths, size, threads};
use crate::abi::module::Grid;

pub(in crate::kernels) fn rotate(
    on: &Launcher,
    x: &mut Tensor,
    heads: i64,
    head_dim: i64,
    cos: &Tensor,
    sin: &Tensor,
    inverse: bool,
) {
    let (rows, width) = size(x);
    let half = cos.size()[1];
    lengths([(cos, rows * half as usize), (sin, rows * half as usize)]);
    if rows == 0 || heads == 0 || half == 0 {
        return;
    }
    let grid = Grid { blocks: rows, threads: threads((heads * half) as usize, 512), shared: 0 };
    let sign = if inverse { -1.0f32 } else { 1.0 };
    let arguments = [
        (&*x).into(),
        cos.into(),
        sin.into(),
        (width as i64).into(),
        heads.into(),
        head_dim.into(),
        half.into(),
        sign.into(),
    ];
    on.launch("rotary<T>", &[x.kind()], grid, &arguments);
}
