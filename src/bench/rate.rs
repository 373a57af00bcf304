//! The machine's matrix-product rate.

use std::time::Instant;

use tch::{Device, Kind, Tensor};

use crate::kernels::product::product_into;

/// Floating-point operations a second of one product, as the model multiplies, of two square matrices, best of several.
///
/// 2048 rows on a CPU; 8192 on a GPU, where smaller ones do not fill it.
pub fn matrix_rate(kind: Kind, device: Device) -> f64 {
    let size: i64 = if device == Device::Cpu { 2048 } else { 8192 };
    let random = || Tensor::randn([size, size], (Kind::Float, device)).to_kind(kind);
    let (a, b) = (random(), random());
    let out = Tensor::empty([size, size], (kind, device));
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        settle(device);
        let start = Instant::now();
        product_into(&out, &a, &b);
        settle(device);
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (size as f64).powi(3) / best
}

/// Waits until the device has done what it was given.
pub fn settle(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}
