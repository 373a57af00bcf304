//! libtorch's CUDA half, loaded into a running process: one binary computes on CPUs and on GPUs.
//!
//! The binary is linked to `libtorch_cpu.so` alone. `libtorch_cuda.so` registers its kernels when it is loaded, which must
//! happen before libtorch is first asked about devices; its C functions are looked up afterwards.

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tch::Tensor;

use super::driver::Stream;
use super::library::{self, Library};

type Handle = *mut c_void;
type Status = i32;

struct Functions {
    pool_stream: unsafe extern "C" fn(bool, i32, *mut *mut c_void) -> Status,
    create_guard: unsafe extern "C" fn(i32, *mut *mut c_void) -> Status,
    flash_forward: FlashForward,
    flash_backward: FlashBackward,
}

type FlashForward = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    *const Handle,
    *const Handle,
    i64,
    i64,
    f64,
    i32,
    i32,
    *const f64,
    *const i64,
    *const i64,
    *const Handle,
    *const Handle,
    *mut Handle,
    *mut Handle,
    *mut Handle,
    *mut Handle,
    *mut Handle,
) -> Status;

type FlashBackward = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    i64,
    i64,
    f64,
    i32,
    Handle,
    Handle,
    *const f64,
    *const i64,
    *const i64,
    *mut Handle,
    *mut Handle,
    *mut Handle,
) -> Status;

static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();

/// Loads the library that lies beside the loaded `libtorch_cpu.so`; the second call gives the first one's answer.
///
/// # Errors
/// What the dynamic linker says, in one line, with the library's path.
pub fn load() -> Result<(), String> {
    FUNCTIONS.get_or_init(|| load_from(&folder().join("libtorch_cuda.so"))).as_ref().map(|_| ()).map_err(Clone::clone)
}

/// The folder of the loaded `libtorch_cpu.so`.
pub fn folder() -> PathBuf {
    library::folder_of("libtorch_cpu.so").unwrap_or_default()
}

unsafe extern "C" {
    fn aoti_torch_empty_strided_pinned(
        dims: i64,
        sizes: *const i64,
        strides: *const i64,
        dtype: i32,
        device_type: i32,
        device_index: i32,
        out: *mut Handle,
    ) -> Status;
}

fn load_from(path: &Path) -> Result<Functions, String> {
    let library = Library::open_global(path).map_err(|error| match error {
        library::Error::Open { reasons, .. } => {
            format!("{} cannot be loaded: {reasons}", path.file_name().unwrap_or_default().to_string_lossy())
        }
        error => error.to_string(),
    })?;
    let words = |error: library::Error| format!("{error}; expected libtorch 2.11");
    // SAFETY: the types are those of libtorch 2.11's headers (stable/c/shim.h, aoti_torch/c/shim.h, generated/c_shim_cuda.h); the
    // library stays open for the life of the process.
    unsafe {
        let functions = Functions {
            pool_stream: library.function("torch_get_cuda_stream_from_pool").map_err(words)?,
            create_guard: library.function("aoti_torch_create_cuda_guard").map_err(words)?,
            flash_forward: library.function("aoti_torch_cuda__flash_attention_forward").map_err(words)?,
            flash_backward: library.function("aoti_torch_cuda__flash_attention_backward").map_err(words)?,
        };
        std::mem::forget(library);
        Ok(functions)
    }
}

fn functions() -> &'static Functions {
    let loaded = FUNCTIONS.get().and_then(|loaded| loaded.as_ref().ok());
    loaded.expect("invariant: CUDA tensors exist only after libtorch_cuda was loaded")
}

/// Makes `device` the current one of this thread, for good.
pub fn set_device(device: usize) {
    let mut guard = std::ptr::null_mut();
    // SAFETY: one out parameter. The guard is never deleted, so the device stays current.
    let code = unsafe { (functions().create_guard)(device as i32, &raw mut guard) };
    assert_eq!(code, 0, "invariant: device {device} exists");
}

/// Another stream, for traffic beside the computation.
pub fn stream_from_pool(device: usize) -> Stream {
    let mut stream = std::ptr::null_mut();
    // SAFETY: one out parameter.
    let code = unsafe { (functions().pool_stream)(true, device as i32, &raw mut stream) };
    assert_eq!(code, 0, "invariant: libtorch has streams");
    // SAFETY: libtorch's pool streams are of the device's primary context and are never destroyed.
    unsafe { Stream::from_raw(stream, device) }
}

/// A CPU tensor of `bytes` u8 in page-locked memory, from which copies to a device run beside the host.
pub fn pinned(bytes: usize) -> Tensor {
    let mut out = std::ptr::null_mut();
    let (size, stride) = (bytes as i64, 1i64);
    // SAFETY: one dimension, u8 (scalar type 0), CPU (device type 0, index -1); the new handle is ours and is an `at::Tensor*`.
    unsafe {
        let code = aoti_torch_empty_strided_pinned(1, &raw const size, &raw const stride, 0, 0, -1, &raw mut out);
        assert_eq!(code, 0, "invariant: page-locked memory can be had where CUDA was loaded");
        Tensor::from_ptr(out.cast())
    }
}

