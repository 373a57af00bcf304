//! The kernels on CUDA devices: `.cu` sources in this folder, compiled when a run starts, and the host side of each.
//!
//! Functions here mirror those of the room and take the [`Launcher`]; the room's own functions come here for tensors on the
//! device that [`load`] was called for. The tests run the same sources on the host, thread by thread.

use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use crate::abi::driver;
#[cfg(test)]
use crate::abi::emulator::Emulator;
use crate::abi::module::{Argument, Grid, Module};
use crate::abi::nvrtc::{self, Nvrtc};

pub(super) mod optimizer;
pub(super) mod reduce;
pub(super) mod rms_norm;
pub(super) mod rotary;
pub(super) mod softmax;
pub(super) mod swiglu;

#[cfg(test)]
mod tests;

/// One translation unit.
const SOURCES: [&str; 7] = [
    include_str!("common.cu"),
    include_str!("rms_norm.cu"),
    include_str!("rotary.cu"),
    include_str!("swiglu.cu"),
    include_str!("softmax.cu"),
    include_str!("reduce.cu"),
    include_str!("optimizer.cu"),
];

/// Why the kernels are not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Compiler(#[from] nvrtc::Error),
    #[error(transparent)]
    Driver(#[from] driver::Error),
    #[error(
        "the CUDA kernels are loaded on device {loaded} and cannot be on device {device} too: one process, one device"
    )]
    OtherDevice { loaded: usize, device: usize },
}

/// Where kernels run.
pub(super) enum Launcher {
    Cuda(Module),
    #[cfg(test)]
    Emulator(Emulator),
}

static LAUNCHER: OnceLock<Launcher> = OnceLock::new();

/// Compiles the kernels for `device` and uses them from now on. libtorch's CUDA half must be loaded.
///
/// Takes a few seconds. Gives one line for the log: compiler, architecture and the number of kernels. Without it the room
/// works on the device by plain tensor operations.
pub fn load(device: usize) -> Result<String, Error> {
    let capability = driver::device(device)?.capability;
    driver::Stream::current(device)?;
    let compiler = Nvrtc::open(&nvrtc::candidates())?;
    let names = names();
    let image = compiler.compile(&source(), &names, capability, &[])?;
    let launcher = Launcher::Cuda(Module::load(device, &image)?);
    match LAUNCHER.get_or_init(|| launcher) {
        Launcher::Cuda(module) if module.device() != device => {
            Err(Error::OtherDevice { loaded: module.device(), device })
        }
        _ => Ok(format!("{} kernels for {} by {}", names.len(), image.architecture, compiler.describe())),
    }
}

/// The kernels for a tensor, where they are loaded on its device and take its kind.
pub(super) fn launcher(x: &Tensor) -> Option<&'static Launcher> {
    let Device::Cuda(device) = x.device() else { return None };
    let launcher = LAUNCHER.get()?;
    let here = match launcher {
        Launcher::Cuda(module) => module.device() == device,
        #[cfg(test)]
        Launcher::Emulator(_) => false,
    };
    (here && matches!(x.kind(), Kind::Float | Kind::BFloat16)).then_some(launcher)
}

impl Launcher {
    /// Puts a kernel on libtorch's current stream.
    fn launch(&self, kernel: &str, grid: Grid, arguments: &[Argument]) {
        assert!(grid.blocks > 0 && grid.blocks < 1 << 31, "invariant: a grid along x, got {grid:?}");
        match self {
            Self::Cuda(module) => {
                let stream = driver::Stream::current(module.device());
                let launched = stream.and_then(|stream| module.launch(kernel, grid, stream, arguments));
                launched.unwrap_or_else(|error| panic!("kernel {kernel}: {error}"));
            }
            #[cfg(test)]
            Self::Emulator(emulator) => emulator.launch(kernel, grid, arguments),
        }
    }

    /// A new tensor whose elements have no value yet, beside `like`.
    fn empty(&self, shape: &[i64], kind: Kind, like: &Tensor) -> Tensor {
        match self {
            Self::Cuda(_) => Tensor::empty(shape, (kind, like.device())),
            #[cfg(test)]
            Self::Emulator(emulator) => emulator.empty(shape, kind),
        }
    }
}

/// All kernels' text.
fn source() -> String {
    optimizer::books() + &SOURCES.concat()
}

/// All kernels, as the launches name them.
fn names() -> Vec<String> {
    let typed = [
        "rms_norm_forward",
        "rms_norm_apply",
        "rms_norm_backward",
        "rotary",
        "swiglu_forward",
        "swiglu_backward",
        "softmax_statistics",
        "softmax_gradient",
        "softmax_cross_difference",
        "softmax_divergence_gradient",
        "sum_of_squares",
    ];
    let kinds = [Kind::Float, Kind::BFloat16];
    let mut names: Vec<String> = typed.iter().flat_map(|kernel| kinds.map(|kind| named(kernel, &[kind]))).collect();
    for kernel in ["adamw", "sgd"] {
        names.extend(kinds.iter().flat_map(|&weights| kinds.map(|grad| named(kernel, &[weights, grad]))));
    }
    names.extend(["column_sums".to_owned(), "sum_doubles".to_owned()]);
    names
}

/// A kernel for these element types.
fn named(kernel: &str, kinds: &[Kind]) -> String {
    let name = |kind: &Kind| match kind {
        Kind::Float => "float",
        Kind::BFloat16 => "bf16",
        other => panic!("invariant: kernels take f32 and bf16, got {other:?}"),
    };
    format!("{kernel}<{}>", kinds.iter().map(name).collect::<Vec<_>>().join(", "))
}

/// Rows and width of a matrix.
fn size(x: &Tensor) -> (usize, usize) {
    let (rows, width) = x.size2().expect("invariant: a matrix");
    assert!(width < 1 << 30, "invariant: rows below 2^30 elements, got {width}");
    (rows as usize, width as usize)
}

/// Threads for one row: one for every 8 elements, whole warps, within bounds.
fn threads(width: usize, most: usize) -> usize {
    width.div_ceil(8).next_multiple_of(32).min(most)
}
