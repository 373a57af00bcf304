//! NCCL, loaded at run time: about twenty of its C functions, over device memory.
//!
//! No Rust binding on the package registry finds the library of the PyPI wheel (`libnccl.so.2`). Communicators are
//! non-blocking: every call may answer "in progress", which is polled with a deadline, so that a peer that is not there is an
//! error and not a hang.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::driver::Stream;
use super::library::Library;
use super::torch_cuda;

type RawComm = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;

/// What [`Comm::init`]'s ranks share; one rank draws it and tells the others.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([u8; 128]);

impl UniqueId {
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// None unless there are 128 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }
}

/// `ncclConfig_t` up to `netName`, as NCCL 2.17 has it; later versions take a shorter struct by its size and version.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
}

const UNDEFINED: c_int = c_int::MIN;

type Unary = unsafe extern "C" fn(RawComm) -> Status;

struct Functions {
    version: unsafe extern "C" fn(*mut c_int) -> Status,
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    init: unsafe extern "C" fn(*mut RawComm, c_int, UniqueId, c_int, *const Config) -> Status,
    finalize: Unary,
    destroy: Unary,
    abort: Unary,
    async_error: unsafe extern "C" fn(RawComm, *mut Status) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(RawComm) -> *const c_char,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Status,
    reduce_scatter:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Status,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, RawComm, *mut c_void) -> Status,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Status,
}

