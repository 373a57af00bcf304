//! The CUDA driver (`libcuda.so.1`), opened on first use: devices, memory, streams and events. See [`super::module`] for
//! kernels.
//!
//! libtorch owns each device's primary context; every call here makes that context current first where it matters.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::library::{self, Library};

/// Why a CUDA call did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("no CUDA driver: {0}")]
    Driver(#[from] library::Error),
    #[error("{call}: {name} ({code}), {text}")]
    Call { call: &'static str, code: i32, name: String, text: String },
    #[error("CUDA device {device} does not exist; this process sees {count}")]
    Device { device: usize, count: usize },
    #[error("cannot load the kernels: {name} ({code}){log}")]
    Image { code: i32, name: String, log: String },
    #[error("libtorch gives no CUDA stream for device {device} (code {code})")]
    Stream { device: usize, code: i32 },
}

pub(super) type Result<T> = std::result::Result<T, Error>;

/// An opaque handle of the driver, or an address on a device.
pub(super) type Handle = *mut c_void;

macro_rules! functions {
    ($($field:ident = $symbol:literal($($argument:ty),*);)*) => {
        pub(super) struct Api {
            _library: Library,
            contexts: Mutex<Vec<(usize, usize)>>,
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Api {
            fn open(library: Library) -> std::result::Result<Self, library::Error> {
                // SAFETY: the signatures below are those of cuda.h; the library lives as long as its functions.
                unsafe {
                    Ok(Self {
                        $($field: library.function($symbol)?,)*
                        contexts: Mutex::default(),
                        _library: library,
                    })
                }
            }
        }
    };
}

functions! {
    init = "cuInit"(c_uint);
    version = "cuDriverGetVersion"(*mut c_int);
    error_name = "cuGetErrorName"(c_int, *mut *const c_char);
    error_string = "cuGetErrorString"(c_int, *mut *const c_char);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_memory = "cuDeviceTotalMem_v2"(*mut usize, c_int);
    device_uuid = "cuDeviceGetUuid_v2"(*mut [u8; 16], c_int);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    context_current = "cuCtxGetCurrent"(*mut Handle);
    context_set = "cuCtxSetCurrent"(Handle);
    memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    module_load = "cuModuleLoadDataEx"(*mut Handle, *const c_void, c_uint, *mut c_int, *mut Handle);
    module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
    function_attribute = "cuFuncGetAttribute"(*mut c_int, c_int, Handle);
    function_set = "cuFuncSetAttribute"(Handle, c_int, c_int);
    launch = "cuLaunchKernel"(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut Handle, *mut Handle);
    stream_wait = "cuStreamWaitEvent"(Handle, Handle, c_uint);
    stream_synchronize = "cuStreamSynchronize"(Handle);
    event_create = "cuEventCreate"(*mut Handle, c_uint);
    event_record = "cuEventRecord"(Handle, Handle);
    event_query = "cuEventQuery"(Handle);
    event_synchronize = "cuEventSynchronize"(Handle);
    event_elapsed = "cuEventElapsedTime"(*mut f32, Handle, Handle);
    event_destroy = "cuEventDestroy_v2"(Handle);
}

const NOT_READY: c_int = 600;

impl Api {
    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(Error::Call { call, code, name: self.name(code), text: self.text(self.error_string, code) })
    }

    pub(super) fn name(&self, code: c_int) -> String {
        self.text(self.error_name, code)
    }

    fn text(&self, lookup: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int, code: c_int) -> String {
        let mut text = std::ptr::null();
        // SAFETY: the driver points the out parameter at a constant string, or at nothing for an unknown code.
        unsafe {
            if lookup(code, &raw mut text) != 0 || text.is_null() {
                return "unknown error".to_owned();
            }
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }

    /// The driver's number of a device.
    fn device(&self, device: usize) -> Result<c_int> {
        let (count, mut raw) = (device_count()?, 0);
        if device >= count {
            return Err(Error::Device { device, count });
        }
        // SAFETY: one out parameter; the ordinal exists.
        self.check("cuDeviceGet", unsafe { (self.device_get)(&raw mut raw, device as c_int) })?;
        Ok(raw)
    }

    /// Makes the primary context of `device` current on this thread.
    pub(super) fn enter(&self, device: usize) -> Result<()> {
        let mut contexts = self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        let known = contexts.iter().find(|(of, _)| *of == device).map(|(_, context)| *context as Handle);
        // SAFETY: out parameters of the right types; a retained context is never released, so it stays valid.
        unsafe {
            let context = match known {
                Some(context) => context,
                None => {
                    let (raw, mut context) = (self.device(device)?, std::ptr::null_mut());
                    self.check("cuDevicePrimaryCtxRetain", (self.context_retain)(&raw mut context, raw))?;
                    contexts.push((device, context as usize));
                    context
                }
            };
            let mut current = std::ptr::null_mut();
            self.check("cuCtxGetCurrent", (self.context_current)(&raw mut current))?;
            if current != context {
                self.check("cuCtxSetCurrent", (self.context_set)(context))?;
            }
        }
        Ok(())
    }
}

/// The driver of this process, opened and initialised once.
pub(super) fn api() -> Result<&'static Api> {
    static API: OnceLock<Result<Api>> = OnceLock::new();
    let api = API.get_or_init(|| {
        let api = Api::open(Library::open(&["libcuda.so.1".into()])?)?;
        // SAFETY: the flags must be 0.
        api.check("cuInit", unsafe { (api.init)(0) })?;
        Ok(api)
    });
    api.as_ref().map_err(Clone::clone)
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Bytes.
    pub memory: u64,
    pub multiprocessors: u32,
}

/// CUDA version that the driver supports, as major and minor.
pub fn version() -> Result<(u32, u32)> {
    let (api, mut version) = (api()?, 0);
    // SAFETY: one out parameter.
    api.check("cuDriverGetVersion", unsafe { (api.version)(&raw mut version) })?;
    Ok((version as u32 / 1000, version as u32 % 1000 / 10))
}

/// Devices that this process sees (`CUDA_VISIBLE_DEVICES` counts).
pub fn device_count() -> Result<usize> {
    let (api, mut count) = (api()?, 0);
    // SAFETY: one out parameter.
    api.check("cuDeviceGetCount", unsafe { (api.device_count)(&raw mut count) })?;
    Ok(count as usize)
}

/// What tells a device (or a part of one) from all others of its host, whatever number it has here.
pub fn identity(device: usize) -> Result<String> {
    let api = api()?;
    let (raw, mut uuid) = (api.device(device)?, [0u8; 16]);
    // SAFETY: an out parameter of 16 bytes, a valid device.
    api.check("cuDeviceGetUuid", unsafe { (api.device_uuid)(&raw mut uuid, raw) })?;
    Ok(uuid.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Name, capability and size of a device.
pub fn device(device: usize) -> Result<Device> {
    const MULTIPROCESSORS: c_int = 16;
    const MAJOR: c_int = 75;
    const MINOR: c_int = 76;
    let api = api()?;
    let raw = api.device(device)?;
    let (mut name, mut memory) = ([0u8; 256], 0);
    let attribute = |which| -> Result<u32> {
        let mut value = 0;
        // SAFETY: one out parameter, a valid device.
        api.check("cuDeviceGetAttribute", unsafe { (api.device_attribute)(&raw mut value, which, raw) })?;
        Ok(value as u32)
    };
    // SAFETY: the buffer's length is passed, the driver ends the name with a zero; one out parameter.
    unsafe {
        api.check("cuDeviceGetName", (api.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, raw))?;
        api.check("cuDeviceTotalMem", (api.device_memory)(&raw mut memory, raw))?;
    }
    Ok(Device {
        name: CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned(),
        capability: (attribute(MAJOR)?, attribute(MINOR)?),
        memory: memory as u64,
        multiprocessors: attribute(MULTIPROCESSORS)?,
    })
}

/// Free and total bytes of a device's memory.
pub fn memory_info(device: usize) -> Result<(u64, u64)> {
    let api = api()?;
    api.enter(device)?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: two out parameters; a context is current.
    api.check("cuMemGetInfo", unsafe { (api.memory_info)(&raw mut free, &raw mut total) })?;
    Ok((free as u64, total as u64))
}

/// A queue of work on a device, owned by libtorch (its streams live as long as the process).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// `cudaStream_t`; 0 is the default stream of the device's context.
    raw: usize,
    device: usize,
}

impl Stream {
    /// SAFETY: `raw` is a stream of `device`'s primary context that lives as long as the process.
    pub(super) unsafe fn from_raw(raw: Handle, device: usize) -> Self {
        Self { raw: raw as usize, device }
    }

    pub(super) fn raw(self) -> Handle {
        self.raw as Handle
    }

    pub fn device(self) -> usize {
        self.device
    }

    /// The stream that libtorch puts its work on now. libtorch's CUDA half must be loaded (`RTLD_GLOBAL`).
    pub fn current(device: usize) -> Result<Self> {
        type Current = unsafe extern "C" fn(i32, *mut Handle) -> i32;
        static CURRENT: OnceLock<std::result::Result<Current, library::Error>> = OnceLock::new();
        // SAFETY: the signature of torch/csrc/inductor/aoti_torch/c/shim.h.
        let current = CURRENT.get_or_init(|| unsafe { library::loaded_function("aoti_torch_get_current_cuda_stream") });
        let current = current.as_ref().map_err(|error| Error::Driver(error.clone()))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: one out parameter; libtorch's streams are never destroyed.
        unsafe {
            match current(device as i32, &raw mut raw) {
                0 => Ok(Self::from_raw(raw, device)),
                code => Err(Error::Stream { device, code }),
            }
        }
    }

    /// Lets work that is put on this stream from now on wait for `event`; the host does not wait.
    pub fn wait(self, event: &Event) -> Result<()> {
        let api = api()?;
        api.enter(self.device)?;
        // SAFETY: both handles are alive; the flags must be 0.
        api.check("cuStreamWaitEvent", unsafe { (api.stream_wait)(self.raw(), event.raw(), 0) })
    }

    /// Blocks until all work on this stream is done.
    pub fn synchronize(self) -> Result<()> {
        let api = api()?;
        api.enter(self.device)?;
        // SAFETY: the stream is alive.
        api.check("cuStreamSynchronize", unsafe { (api.stream_synchronize)(self.raw()) })
    }
}

/// A point in a stream's work. Destroyed on drop, also while it is awaited: the driver keeps what it still needs.
#[derive(Debug)]
pub struct Event {
    raw: usize,
    device: usize,
}

impl Event {
    /// `timing`: whether [`Event::elapsed_ms_since`] will be asked; an event without it costs less.
    pub fn new(device: usize, timing: bool) -> Result<Self> {
        const DISABLE_TIMING: c_uint = 2;
        let api = api()?;
        api.enter(device)?;
        let mut raw = std::ptr::null_mut();
        let flags = if timing { 0 } else { DISABLE_TIMING };
        // SAFETY: one out parameter; the event is ours alone.
        api.check("cuEventCreate", unsafe { (api.event_create)(&raw mut raw, flags) })?;
        Ok(Self { raw: raw as usize, device })
    }

    fn raw(&self) -> Handle {
        self.raw as Handle
    }

    /// Marks the end of what is on `stream` now. The stream is one of this event's device.
    pub fn record(&self, stream: Stream) -> Result<()> {
        let api = api()?;
        api.enter(self.device)?;
        // SAFETY: both handles are alive.
        api.check("cuEventRecord", unsafe { (api.event_record)(self.raw(), stream.raw()) })
    }

    /// Whether the work before the mark is done; true for an event that was never recorded.
    pub fn is_done(&self) -> Result<bool> {
        let api = api()?;
        // SAFETY: the event is alive.
        match unsafe { (api.event_query)(self.raw()) } {
            NOT_READY => Ok(false),
            code => api.check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Blocks until the work before the mark is done.
    pub fn synchronize(&self) -> Result<()> {
        let api = api()?;
        // SAFETY: the event is alive.
        api.check("cuEventSynchronize", unsafe { (api.event_synchronize)(self.raw()) })
    }

    /// Milliseconds from `start` to this event, both with timing and both done.
    pub fn elapsed_ms_since(&self, start: &Self) -> Result<f32> {
        let (api, mut ms) = (api()?, 0.0);
        // SAFETY: one out parameter, two events that are alive.
        api.check("cuEventElapsedTime", unsafe { (api.event_elapsed)(&raw mut ms, start.raw(), self.raw()) })?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(api) = api() {
            // SAFETY: the event is ours and not used again. An error here could only repeat an earlier one.
            unsafe { (api.event_destroy)(self.raw()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::module::{Argument, Grid, Module, Resources};
    use super::super::nvrtc::Image;
    use super::super::tests::{is_behind_fake_driver, rerun_behind_fake_driver};
    use super::*;

    /// Without a driver every call says so; with one, the first device answers.
    #[test]
    fn devices_answer_or_the_driver_is_missed() {
        match device_count() {
            Ok(0) => assert_eq!(device(0), Err(Error::Device { device: 0, count: 0 })),
            Ok(count) => {
                let first = device(0).unwrap();
                assert!(!first.name.is_empty() && first.capability.0 >= 3 && first.multiprocessors > 0, "{first:?}");
                assert_eq!(device(count), Err(Error::Device { device: count, count }));
            }
            Err(error) => {
                assert!(error.to_string().contains("libcuda.so.1") || error.to_string().contains("cuInit"), "{error}");
                assert_eq!(Event::new(0, true).err(), Some(error));
            }
        }
    }

    /// Every call against the declarations of cuda.h, in a process where a driver without a GPU takes the real one's place.
    #[test]
    fn calls_are_as_cuda_h_declares_them() {
        if !is_behind_fake_driver() {
            rerun_behind_fake_driver("abi::driver::tests::calls_are_as_cuda_h_declares_them");
            return;
        }
        assert_eq!((version(), device_count()), (Ok((13, 1)), Ok(2)));
        let second = Device { name: "Second fake".into(), capability: (8, 6), memory: 80 << 30, multiprocessors: 132 };
        assert_eq!(device(1), Ok(second));
        assert_eq!(device(2), Err(Error::Device { device: 2, count: 2 }));
        assert_eq!(identity(1), Ok("a1".repeat(16)));
        assert_eq!((memory_info(0), memory_info(1), memory_info(0)), (Ok((10, 100)), Ok((20, 100)), Ok((10, 100))));

        let stream = Stream::current(1).unwrap();
        assert_eq!((stream.raw() as usize, stream.device()), (0x501, 1));
        assert_eq!(Stream::current(5), Err(Error::Stream { device: 5, code: 1 }));
        stream.synchronize().unwrap();

        // SAFETY: the fake driver's own function.
        let live = unsafe { library::loaded_function::<extern "C" fn() -> i32>("fake_live_events") }.unwrap();
        let (start, end) = (Event::new(1, true).unwrap(), Event::new(1, true).unwrap());
        let untimed = Event::new(0, false).unwrap();
        let error = stream.wait(&start).unwrap_err().to_string();
        assert_eq!(error, "cuStreamWaitEvent: CUDA_ERROR_INVALID_VALUE (1), as the fake driver says");
        for event in [&start, &end] {
            event.record(stream).unwrap();
        }
        stream.wait(&end).unwrap();
        assert_eq!((end.is_done(), end.is_done()), (Ok(false), Ok(true)));
        end.synchronize().unwrap();
        assert_eq!(end.elapsed_ms_since(&start), Ok(1.5));
        assert!(matches!(end.elapsed_ms_since(&untimed), Err(Error::Call { code: 400, .. })));
        assert_eq!(live(), 3);
        drop((start, end, untimed));
        assert_eq!(live(), 0);

        let image = |bytes: &[u8], symbol: &str| Image {
            architecture: "sm_86".into(),
            bytes: bytes.to_vec(),
            names: HashMap::from([("probe<float>".to_owned(), symbol.to_owned())]),
            log: String::new(),
        };
        let error = Module::load(1, &image(b"PTX\0", "probe")).err().unwrap().to_string();
        assert!(error.contains("CUDA_ERROR_INVALID_PTX (218):\nno machine code"), "{error}");
        let error = Module::load(1, &image(b"\x7fELF", "missing")).err().unwrap().to_string();
        assert!(error.starts_with("cuModuleGetFunction: CUDA_ERROR_NOT_FOUND (500)"), "{error}");
        let module = Module::load(1, &image(b"\x7fELF", "probe")).unwrap();
        assert_eq!(module.resources("probe<float>"), Ok(Some(Resources { registers: 40, shared: 4096, local: 0 })));
        assert_eq!(module.resources("other"), Ok(None));
        memory_info(0).unwrap(); // another device is current
        for shared in [0, 64 << 10, 96 << 10, 64 << 10] {
            let mut out = [0i64; 8];
            // the address as a number: there are no tensors on this device
            let address = Argument::Int(out.as_mut_ptr() as i64);
            let arguments = [address, Argument::Int(-7), Argument::Float(2.5), Argument::Absent];
            let grid = Grid { blocks: 70_000, threads: 256, shared };
            module.launch("probe<float>", grid, stream, &arguments).unwrap();
            assert_eq!(out, [-7, 2500, 0, 70_000, 256, shared as i64, 0x501, 0x1001]);
        }
    }
}
