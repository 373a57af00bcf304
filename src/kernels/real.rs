//! Numbers that kernels read and write: f32 and bf16, computed in f32.

use crate::abi::slices::{Bf16, Element};

/// Storage of a kernel's tensors.
pub(super) trait Real: Element {
    fn get(self) -> f32;
    fn put(value: f32) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }

    #[inline(always)]
    fn put(value: f32) -> Self {
        value
    }
}

impl Real for Bf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn put(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Width of the partial sums that let the compiler use vector registers; the order of additions is fixed by it.
pub(super) const LANES: usize = 16;

/// Sum of `term(i)` over `0..len` in a fixed order.
#[inline(always)]
pub(super) fn sum(len: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = len - len % LANES;
    let mut at = 0;
    while at < whole {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(at + lane);
        }
        at += LANES;
    }
    let mut total = 0.0;
    for lane in lanes {
        total += lane;
    }
    for i in whole..len {
        total += term(i);
    }
    total
}

/// e to the power `x`, within 2 units in the last place; `x` below -87.3 gives about 1e-38, NaN stays NaN.
///
/// Branch-free, so that loops over it become vector code: 2^n from the exponent bits, the rest by a polynomial of degree 7.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let power = (shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    f32::from_bits(power) * p
}

/// Rows that one thread takes at least, so that small tensors stay on one thread.
pub(super) fn grain(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Calls `$body` with `$T` bound to the Rust type of `$tensor`'s elements, or gives None for other kinds and devices.
macro_rules! on_cpu {
    ($tensor:expr, $T:ident => $body:expr) => {
        match ($tensor.device(), $tensor.kind()) {
            (tch::Device::Cpu, tch::Kind::Float) => {
                type $T = f32;
                Some($body)
            }
            (tch::Device::Cpu, tch::Kind::BFloat16) => {
                type $T = $crate::abi::slices::Bf16;
                Some($body)
            }
            _ => None,
        }
    };
}
pub(super) use on_cpu;

/// Compiles functions for several instruction sets and picks one at run time.
macro_rules! vectorised {
    ($($function:item)*) => {
        $(
            #[multiversion::multiversion(targets(
                "x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma",
                "x86_64+avx2+fma",
            ))]
            $function
        )*
    };
}
pub(super) use vectorised;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / want - 1.0).abs());
        }
        assert!(worst < 2.4e-7, "{worst:e}");
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sums_of_any_length() {
        for len in [0, 1, 15, 16, 17, 100] {
            assert_eq!(sum(len, |i| i as f32), (0..len).map(|i| i as f32).sum::<f32>());
        }
    }
}
