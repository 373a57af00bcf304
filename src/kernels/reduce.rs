//! Sums over a whole buffer.

use std::sync::Mutex;

use tch::{Device, Kind, Tensor};

use super::real::vectorised;
use crate::abi::parallel;
use crate::abi::slices::slice;

/// Sum of the squares of a contiguous tensor, added up in f64 over fixed blocks: the same for any number of threads.
///
/// `[1]` f64 on the tensor's device.
pub fn sum_of_squares(x: &Tensor) -> Tensor {
    if x.device() != Device::Cpu || x.kind() != Kind::Float {
        return x.to_kind(Kind::Float).square().sum(Kind::Double).view([1]);
    }
    const BLOCK: usize = 1 << 16;
    let values = slice::<f32>(x);
    let blocks = Mutex::new(vec![0.0; values.len().div_ceil(BLOCK)]);
    parallel::for_range(values.len().div_ceil(BLOCK), 1, &|range| {
        for block in range {
            let end = ((block + 1) * BLOCK).min(values.len());
            let sum = squares(&values[block * BLOCK..end]);
            blocks.lock().expect("invariant: no panic inside a kernel")[block] = sum;
        }
    });
    let total: f64 = blocks.into_inner().expect("invariant: no panic inside a kernel").iter().sum();
    Tensor::from_slice(&[total])
}

vectorised! {
    fn squares(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 8];
        let mut chunks = x.chunks_exact(8);
        for chunk in &mut chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(x) * f64::from(x);
            }
        }
        let rest: f64 = chunks.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        lanes.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_terms_are_not_lost() {
        let n = 3_000_001;
        let x = Tensor::full([n], 1e-4, (Kind::Float, Device::Cpu));
        let square = f64::from(1e-4f32) * f64::from(1e-4f32);
        assert!((sum_of_squares(&x).double_value(&[0]) / (square * n as f64) - 1.0).abs() < 1e-12);
        assert_eq!(sum_of_squares(&x.narrow(0, 0, 0)).double_value(&[0]), 0.0);
    }
}
