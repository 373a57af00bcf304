//! Sums over a whole buffer.

use std::sync::Mutex;

use tch::{Kind, Tensor};

use super::cuda;
use super::real::{Real, on_cpu, vectorised};
use crate::abi::parallel;
use crate::abi::slices::slice;

/// Sum of the squares of a contiguous f32 or bf16 tensor, added up in f64 over fixed blocks: the same for any number of
/// threads. `[1]` f64 on the tensor's device; nobody waits.
pub fn sum_of_squares(x: &Tensor) -> Tensor {
    if let Some(on) = cuda::launcher(x) {
        return cuda::reduce::sum_of_squares(on, x).view([1]);
    }
    on_cpu!(x, T => Tensor::from_slice(&[sum::<T>(slice(x))]))
        .unwrap_or_else(|| x.to_kind(Kind::Double).square().sum(Kind::Double).view([1]))
}

fn sum<T: Real>(values: &[T]) -> f64 {
    const BLOCK: usize = 1 << 16;
    let blocks = Mutex::new(vec![0.0; values.len().div_ceil(BLOCK)]);
    parallel::for_range(values.len().div_ceil(BLOCK), 1, &|range| {
        for block in range {
            let end = ((block + 1) * BLOCK).min(values.len());
            let sum = squares(&values[block * BLOCK..end]);
            blocks.lock().expect("invariant: no panic inside a kernel")[block] = sum;
        }
    });
    blocks.into_inner().expect("invariant: no panic inside a kernel").iter().sum()
}

vectorised! {
    fn squares<T: Real>(x: &[T]) -> f64 {
        let square = |x: &T| f64::from(x.get()) * f64::from(x.get());
        let mut lanes = [0.0f64; 8];
        let mut chunks = x.chunks_exact(8);
        for chunk in &mut chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += square(x);
            }
        }
        let rest: f64 = chunks.remainder().iter().map(square).sum();
        lanes.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn small_terms_are_not_lost() {
        let n = 3_000_001;
        let x = Tensor::full([n], 1e-4, (Kind::Float, Device::Cpu));
        let square = f64::from(1e-4f32) * f64::from(1e-4f32);
        let sum = |x: &Tensor| sum_of_squares(x).double_value(&[0]);
        assert!((sum(&x) / (square * n as f64) - 1.0).abs() < 1e-12);
        assert_eq!(sum(&x.narrow(0, 0, 0)), 0.0);
        let half = x.to_kind(Kind::BFloat16);
        let square = half.double_value(&[0]).powi(2);
        assert!((sum(&half) / (square * n as f64) - 1.0).abs() < 1e-12);
    }
}
