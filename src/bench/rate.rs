//! The machine's matrix-product rate.

use std::time::Instant;

use tch::{Device, Kind, Tensor};

/// Floating-point operations a second of one product of two square matrices, best of several.
pub fn matrix_rate(kind: Kind) -> f64 {
    let size = 2048;
    let options = (Kind::Float, Device::Cpu);
    let (a, b) =
        (Tensor::randn([size, size], options).to_kind(kind), Tensor::randn([size, size], options).to_kind(kind));
    let out = Tensor::empty([size, size], (kind, Device::Cpu));
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let start = Instant::now();
        let _ = a.mm_out(&out, &b);
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (size as f64).powi(3) / best
}