/// Sequences that lie one after the other in packed rows.
pub struct Packed<'a> {
    /// First row of each sequence and the end of the last: `[sequences + 1]` i32 on the device.
    pub bounds: &'a Tensor,
    /// Rows of the longest sequence.
    pub longest: i64,
    /// Keys that a query sees, itself included; None: all before it.
    pub window: Option<i64>,
    pub scale: f64,
}

impl Packed<'_> {
    fn window(&self) -> (Option<i64>, Option<i64>) {
        // a causal kernel sees nothing to the right; `left` counts keys before the query
        self.window.map_or((None, None), |window| (Some(window - 1), Some(0)))
    }
}

/// What [`flash_forward`] leaves for [`flash_backward`].
pub struct FlashState {
    log_sums: Tensor,
    random: [Tensor; 2],
}

impl FlashState {
    /// Bytes of the log-sum-exps; what is left of random numbers is a few words.
    pub fn bytes(&self) -> usize {
        self.log_sums.numel() * self.log_sums.kind().elt_size_in_bytes()
    }
}

/// Causal attention inside each sequence: `aten::_flash_attention_forward`.
///
/// `q: [rows, heads, dim]`, `k, v: [rows, kv_heads, dim]` in bf16 or f16 with `dim` a multiple of 8 up to 256, last dimension
/// dense. Gives `[rows, heads, dim]`; rows behind the last sequence are undefined.
pub fn flash_forward(q: &Tensor, k: &Tensor, v: &Tensor, packed: &Packed) -> (Tensor, FlashState) {
    let bounds = handle(packed.bounds);
    let (left, right) = packed.window();
    let mut out = [std::ptr::null_mut(); 5];
    let [o, l, r, u, d] = &mut out;
    // SAFETY: tensor handles are `at::Tensor*` of living tensors; optionals are pointers to values or null; five results.
    let code = unsafe {
        (functions().flash_forward)(
            handle(q),
            handle(k),
            handle(v),
            &raw const bounds,
            &raw const bounds,
            packed.longest,
            packed.longest,
            0.0,
            1,
            0,
            &raw const packed.scale,
            optional(left.as_ref()),
            optional(right.as_ref()),
            std::ptr::null(),
            std::ptr::null(),
            o,
            l,
            r,
            u,
            d,
        )
    };
    assert_eq!(code, 0, "invariant: flash attention takes its arguments; libtorch has written its reason above");
    // SAFETY: new handles, owned by us.
    let [result, log_sums, random, unused, _debug] = out.map(|handle| unsafe { Tensor::from_ptr(handle.cast()) });
    (result, FlashState { log_sums, random: [random, unused] })
}

/// Gradients of q, k and v from that of the result: `aten::_flash_attention_backward`.
pub fn flash_backward(
    grad: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    state: &FlashState,
    packed: &Packed,
) -> [Tensor; 3] {
    let (left, right) = packed.window();
    let mut result = [std::ptr::null_mut(); 3];
    let [d_q, d_k, d_v] = &mut result;
    // SAFETY: as in `flash_forward`; three results.
    let code = unsafe {
        (functions().flash_backward)(
            handle(grad),
            handle(q),
            handle(k),
            handle(v),
            handle(out),
            handle(&state.log_sums),
            handle(packed.bounds),
            handle(packed.bounds),
            packed.longest,
            packed.longest,
            0.0,
            1,
            handle(&state.random[0]),
            handle(&state.random[1]),
            &raw const packed.scale,
            optional(left.as_ref()),
            optional(right.as_ref()),
            d_q,
            d_k,
            d_v,
        )
    };
    assert_eq!(code, 0, "invariant: flash attention takes its arguments; libtorch has written its reason above");
    // SAFETY: new handles, owned by us.
    result.map(|handle| unsafe { Tensor::from_ptr(handle.cast()) })
}

/// A tch tensor's pointer is an `at::Tensor*`, which is what a tensor handle is.
fn handle(tensor: &Tensor) -> Handle {
    tensor.as_ptr().cast_mut().cast()
}

fn optional<T>(value: Option<&T>) -> *const T {
    value.map_or(std::ptr::null(), std::ptr::from_ref)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_that_of_the_loaded_library() {
        assert!(folder().join("libtorch_cpu.so").exists(), "{}", folder().display());
    }

    #[test]
    fn a_library_that_is_not_there_is_told_with_its_path() {
        let text = load_from(Path::new("/nowhere/libtorch_cuda.so")).err().unwrap();
        assert!(text.starts_with("libtorch_cuda.so cannot be loaded: /nowhere/libtorch_cuda.so: "), "{text}");
        assert!(text.contains("No such file"), "{text}");
    }

    #[test]
    fn another_library_is_told_by_what_it_lacks() {
        let text = load_from(&folder().join("libc10.so")).err().unwrap();
        assert!(text.contains("libc10.so has no function torch_get_cuda_stream_from_pool"), "{text}");
    }
}