/// The loaded library.
#[derive(Clone, Copy)]
pub struct Nccl(&'static Functions);

static LIBRARY: OnceLock<Result<Functions, String>> = OnceLock::new();
/// Communicators of this process, for the thread that looks after them.
static OPEN: Mutex<Vec<Open>> = Mutex::new(Vec::new());

struct Open {
    raw: RawComm,
    name: String,
}

// SAFETY: the pointer is only handed to ncclCommGetAsyncError and ncclCommAbort, which NCCL allows from other threads.
unsafe impl Send for Open {}

impl Nccl {
    /// Loads the library: the copy that libtorch_cuda uses where that is loaded, else one that the linker or the wheel's folder
    /// offers.
    ///
    /// # Errors
    /// What the dynamic linker says of each place, in one line.
    pub fn load() -> Result<Self, String> {
        LIBRARY.get_or_init(|| load(&candidates())).as_ref().map(Self).map_err(Clone::clone)
    }

    /// As NCCL writes it: 22809 is 2.28.9.
    pub fn version(self) -> i32 {
        let mut version = 0;
        // SAFETY: one out parameter.
        unsafe { (self.0.version)(&raw mut version) };
        version
    }

    /// `2.28.9`.
    pub fn version_text(self) -> String {
        let version = self.version();
        format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    /// # Errors
    /// NCCL's own words; it looks for a network interface here.
    pub fn unique_id(self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: one out parameter of 128 bytes.
        let code = unsafe { (self.0.unique_id)(&raw mut id) };
        if code == SUCCESS { Ok(id) } else { Err(self.words(code, std::ptr::null_mut())) }
    }

    /// What NCCL calls an error, and what it last complained about.
    fn words(self, code: Status, comm: RawComm) -> String {
        // SAFETY: both functions give strings that NCCL owns; the communicator may be null.
        let (name, last) = unsafe {
            let text = |pointer: *const c_char| {
                if pointer.is_null() { String::new() } else { CStr::from_ptr(pointer).to_string_lossy().into_owned() }
            };
            (text((self.0.error_string)(code)), text((self.0.last_error)(comm)))
        };
        let last = last.trim();
        if last.is_empty() { format!("NCCL: {name}") } else { format!("NCCL: {name}: {last}") }
    }
}

fn candidates() -> Vec<PathBuf> {
    let packages = torch_cuda::folder().join("../..");
    [
        "libnccl.so.2".into(),
        packages.join("nvidia/nccl/lib/libnccl.so.2"),
        packages.join("nvidia/cu13/lib/libnccl.so.2"),
    ]
    .into()
}

fn load(candidates: &[PathBuf]) -> Result<Functions, String> {
    let library = Library::open(candidates).map_err(|error| error.to_string())?;
    let words = |error: super::library::Error| error.to_string();
    // SAFETY: the types are those of nccl.h, unchanged from 2.18 to 2.30; the library stays open for the life of the process.
    unsafe {
        let functions = Functions {
            version: library.function("ncclGetVersion").map_err(words)?,
            unique_id: library.function("ncclGetUniqueId").map_err(words)?,
            init: library.function("ncclCommInitRankConfig").map_err(words)?,
            finalize: library.function("ncclCommFinalize").map_err(words)?,
            destroy: library.function("ncclCommDestroy").map_err(words)?,
            abort: library.function("ncclCommAbort").map_err(words)?,
            async_error: library.function("ncclCommGetAsyncError").map_err(words)?,
            error_string: library.function("ncclGetErrorString").map_err(words)?,
            last_error: library.function("ncclGetLastError").map_err(words)?,
            all_reduce: library.function("ncclAllReduce").map_err(words)?,
            reduce_scatter: library.function("ncclReduceScatter").map_err(words)?,
            all_gather: library.function("ncclAllGather").map_err(words)?,
            broadcast: library.function("ncclBroadcast").map_err(words)?,
        };
        std::mem::forget(library);
        Ok(functions)
    }
}

/// How numbers become one: NCCL's own numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Sum = 0,
    Max = 2,
}

/// One communicator; all calls come from the thread that made it, in program order.
pub struct Comm {
    nccl: Nccl,
    raw: RawComm,
    name: String,
    size: usize,
    timeout: Duration,
}

impl Comm {
    /// Joins `size` ranks; all of them call it with the same id.
    ///
    /// `name`: for messages; `timeout`: how long a rank waits for the others here and in every later call that does not
    /// return at once; `max_ctas`: most thread blocks of a collective, for ranks that share a GPU.
    ///
    /// # Errors
    /// NCCL's own words, or that the others did not come in time.
    pub fn init(
        nccl: Nccl,
        id: UniqueId,
        rank: usize,
        size: usize,
        name: &str,
        timeout: Duration,
        max_ctas: Option<i32>,
    ) -> Result<Self, String> {
        let config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: max_ctas.unwrap_or(UNDEFINED),
            net_name: std::ptr::null(),
        };
        let mut comm = Self { nccl, raw: std::ptr::null_mut(), name: name.to_owned(), size, timeout };
        // SAFETY: one out parameter, an id and a configuration that outlive the call.
        let code = unsafe { (nccl.0.init)(&raw mut comm.raw, size as c_int, id, rank as c_int, &raw const config) };
        if let Err(text) = comm.settle(code, "joining") {
            comm.give_up();
            return Err(text);
        }
        lock().push(Open { raw: comm.raw, name: comm.name.clone() });
        Ok(comm)
    }

    /// Ends a communicator that never came to be: a farewell would wait for ranks that may not be there.
    fn give_up(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: NCCL allows an abort while a communicator is being made, or after it has failed; it is not used again.
            unsafe { (self.nccl.0.abort)(self.raw) };
            self.raw = std::ptr::null_mut();
        }
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// Reduces `tensor` in place on `stream`.
    pub fn all_reduce(&self, tensor: &Tensor, op: Op, stream: Stream) {
        let at = address(tensor);
        // SAFETY: a contiguous tensor on the device of this communicator; the caller keeps it until the stream is done.
        let code = unsafe {
            (self.nccl.0.all_reduce)(at, at, tensor.numel(), datatype(tensor), op as c_int, self.raw, stream.raw())
        };
        self.complete(code, "all_reduce");
    }

    /// Sums `input` over the ranks; this rank's part goes to `output`, which may be that part of `input` itself.
    pub fn reduce_scatter(&self, input: &Tensor, output: &Tensor, stream: Stream) {
        assert_eq!(input.numel(), output.numel() * self.size, "invariant: the input is one output for each rank");
        assert_eq!(input.kind(), output.kind(), "invariant: input and output alike");
        let count = output.numel();
        // SAFETY: as in `all_reduce`, with `size * count` elements to read and `count` to write.
        let code = unsafe {
            (self.nccl.0.reduce_scatter)(
                address(input),
                address(output),
                count,
                datatype(input),
                Op::Sum as c_int,
                self.raw,
                stream.raw(),
            )
        };
        self.complete(code, "reduce_scatter");
    }

    /// Puts the ranks' `input`s into `output` in rank order; `input` may be this rank's part of `output` itself.
    pub fn all_gather(&self, input: &Tensor, output: &Tensor, stream: Stream) {
        assert_eq!(output.numel(), input.numel() * self.size, "invariant: the output is one input for each rank");
        assert_eq!(input.kind(), output.kind(), "invariant: input and output alike");
        let (kind, bytes) = words(input);
        // SAFETY: as in `all_reduce`, with `count` words to read and `size * count` to write.
        let code =
            unsafe { (self.nccl.0.all_gather)(address(input), address(output), bytes, kind, self.raw, stream.raw()) };
        self.complete(code, "all_gather");
    }

    /// Copies rank `root`'s tensor into everybody's.
    pub fn broadcast(&self, tensor: &Tensor, root: usize, stream: Stream) {
        let (kind, count) = words(tensor);
        let at = address(tensor);
        // SAFETY: as in `all_reduce`.
        let code = unsafe { (self.nccl.0.broadcast)(at, at, count, kind, root as c_int, self.raw, stream.raw()) };
        self.complete(code, "broadcast");
    }

    /// A call that NCCL refuses is a fault of this program or of the machine: the job ends with NCCL's words.
    fn complete(&self, code: Status, what: &str) {
        if let Err(text) = self.settle(code, what) {
            panic!("{what} on {} ({} ranks): {text}", self.name, self.size);
        }
    }

    /// Polls until a call that is in progress has an answer.
    fn settle(&self, mut code: Status, what: &str) -> Result<(), String> {
        let start = Instant::now();
        while code == IN_PROGRESS {
            if start.elapsed() > self.timeout {
                return Err(format!(
                    "{what} {} has waited {} s for the other ranks",
                    self.name,
                    start.elapsed().as_secs()
                ));
            }
            if start.elapsed() > Duration::from_millis(2) {
                std::thread::sleep(Duration::from_micros(200));
            }
            // SAFETY: a communicator that is being or has been made; one out parameter.
            let asked = unsafe { (self.nccl.0.async_error)(self.raw, &raw mut code) };
            if asked != SUCCESS {
                code = asked;
            }
        }
        if code == SUCCESS { Ok(()) } else { Err(self.nccl.words(code, self.raw)) }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        lock().retain(|open| open.raw != self.raw);
        if std::thread::panicking() {
            return; // the process is about to end; taking part in a farewell might wait for ever
        }
        // SAFETY: the communicator is ours; finalising flushes what is under way, then it is freed.
        unsafe {
            let code = (self.nccl.0.finalize)(self.raw);
            if self.settle(code, "leaving").is_ok() {
                (self.nccl.0.destroy)(self.raw);
            }
        }
    }
}

