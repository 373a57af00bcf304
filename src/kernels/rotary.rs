//! Rotary position embedding (arXiv 2104.09864), half-split layout as in Hugging Face models.

use tch::{Kind, Tensor};

use super::cuda;
use super::real::{Real, grain, on_cpu, vectorised};
use crate::abi::parallel;
use crate::abi::slices::{slice, slice_mut};

/// Turns the first `heads` heads of every row, in place: features i and i + half of a head by the row's i-th angle.
///
/// `x: [rows, width]` with `width >= heads * head_dim`, contiguous; `cos, sin: [rows, half]` f32 with `2 * half <= head_dim`
/// (features past `2 * half` stay). `inverse` turns back, which is also the gradient.
pub fn rotate(x: &mut Tensor, heads: i64, head_dim: i64, cos: &Tensor, sin: &Tensor, inverse: bool) {
    let (rows, width) = (x.size()[0] as usize, x.size()[1] as usize);
    let half = cos.size()[1];
    assert!(heads * head_dim <= width as i64 && 2 * half <= head_dim, "invariant: the heads lie inside the row");
    if let Some(on) = cuda::launcher(x) {
        return cuda::rotary::rotate(on, x, heads, head_dim, cos, sin, inverse);
    }
    let fused = on_cpu!(x, T => {
        let (cos, sin) = (slice::<f32>(cos), slice::<f32>(sin));
        let (half, head_dim, heads) = (half as usize, head_dim as usize, heads as usize);
        let sign = if inverse { -1.0 } else { 1.0 };
        parallel::for_chunks(slice_mut::<T>(x), width, grain(width), |row, values| {
            let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
            for head in values.chunks_mut(head_dim).take(heads) {
                let (first, rest) = head.split_at_mut(half);
                rotate_head(first, &mut rest[..half], cos, sin, sign);
            }
        });
    });
    if fused.is_none() {
        let heads_view = x.narrow(1, 0, heads * head_dim).view([rows as i64, heads, head_dim]);
        let (mut a, mut b) = (heads_view.narrow(2, 0, half), heads_view.narrow(2, half, half));
        let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1) * if inverse { -1.0 } else { 1.0 });
        let (wide_a, wide_b) = (a.to_kind(Kind::Float), b.to_kind(Kind::Float));
        a.copy_(&(&wide_a * &cos - &wide_b * &sin));
        b.copy_(&(wide_b * cos + wide_a * sin));
    }
}

vectorised! {
    fn rotate_head<T: Real>(first: &mut [T], second: &mut [T], cos: &[f32], sin: &[f32], sign: f32) {
        let half = first.len();
        let (second, cos, sin) = (&mut second[..half], &cos[..half], &sin[..half]);
        for i in 0..half {
            let (a, b, c, s) = (first[i].get(), second[i].get(), cos[i], sin[i] * sign);
            first[i] = T::put(a * c - b * s);
            second[i] = T::put(b * c + a * s);
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn it_is_a_rotation_and_turns_back() {
        tch::manual_seed(3);
        let options = (Kind::Float, Device::Cpu);
        let (rows, heads, head_dim, half) = (9, 3, 10, 4);
        let x = Tensor::randn([rows, 40], options);
        let angle = Tensor::rand([rows, half], options) * 6.0;
        let mut turned = x.copy();
        rotate(&mut turned, heads, head_dim, &angle.cos(), &angle.sin(), false);

        // as complex numbers: (a + ib) e^{i angle}; everything past the rotated features is untouched
        for row in 0..rows {
            for head in 0..heads {
                for i in 0..half {
                    let at = |t: &Tensor, j: i64| t.double_value(&[row, head * head_dim + j]);
                    let (a, b, phi) = (at(&x, i), at(&x, i + half), angle.double_value(&[row, i]));
                    assert!((at(&turned, i) - (a * phi.cos() - b * phi.sin())).abs() < 1e-6);
                    assert!((at(&turned, i + half) - (a * phi.sin() + b * phi.cos())).abs() < 1e-6);
                    assert_eq!(at(&turned, 8), at(&x, 8));
                }
            }
        }
        assert!(turned.narrow(1, 30, 10).equal(&x.narrow(1, 30, 10)));
        rotate(&mut turned, heads, head_dim, &angle.cos(), &angle.sin(), true);
        assert!(f64::try_from((turned - x).abs().max()).unwrap() < 1e-6);
    }
}
