//! Operators that tch hides, for tests to compare with, called through libtorch's C dispatcher (`torch/csrc/stable/c/shim.h`, stable since 2.10).
//!
//! Arguments and results are 64-bit words: a tensor or list is a handle that the callee takes, an integer or bool its
//! value, a float the bits of an f64, an absent optional 0.

use std::ffi::{CString, c_char, c_void};

use tch::{Kind, Tensor};

type Handle = *mut c_void;

unsafe extern "C" {
    fn aoti_torch_abi_version() -> u64;
    fn aoti_torch_new_tensor_handle(tensor: Handle, out: *mut Handle) -> i32;
    fn torch_call_dispatcher(op: *const c_char, overload: *const c_char, stack: *mut u64, version: u64) -> i32;
    fn torch_new_list_reserve_size(size: usize, out: *mut Handle) -> i32;
    fn torch_list_push_back(list: Handle, item: u64) -> i32;
    #[link_name = "_Znwm"]
    fn operator_new(bytes: usize) -> *mut u64;
}

/// AdamW's numbers for one call of [`fused_adamw`].
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub eps: f64,
}

/// One AdamW step in place on lists of f32 tensors: `aten::_fused_adamw_`.
///
/// `params, grads, first, second`: same shapes pairwise. `steps`: one f32 scalar each, the number of this step (from 1).
/// `grad_scale`: f32 scalar that gradients are divided by.
pub fn fused_adamw(
    params: &[Tensor],
    grads: &[Tensor],
    first: &[Tensor],
    second: &[Tensor],
    steps: &[Tensor],
    grad_scale: Option<&Tensor>,
    adamw: AdamW,
) {
    let good = |list: &[Tensor]| {
        let fits = |(t, like): (&Tensor, &Tensor)| {
            t.size() == like.size() && t.kind() == Kind::Float && t.is_contiguous() && t.device() == like.device()
        };
        list.len() == params.len() && list.iter().zip(params).all(fits)
    };
    assert!([params, grads, first, second].into_iter().all(good), "invariant: contiguous f32 tensors of equal shapes");
    let scalar = |t: &Tensor| t.numel() == 1 && t.kind() == Kind::Float;
    assert!(steps.len() == params.len() && steps.iter().chain(grad_scale).all(scalar), "invariant: f32 scalars");
    let float = |x: f64| x.to_bits();
    let scale = grad_scale.map_or(0, |scale| some(handle(scale)));
    let mut stack = [
        list(params),
        list(grads),
        list(first),
        list(second),
        list(&[]),
        list(steps),
        float(adamw.lr),
        float(adamw.beta1),
        float(adamw.beta2),
        float(adamw.weight_decay),
        float(adamw.eps),
        0, // amsgrad
        0, // maximize
        scale,
        0, // found_inf
    ];
    call("aten::_fused_adamw_", &mut stack);
}

/// Panics when the operator refuses; libtorch has then written its reason to standard error.
fn call(op: &str, stack: &mut [u64]) {
    let name = CString::new(op).expect("invariant: no zero byte in an operator's name");
    // SAFETY: the stack holds the operator's arguments in schema order, as each caller in this file sees to.
    let code =
        unsafe { torch_call_dispatcher(name.as_ptr(), c"".as_ptr(), stack.as_mut_ptr(), aoti_torch_abi_version()) };
    assert_eq!(code, 0, "invariant: {op} accepts its arguments");
}

/// A new handle of the same tensor, for the callee to take.
fn handle(tensor: &Tensor) -> u64 {
    let mut out = std::ptr::null_mut();
    // SAFETY: a tch tensor's pointer is an `at::Tensor*`, which is what a tensor handle is.
    let code = unsafe { aoti_torch_new_tensor_handle(tensor.as_ptr().cast_mut().cast(), &raw mut out) };
    assert_eq!(code, 0, "invariant: a tensor can be copied as a handle");
    out as u64
}

fn list(tensors: &[Tensor]) -> u64 {
    let mut out = std::ptr::null_mut();
    // SAFETY: the list is created here and owned by the callee; every pushed handle is owned by the list.
    unsafe {
        assert_eq!(torch_new_list_reserve_size(tensors.len(), &raw mut out), 0, "invariant: a list can be created");
        for tensor in tensors {
            assert_eq!(torch_list_push_back(out, handle(tensor)), 0, "invariant: a list takes a tensor");
        }
    }
    out as u64
}

/// A present optional: a cell from C++'s `operator new`, freed by libtorch.
fn some(word: u64) -> u64 {
    // SAFETY: the cell is 8 bytes, written before it is read, and its ownership goes to libtorch.
    unsafe {
        let cell = operator_new(8);
        cell.write(word);
        cell as u64
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn fused_adamw_follows_its_formula() {
        let options = (Kind::Float, Device::Cpu);
        let (p, g) = (Tensor::from_slice(&[1.0f32, -2.0, 0.5]), Tensor::from_slice(&[0.2f32, -0.4, 0.0]));
        let (m, v) = (Tensor::zeros([3], options), Tensor::zeros([3], options));
        let scale = Tensor::from(2.0f32);
        let adamw = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, weight_decay: 0.5, eps: 1e-8 };
        let (mut m0, mut v0) = ([0.0f64; 3], [0.0f64; 3]);
        let mut want = [1.0f64, -2.0, 0.5];
        for step in 1..=3 {
            // the fused kernel divides the gradients in place
            let (p, grads) = ([p.shallow_clone()], [g.copy()]);
            let (m, v) = ([m.shallow_clone()], [v.shallow_clone()]);
            fused_adamw(&p, &grads, &m, &v, &[Tensor::from(step as f32)], Some(&scale), adamw);
            for (i, g) in [0.1f64, -0.2, 0.0].iter().enumerate() {
                m0[i] = 0.9 * m0[i] + 0.1 * g;
                v0[i] = 0.99 * v0[i] + 0.01 * g * g;
                let (mh, vh) = (m0[i] / (1.0 - 0.9f64.powi(step)), v0[i] / (1.0 - 0.99f64.powi(step)));
                want[i] = want[i] * (1.0 - 0.1 * 0.5) - 0.1 * mh / (vh.sqrt() + 1e-8);
            }
        }
        for (i, want) in want.iter().enumerate() {
            assert!((p.double_value(&[i as i64]) - want).abs() < 1e-6, "{i}");
        }
    }
}