/// The first error that NCCL has met on its own threads, with the communicator's name. Any thread may ask.
pub fn first_error() -> Option<String> {
    let Some(Ok(functions)) = LIBRARY.get() else { return None };
    let nccl = Nccl(functions);
    for open in lock().iter() {
        let mut code = SUCCESS;
        // SAFETY: the list holds communicators that are not yet destroyed; one out parameter.
        let asked = unsafe { (functions.async_error)(open.raw, &raw mut code) };
        if asked == SUCCESS && code != SUCCESS && code != IN_PROGRESS {
            return Some(format!("{} on {}", nccl.words(code, open.raw), open.name));
        }
    }
    None
}

/// Ends what every communicator is doing, so that the process can end; used when a deadline has passed.
pub fn abort_all() {
    let Some(Ok(functions)) = LIBRARY.get() else { return };
    for open in lock().drain(..) {
        // SAFETY: NCCL allows an abort from another thread; the communicator is not used again.
        unsafe { (functions.abort)(open.raw) };
    }
}

fn lock() -> std::sync::MutexGuard<'static, Vec<Open>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn address(tensor: &Tensor) -> *mut c_void {
    assert!(
        tensor.is_contiguous() && matches!(tensor.device(), Device::Cuda(_)),
        "invariant: NCCL takes contiguous device memory"
    );
    tensor.data_ptr()
}

/// NCCL's number of a type that it can add.
fn datatype(tensor: &Tensor) -> c_int {
    match tensor.kind() {
        Kind::Int64 => 4,
        Kind::Half => 6,
        Kind::Float => 7,
        Kind::Double => 8,
        Kind::BFloat16 => 9,
        other => panic!("invariant: NCCL does not add {other:?}"),
    }
}

/// Type and count for moving bytes.
fn words(tensor: &Tensor) -> (c_int, usize) {
    const UINT8: c_int = 1;
    (UINT8, tensor.numel() * tensor.kind().elt_size_in_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_nowhere_is_told_with_every_place() {
        let text = load(&["/nowhere/libnccl.so.2".into(), "/elsewhere/libnccl.so.2".into()]).err().unwrap();
        assert!(text.contains("/nowhere/libnccl.so.2") && text.contains(", /elsewhere/libnccl.so.2"), "{text}");
    }

    /// Against the wheel that `launch/test` installs; NCCL answers these calls without a GPU.
    #[test]
    fn the_wheel_is_loaded_and_answers() {
        let nccl = match Nccl::load() {
            Ok(nccl) => nccl,
            Err(reason) => {
                #[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
                return eprintln!("skipped: no NCCL library: {reason}");
            }
        };
        assert!(nccl.version() >= 21_800, "{}", nccl.version());
        assert!(nccl.version_text().starts_with("2."), "{}", nccl.version_text());
        let id = nccl.unique_id().unwrap();
        assert_eq!(UniqueId::from_bytes(id.bytes()).unwrap().bytes(), id.bytes());
        assert!(id.bytes().iter().any(|&byte| byte != 0));
        assert!(nccl.words(4, std::ptr::null_mut()).starts_with("NCCL: invalid argument"), "error strings");
        assert!(first_error().is_none());
    }

    /// Without a driver the init must come back with words, not hang and not crash.
    #[test]
    fn joining_without_a_gpu_is_refused_in_words() {
        let Ok(nccl) = Nccl::load() else { return };
        if torch_cuda::load().is_ok() && tch::Cuda::device_count() > 0 {
            return;
        }
        let id = nccl.unique_id().unwrap();
        let text = Comm::init(nccl, id, 0, 2, "tp", Duration::from_secs(20), None).err().unwrap();
        assert!(text.starts_with("NCCL: ") && text.len() > 12, "{text}");
    }
}
