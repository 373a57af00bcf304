//! Matrix products in the precision of their operands: `[m, k] x [k, n]`, or batches of them.
//!
//! libtorch multiplies bf16 on CPUs by oneDNN where the instructions are there (AVX-512, or bf16 on Arm), and otherwise in a loop of
//! one thread, an order of magnitude slower than f32. There the operands are widened, multiplied in f32, and the product is rounded
//! once: the numbers are those of the instructions but for the order of the sums. Costs a copy of the operands in f32.

use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

/// `a b`.
pub fn product(a: &Tensor, b: &Tensor) -> Tensor {
    if slow(a) { wide(a, b).to_kind(a.kind()) } else { a.matmul(b) }
}

/// `a b` into `out`.
pub fn product_into(out: &Tensor, a: &Tensor, b: &Tensor) {
    let mut target = out.shallow_clone();
    match (slow(a), a.dim()) {
        (true, _) => target.copy_(&wide(a, b)),
        (false, 2) => _ = a.mm_out(&target, b),
        (false, _) => _ = a.bmm_out(&target, b),
    }
}

/// Adds `a b` to the matrix `out`, which may be of a wider kind than the operands.
pub fn add_product(out: &mut Tensor, a: &Tensor, b: &Tensor) {
    match (slow(a), a.kind() == out.kind()) {
        (true, true) => {
            let sum = out.to_kind(Kind::Float).addmm_(&a.to_kind(Kind::Float), &b.to_kind(Kind::Float));
            out.copy_(&sum);
        }
        (true, false) => _ = out.addmm_(&a.to_kind(out.kind()), &b.to_kind(out.kind())),
        (false, true) => _ = out.addmm_(a, b),
        // a GPU's product leaves its f32 sums unrounded
        (false, false) if a.device() != Device::Cpu => _ = out.g_add_(&a.mm_dtype(b, out.kind())),
        (false, false) => _ = out.g_add_(&a.mm(b)),
    }
}

/// The matrix `a b` into `out`, which may be of a wider kind than the operands.
pub fn widened_product_into(out: &mut Tensor, a: &Tensor, b: &Tensor) {
    match (slow(a), a.kind() == out.kind()) {
        (true, false) => _ = a.to_kind(out.kind()).mm_out(out, &b.to_kind(out.kind())),
        (_, true) => product_into(out, a, b),
        (false, false) if a.device() != Device::Cpu => _ = a.mm_dtype_out(out, b, out.kind()),
        (false, false) => out.copy_(&a.mm(b)),
    }
}

/// Whether this machine multiplies bf16 on its CPUs by instructions for it.
pub fn has_bf16() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        // what libtorch asks before it gives a product to oneDNN
        #[cfg(target_arch = "x86_64")]
        return is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        #[cfg(target_arch = "aarch64")]
        return std::arch::is_aarch64_feature_detected!("bf16");
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        return false;
    })
}

fn slow(a: &Tensor) -> bool {
    a.kind() == Kind::BFloat16 && a.device() == Device::Cpu && !has_bf16()
}

fn wide(a: &Tensor, b: &Tensor) -> Tensor {
    a.to_kind(Kind::Float).matmul(&b.to_kind(Kind::Float))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every form, also of transposed operands, against f64 rounded once.
    #[test]
    fn every_form_is_the_product() {
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 8e-3)] {
            for (a, b) in [
                (random(&[5, 70]), random(&[70, 9])),
                (random(&[70, 5]).tr(), random(&[9, 70]).tr()),
                (random(&[3, 5, 70]), random(&[3, 9, 70]).transpose(1, 2)),
            ] {
                let (a, b) = (a.to_kind(kind), b.to_kind(kind));
                let want = a.to_kind(Kind::Double).matmul(&b.to_kind(Kind::Double));
                let near = |got: &Tensor, want: &Tensor| {
                    let off = f64::try_from((got.to_kind(Kind::Double) - want).abs().max() / want.abs().max()).unwrap();
                    assert!(off < tolerance, "{kind:?}: {off:e}");
                };
                let got = product(&a, &b);
                assert_eq!(got.kind(), kind);
                near(&got, &want);
                near(&wide(&a, &b), &want);
                let out = got.empty_like();
                product_into(&out, &a, &b);
                near(&out, &want);
                if a.dim() == 3 {
                    continue;
                }
                for out_kind in [kind, Kind::Float] {
                    let mut out = random(&[5, 9]).to_kind(out_kind);
                    let sum = out.to_kind(Kind::Double) + &want;
                    add_product(&mut out, &a, &b);
                    near(&out, &sum);
                    widened_product_into(&mut out, &a, &b);
                    near(&out, &want);
                }
            }
        }
    }
}
