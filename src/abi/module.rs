//! Kernels on a CUDA device: a loaded image, its functions, and launches with checked arguments.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_uint};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Tensor};

use super::driver::{Error, Handle, Result, Stream, api};
use super::nvrtc::Image;

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Argument<'a> {
    /// Address of a contiguous tensor's first element.
    Tensor(&'a Tensor),
    /// A null pointer, for an optional tensor.
    Absent,
    /// `long long`.
    Int(i64),
    /// `float`.
    Float(f32),
}

impl<'a> From<&'a Tensor> for Argument<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl<'a> From<Option<&'a Tensor>> for Argument<'a> {
    fn from(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Self::Absent, Self::Tensor)
    }
}

impl From<i64> for Argument<'_> {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<f32> for Argument<'_> {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

/// Size of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks, along x; at least 1, below 2^31.
    pub blocks: usize,
    /// Threads of a block, along x; at most 1024.
    pub threads: usize,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

/// Arguments as the driver wants them: each in a cell of 8 bytes. Panics on a tensor that is elsewhere or not contiguous.
pub(super) fn cells(arguments: &[Argument], device: Device) -> Vec<u64> {
    let cell = |argument: &Argument| match argument {
        Argument::Tensor(tensor) => {
            assert!(
                tensor.is_contiguous() && tensor.device() == device,
                "invariant: a contiguous tensor on {device:?}, got {:?} with strides {:?} on {:?}",
                tensor.size(),
                tensor.stride(),
                tensor.device()
            );
            tensor.data_ptr() as u64
        }
        Argument::Absent => 0,
        Argument::Int(value) => *value as u64,
        Argument::Float(value) => u64::from(value.to_bits()),
    };
    arguments.iter().map(cell).collect()
}

/// A function of a [`Module`], with what the compiler made of it.
#[derive(Clone, Copy, Debug)]
struct Function {
    raw: usize,
    /// Dynamic shared memory that was asked for so far, in bytes.
    shared: usize,
}

/// Kernels that are loaded on one device, for the rest of the process.
pub struct Module {
    device: usize,
    functions: Mutex<HashMap<String, Function>>,
}

/// What one kernel needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    pub registers: u32,
    /// Static shared memory of a block, in bytes.
    pub shared: u32,
    /// Spilled memory of a thread, in bytes.
    pub local: u32,
}

/// Dynamic shared memory that a kernel may use without being asked for more, in bytes.
const SHARED_DEFAULT: usize = 48 << 10;

impl Module {
    /// Loads an image on `device` and looks up all its names.
    pub fn load(device: usize, image: &Image) -> Result<Self> {
        const ERROR_LOG: c_int = 5;
        const ERROR_LOG_BYTES: c_int = 6;
        let api = api()?;
        api.enter(device)?;
        let mut log = vec![0u8; 16 << 10];
        let mut module = std::ptr::null_mut();
        let mut options = [ERROR_LOG, ERROR_LOG_BYTES];
        let mut values = [log.as_mut_ptr().cast(), log.len() as Handle];
        // SAFETY: a whole image (PTX ends with a zero); two options, the buffer's size as a number in place of a pointer.
        let code = unsafe {
            let bytes = image.bytes.as_ptr().cast();
            (api.module_load)(&raw mut module, bytes, 2, options.as_mut_ptr(), values.as_mut_ptr())
        };
        if code != 0 {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
            let log = String::from_utf8_lossy(&log[..end]);
            let log = if log.is_empty() { String::new() } else { format!(":\n{log}") };
            return Err(Error::Image { code, name: api.name(code), log });
        }
        let mut functions = HashMap::new();
        for (name, symbol) in &image.names {
            let symbol = CString::new(symbol.as_str()).expect("invariant: no zero byte in a kernel's name");
            let mut raw = std::ptr::null_mut();
            // SAFETY: a loaded module, which is never unloaded, and a zero-terminated name.
            let code = unsafe { (api.module_function)(&raw mut raw, module, symbol.as_ptr()) };
            api.check("cuModuleGetFunction", code)?;
            functions.insert(name.clone(), Function { raw: raw as usize, shared: SHARED_DEFAULT });
        }
        Ok(Self { device, functions: functions.into() })
    }

    pub fn device(&self) -> usize {
        self.device
    }

    fn functions(&self) -> MutexGuard<'_, HashMap<String, Function>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the kernel `name` needs, as loaded; None for an unknown name.
    pub fn resources(&self, name: &str) -> Result<Option<Resources>> {
        const SHARED: c_int = 1;
        const LOCAL: c_int = 3;
        const REGISTERS: c_int = 4;
        let Some(function) = self.functions().get(name).copied() else { return Ok(None) };
        let api = api()?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: one out parameter, a function of a loaded module.
            let code = unsafe { (api.function_attribute)(&raw mut value, which, function.raw as Handle) };
            api.check("cuFuncGetAttribute", code).map(|()| value as u32)
        };
        Ok(Some(Resources { registers: attribute(REGISTERS)?, shared: attribute(SHARED)?, local: attribute(LOCAL)? }))
    }

    /// Puts the kernel `name` on `stream`.
    ///
    /// The arguments must be the kernel's, in order: the emulator's tests hold every launch of this program against the
    /// kernel's true parameters. Panics when the name is unknown or a tensor is not contiguous or not on this device.
    pub fn launch(&self, name: &str, grid: Grid, stream: Stream, arguments: &[Argument]) -> Result<()> {
        const MAX_DYNAMIC_SHARED: c_int = 8;
        let api = api()?;
        api.enter(self.device)?;
        let mut functions = self.functions();
        let function = functions.get_mut(name).unwrap_or_else(|| panic!("invariant: a kernel called {name}"));
        let raw = function.raw as Handle;
        if grid.shared > function.shared {
            // SAFETY: a function of a loaded module.
            let code = unsafe { (api.function_set)(raw, MAX_DYNAMIC_SHARED, grid.shared as c_int) };
            api.check("cuFuncSetAttribute", code)?;
            function.shared = grid.shared;
        }
        let mut cells = cells(arguments, Device::Cuda(self.device));
        let mut pointers: Vec<Handle> = cells.iter_mut().map(|cell| std::ptr::from_mut(cell).cast()).collect();
        let (blocks, threads, shared) = (grid.blocks as c_uint, grid.threads as c_uint, grid.shared as c_uint);
        // SAFETY: one pointer for each parameter, each to a cell at least as wide as the parameter (little-endian); the
        // driver copies the values before it returns. Tensors that are freed after this call stay valid for the kernel:
        // libtorch gives their memory to work on the same stream only.
        let code = unsafe {
            let none = std::ptr::null_mut();
            (api.launch)(raw, blocks, 1, 1, threads, 1, 1, shared, stream.raw(), pointers.as_mut_ptr(), none)
        };
        api.check("cuLaunchKernel", code)
    }
}
