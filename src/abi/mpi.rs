//! MPI over host memory, by its C functions: non-blocking collectives that are polled, so that every wait can yield its
//! core, keep a deadline and advance other requests.
//!
//! An error of MPI is a panic with MPI's words: return codes are not looked at.

use std::cell::RefCell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

use mpi::environment::{Threading, Universe};
use mpi::ffi;
use tch::{Device, Kind, Tensor};

static INITIALISED: AtomicBool = AtomicBool::new(false);

/// MPI is up as long as this lives. Dropping it is collective (`MPI_Finalize`): drop it last, and only on success.
pub struct Environment {
    _universe: Universe,
}

/// How two numbers become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Sum,
    Max,
}

/// A communicator; it stays on the thread that made it.
pub struct Comm {
    raw: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    /// Collectives that were started and not yet seen to end; polled by `progress`.
    open: RefCell<Vec<ffi::MPI_Request>>,
}

/// A collective under way together with the tensors that MPI still reads and writes.
///
/// Dropping it before it is done ends the job: MPI would write into freed memory.
#[must_use = "a collective must be waited for"]
pub struct Request {
    raw: ffi::MPI_Request,
    tensors: Option<(Tensor, Tensor)>,
}

/// Starts MPI for calls from this thread alone. Call once per process.
pub fn initialise() -> Option<Environment> {
    let (universe, _) = mpi::initialize_with_threading(Threading::Funneled)?;
    INITIALISED.store(true, Ordering::SeqCst);
    // SAFETY: MPI is up. MPI calls the handler with two pointers and, on some platforms, more that it does not read; communicators
    // made from this one inherit it.
    unsafe {
        let mut handler: ffi::MPI_Errhandler = std::mem::zeroed();
        let function = std::mem::transmute::<Handler, Option<MpiHandler>>(on_error);
        ffi::MPI_Comm_create_errhandler(function, &raw mut handler);
        ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, handler);
    }
    Some(Environment { _universe: universe })
}

type Handler = unsafe extern "C" fn(*mut ffi::MPI_Comm, *mut c_int);
type MpiHandler = unsafe extern "C" fn(*mut ffi::MPI_Comm, *mut c_int, ...);

/// The panic hook ends the job; nothing unwinds through MPI.
unsafe extern "C" fn on_error(_: *mut ffi::MPI_Comm, code: *mut c_int) {
    let mut text = [0 as std::ffi::c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: MPI passes a valid code; the text has the size that MPI asks for and ends in zero.
    let words = unsafe {
        ffi::MPI_Error_string(*code, text.as_mut_ptr(), &raw mut length);
        std::ffi::CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned()
    };
    panic!("MPI: {words}");
}

/// Whether MPI was started and not yet finalised.
pub fn is_active() -> bool {
    INITIALISED.load(Ordering::SeqCst)
}

/// Ends all ranks of the job with `code`. Returns only when MPI was never started.
pub fn abort(code: i32) {
    if is_active() {
        // SAFETY: MPI is initialised; MPI_Abort does not return.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    }
}

/// Name and version of the MPI library that is loaded, in one line.
pub fn library_version() -> String {
    let version = mpi::environment::library_version().unwrap_or_default();
    version.lines().next().unwrap_or_default().split(", package").next().unwrap_or_default().to_owned()
}

impl Environment {
    /// Ranks of the job.
    pub fn size(&self) -> usize {
        let mut size = 0;
        // SAFETY: the universe in self proves that MPI is up; one out parameter.
        unsafe { ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &raw mut size) };
        size as usize
    }

    /// All ranks of the job. Collective.
    pub fn world(&self) -> Comm {
        // SAFETY: the universe in self proves that MPI is up; the copy is ours alone.
        unsafe {
            let mut raw = ffi::RSMPI_COMM_NULL;
            ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &raw mut raw);
            Comm::new(raw)
        }
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        INITIALISED.store(false, Ordering::SeqCst);
    }
}

