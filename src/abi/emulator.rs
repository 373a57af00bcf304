//! CUDA kernels on the host, for tests: the same sources compiled by the host's compiler with fibers for threads.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use tch::{Device, Kind, Tensor};

use super::library::Library;
use super::module::{Argument, Grid, cells};

type Launch = unsafe extern "C" fn(
    *const c_char,
    *const c_char,
    c_uint,
    c_uint,
    usize,
    *mut *mut c_void,
    c_int,
    *mut c_char,
    usize,
);

/// Kernels that are compiled for the host. Launches of all users take turns: blocks use the same static memory.
pub struct Compiled {
    launch: Launch,
    turn: Mutex<()>,
    _library: Library,
}

impl Compiled {
    /// Compiles C++ that ends in the emulator's registrations. Traps on misaligned access, signed overflow and the like.
    pub fn new(source: &str, folder: &Path) -> Result<Self, String> {
        let (file, library) = (folder.join("kernels.cpp"), folder.join("libkernels.so"));
        std::fs::write(&file, source).map_err(|error| format!("{}: {error}", file.display()))?;
        let done = Command::new("c++")
            .args([
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                "-fno-strict-aliasing",
                "-ffp-contract=off",
                "-Wall",
                "-Wno-sign-compare",
            ])
            .args(["-fsanitize=alignment,signed-integer-overflow,shift,bounds", "-fsanitize-undefined-trap-on-error"])
            .args(["-Wno-unknown-pragmas", "-o"])
            .arg(&library)
            .arg(&file)
            .output()
            .map_err(|error| format!("c++: {error}"))?;
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        if !done.status.success() || text.contains("warning") {
            return Err(text);
        }
        let library = Library::open(&[library]).map_err(|error| error.to_string())?;
        // SAFETY: the signature of emulator.h; the library lives as long as the function.
        let launch = unsafe { library.function("emulator_launch") }.map_err(|error| error.to_string())?;
        Ok(Self { launch, turn: Mutex::new(()), _library: library })
    }
}

/// Elements around a guarded tensor, on either side.
const GUARD: i64 = 64;

/// Runs kernels in one order of threads and keeps tensors whose surroundings must not change.
pub struct Emulator {
    compiled: &'static Compiled,
    /// Threads and blocks from the last to the first.
    reverse: bool,
    /// Elements by which tensors miss their alignment.
    offset: i64,
    /// Tensor with its guards, and its own length.
    guarded: Mutex<Vec<(Tensor, i64)>>,
}

impl Emulator {
    pub fn new(compiled: &'static Compiled, reverse: bool, offset: i64) -> Self {
        Self { compiled, reverse, offset, guarded: Mutex::default() }
    }

    /// A tensor of NaN (-1 for integers) inside more of the same.
    pub fn empty(&self, shape: &[i64], kind: Kind) -> Tensor {
        let len: i64 = shape.iter().product();
        let poison = if kind == Kind::Uint8 { 0xa5 as f64 } else { f64::NAN };
        let poison = if kind == Kind::Int64 { -1.0 } else { poison };
        let base = Tensor::full([len + 2 * GUARD], poison, (kind, Device::Cpu));
        let tensor = base.narrow(0, GUARD + self.offset, len).view(shape);
        self.guarded.lock().unwrap().push((base, len));
        tensor
    }

    /// A copy that is guarded.
    pub fn guard(&self, tensor: &Tensor) -> Tensor {
        let mut copy = self.empty(&tensor.size(), tensor.kind());
        copy.copy_(tensor);
        copy
    }

    /// Panics when anything around a guarded tensor has changed.
    pub fn check_guards(&self) {
        for (base, len) in self.guarded.lock().unwrap().iter() {
            let first = GUARD + self.offset;
            for part in [base.narrow(0, 0, first), base.narrow(0, first + len, GUARD - self.offset)] {
                let intact = match base.kind() {
                    Kind::Uint8 => part.eq(0xa5),
                    Kind::Int64 => part.eq(-1),
                    _ => part.isnan(),
                };
                assert!(bool::try_from(intact.all()).unwrap(), "a kernel wrote beside a tensor of {len} elements");
            }
        }
    }

    pub fn launch(&self, name: &str, grid: Grid, arguments: &[Argument]) {
        let letter = |argument: &Argument| match argument {
            Argument::Absent => '0',
            Argument::Int(_) => 'i',
            Argument::Float(_) => 'f',
            Argument::Tensor(tensor) => match tensor.kind() {
                Kind::Float => 'F',
                Kind::BFloat16 => 'B',
                Kind::Double => 'D',
                Kind::Int64 => 'L',
                Kind::Uint8 => 'U',
                other => panic!("no kernel takes {other:?}"),
            },
        };
        let letters = CString::new(arguments.iter().map(letter).collect::<String>()).unwrap();
        let kernel = CString::new(name).unwrap();
        let mut cells = cells(arguments, Device::Cpu);
        let mut pointers: Vec<*mut c_void> = cells.iter_mut().map(|cell| std::ptr::from_mut(cell).cast()).collect();
        let mut error = [0u8; 512];
        let turn = self.compiled.turn.lock().unwrap();
        // SAFETY: the library compares the letters with the kernel's parameters before it reads a cell, and cuts its error
        // to the buffer.
        unsafe {
            (self.compiled.launch)(
                kernel.as_ptr(),
                letters.as_ptr(),
                grid.blocks as c_uint,
                grid.threads as c_uint,
                grid.shared,
                pointers.as_mut_ptr(),
                c_int::from(self.reverse),
                error.as_mut_ptr().cast(),
                error.len(),
            );
        }
        drop(turn);
        let error = CStr::from_bytes_until_nul(&error).unwrap().to_string_lossy();
        assert!(error.is_empty(), "{name}: {error}");
    }
}