impl Comm {
    /// SAFETY: `raw` is a valid communicator that nothing else frees.
    unsafe fn new(raw: ffi::MPI_Comm) -> Self {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: valid communicator, two out parameters.
        unsafe {
            ffi::MPI_Comm_rank(raw, &raw mut rank);
            ffi::MPI_Comm_size(raw, &raw mut size);
        }
        Self { raw, rank: rank as usize, size: size as usize, open: RefCell::default() }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// The ranks that pass the same colour, in the order of this communicator. Collective.
    pub fn split(&self, colour: usize) -> Self {
        let mut raw = self.raw;
        // SAFETY: valid communicator; every rank of it calls.
        unsafe {
            ffi::MPI_Comm_split(self.raw, colour as c_int, self.rank as c_int, &raw mut raw);
            Self::new(raw)
        }
    }

    /// Starts the element-wise reduction of `input` over all ranks into `output`, of the same shape and kind.
    pub fn all_reduce(&self, input: Tensor, output: Tensor, op: Op) -> Request {
        assert!(input.numel() == output.numel() && input.kind() == output.kind(), "invariant: input and output alike");
        let (from, to, count, kind) = (address(&input), address(&output), count(input.numel()), datatype(&input));
        // SAFETY: both tensors hold `count` elements of `kind` and are kept by the request until the operation ended.
        self.start(input, output, |request| unsafe {
            ffi::MPI_Iallreduce(from, to, count, kind, raw_op(op), self.raw, request)
        })
    }

    /// Starts the exchange of parts: `input` has one part for each rank, `output` gets this rank's part from each, in rank
    /// order; any kind of element.
    pub fn all_to_all(&self, input: Tensor, output: Tensor) -> Request {
        assert!(
            input.numel() == output.numel() && input.numel().is_multiple_of(self.size) && input.kind() == output.kind(),
            "invariant: both sides hold one part for each rank"
        );
        let (from, to) = (address(&input), address(&output));
        let (all, kind) = words(&input);
        let count = all / self.size as c_int;
        // SAFETY: as in `all_reduce`, with `count` words for and from each rank.
        self.start(input, output, |request| unsafe {
            ffi::MPI_Ialltoall(from, count, kind, to, count, kind, self.raw, request)
        })
    }

    /// Starts the concatenation of all ranks' `input` in rank order into `output`; any kind of element.
    pub fn all_gather(&self, input: Tensor, output: Tensor) -> Request {
        assert!(
            input.numel() * self.size == output.numel() && input.kind() == output.kind(),
            "invariant: the output is one input for each rank"
        );
        let (from, to) = (address(&input), address(&output));
        let (count, kind) = words(&input);
        // SAFETY: as in `all_reduce`, with `count` words from each rank in `output`.
        self.start(input, output, |request| unsafe {
            ffi::MPI_Iallgather(from, count, kind, to, count, kind, self.raw, request)
        })
    }

    /// Starts the copy of rank `root`'s `tensor` into everybody's; any kind of element.
    pub fn broadcast(&self, tensor: Tensor, root: usize) -> Request {
        let at = address(&tensor);
        let (count, kind) = words(&tensor);
        let keep = tensor.shallow_clone();
        // SAFETY: the tensor holds `count` words and is kept by the request.
        self.start(keep, tensor, |request| unsafe {
            ffi::MPI_Ibcast(at, count, kind, root as c_int, self.raw, request)
        })
    }

    /// Starts a barrier.
    pub fn barrier(&self) -> Request {
        let nothing = || Tensor::zeros([0], (Kind::Uint8, Device::Cpu));
        // SAFETY: no buffers.
        self.start(nothing(), nothing(), |request| unsafe { ffi::MPI_Ibarrier(self.raw, request) })
    }

    /// Lets MPI work on everything that was started: Open MPI moves data only inside its own calls.
    pub fn progress(&self) {
        self.open.borrow_mut().retain(|&request| {
            let mut flag = 0;
            // SAFETY: the request is active (finished ones are removed by `is_done`); this call does not free it.
            unsafe { ffi::MPI_Request_get_status(request, &raw mut flag, ffi::RSMPI_STATUS_IGNORE) };
            flag == 0
        });
    }

    /// Whether the operation ended.
    pub fn is_done(&self, request: &mut Request) -> bool {
        let (mut flag, before) = (0, request.raw);
        // SAFETY: the request is active or null; for a null request MPI answers "done".
        unsafe { ffi::MPI_Test(&raw mut request.raw, &raw mut flag, ffi::RSMPI_STATUS_IGNORE) };
        if flag != 0 {
            self.open.borrow_mut().retain(|&open| open != before);
        }
        flag != 0
    }

    fn start(&self, input: Tensor, output: Tensor, call: impl FnOnce(*mut ffi::MPI_Request) -> c_int) -> Request {
        // SAFETY: a constant of the C shim.
        let mut raw = unsafe { ffi::RSMPI_REQUEST_NULL };
        call(&raw mut raw);
        self.open.borrow_mut().push(raw);
        Request { raw, tensors: Some((input, output)) }
    }
}

impl Request {
    /// The output of an operation that ended. Panics when it has not.
    pub fn take(mut self) -> Tensor {
        // SAFETY: a constant of the C shim.
        assert!(self.raw == unsafe { ffi::RSMPI_REQUEST_NULL }, "invariant: taken only when it is done");
        self.tensors.take().expect("invariant: taken once").1
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // SAFETY: a constant of the C shim.
        if self.tensors.is_some() && self.raw != unsafe { ffi::RSMPI_REQUEST_NULL } {
            // The panic that brought us here, if any, has printed its message; MPI still owns the memory.
            abort(101);
            std::process::abort();
        }
    }
}

fn raw_op(op: Op) -> ffi::MPI_Op {
    // SAFETY: constants of the C shim.
    unsafe {
        match op {
            Op::Sum => ffi::RSMPI_SUM,
            Op::Max => ffi::RSMPI_MAX,
        }
    }
}

fn address(tensor: &Tensor) -> *mut std::ffi::c_void {
    assert!(tensor.is_contiguous() && tensor.device() == Device::Cpu, "invariant: MPI takes contiguous host memory");
    tensor.data_ptr()
}

/// The type for arithmetic.
fn datatype(tensor: &Tensor) -> ffi::MPI_Datatype {
    // SAFETY: constants of the C shim.
    unsafe {
        match tensor.kind() {
            Kind::Float => ffi::RSMPI_FLOAT,
            Kind::Double => ffi::RSMPI_DOUBLE,
            Kind::Int64 => ffi::RSMPI_INT64_T,
            other => panic!("invariant: MPI does not add {other:?}"),
        }
    }
}

/// Count and type for moving: elements as words of their own size.
fn words(tensor: &Tensor) -> (c_int, ffi::MPI_Datatype) {
    // SAFETY: constants of the C shim.
    let kind = unsafe {
        match tensor.kind().elt_size_in_bytes() {
            1 => ffi::RSMPI_UINT8_T,
            2 => ffi::RSMPI_UINT16_T,
            4 => ffi::RSMPI_UINT32_T,
            8 => ffi::RSMPI_UINT64_T,
            other => panic!("invariant: no elements of {other} bytes"),
        }
    };
    (count(tensor.numel()), kind)
}

fn count(len: usize) -> c_int {
    c_int::try_from(len)
        .expect("invariant: an MPI count fits 31 bits; lower parallel.bucket_mib or train.micro_batch_tokens")
}
