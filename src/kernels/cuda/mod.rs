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

/// Every kernel and its parameters. `T` and `G` point to the element types in the kernel's name, `F`, `D`, `L` to f32, f64,
/// i64; `m`, `s`, `c` are an optional moment, f32, bf16; `i` and `f` are numbers. The emulator holds launches against the
/// sources' own parameters, a launch on a GPU is held against this.
const KERNELS: [(&str, &str); 15] = [
    ("rms_norm_forward<T>", "TTTFiifi"),
    ("rms_norm_apply<T>", "TTTFiii"),
    ("rms_norm_backward<T>", "TTTTFFiiii"),
    ("column_sums", "FFii"),
    ("rotary<T>", "TFFiiiif"),
    ("swiglu_forward<T>", "TTi"),
    ("swiglu_backward<T>", "TTTTi"),
    ("softmax_statistics<T>", "TLFi"),
    ("softmax_gradient<T>", "TFFLi"),
    ("softmax_cross_difference<T>", "TTFFi"),
    ("softmax_divergence_gradient<T>", "TFTFFi"),
    ("sum_of_squares<T>", "TDii"),
    ("sum_doubles", "DDi"),
    ("adamw<T, G>", "TGmsimsisscifffffff"),
    ("sgd<T, G>", "TGmsisscifff"),
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
/// works on the device by plain tensor operations. A second call for the same device does the work in vain.
pub fn load(device: usize) -> Result<String, Error> {
    if let Some(Launcher::Cuda(module)) = LAUNCHER.get().filter(|loaded| !loaded.is_on(device)) {
        return Err(Error::OtherDevice { loaded: module.device(), device });
    }
    let capability = driver::device(device)?.capability;
    driver::Stream::current(device)?;
    let compiler = Nvrtc::open(&nvrtc::candidates())?;
    let names = names();
    let image = compiler.compile(&source(), &names, capability, &[])?;
    let launcher = Launcher::Cuda(Module::load(device, &image)?);
    LAUNCHER.get_or_init(|| launcher);
    Ok(format!("{} kernels for {} by {}", names.len(), image.architecture, compiler.describe()))
}

/// The kernels for a tensor, where they are loaded on its device and take its kind.
pub(super) fn launcher(x: &Tensor) -> Option<&'static Launcher> {
    let Device::Cuda(device) = x.device() else { return None };
    let launcher = LAUNCHER.get()?;
    (launcher.is_on(device) && matches!(x.kind(), Kind::Float | Kind::BFloat16)).then_some(launcher)
}

impl Launcher {
    fn is_on(&self, device: usize) -> bool {
        match self {
            Self::Cuda(module) => module.device() == device,
            #[cfg(test)]
            Self::Emulator(_) => false,
        }
    }

    /// Puts a kernel of [`KERNELS`] for these element types on libtorch's current stream.
    fn launch(&self, kernel: &str, kinds: &[Kind], grid: Grid, arguments: &[Argument]) {
        assert!(grid.blocks > 0 && grid.blocks < 1 << 31, "invariant: a grid along x, got {grid:?}");
        let parameters = KERNELS.iter().find(|(name, _)| *name == kernel).map_or("", |(_, parameters)| parameters);
        let fit = parameters.len() == arguments.len()
            && parameters.bytes().zip(arguments).all(|(parameter, argument)| fits(parameter, argument, kinds));
        assert!(fit, "invariant: {kernel} for {kinds:?} takes {parameters}, got {arguments:?}");
        let name = named(kernel, kinds);
        match self {
            Self::Cuda(module) => {
                let stream = driver::Stream::current(module.device());
                let launched = stream.and_then(|stream| module.launch(&name, grid, stream, arguments));
                launched.unwrap_or_else(|error| panic!("kernel {name}: {error}"));
            }
            #[cfg(test)]
            Self::Emulator(emulator) => emulator.launch(&name, grid, arguments),
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

/// All kernels for all element types, as [`named`] has them.
fn names() -> Vec<String> {
    let kinds = [Kind::Float, Kind::BFloat16];
    let names = |(kernel, _): &(&str, &str)| match kernel.matches(['T', 'G']).count() {
        0 => vec![named(kernel, &[])],
        1 => kinds.map(|kind| named(kernel, &[kind])).to_vec(),
        _ => kinds.iter().flat_map(|&first| kinds.map(|second| named(kernel, &[first, second]))).collect(),
    };
    KERNELS.iter().flat_map(names).collect()
}

/// A kernel's name in the sources' language.
fn named(kernel: &str, kinds: &[Kind]) -> String {
    let mut name = kernel.to_owned();
    for (letter, kind) in ["T", "G"].iter().zip(kinds) {
        let kind = match kind {
            Kind::Float => "float",
            Kind::BFloat16 => "bf16",
            other => panic!("invariant: kernels take f32 and bf16, got {other:?}"),
        };
        name = name.replace(letter, kind);
    }
    name
}

/// Whether an argument is what [`KERNELS`] says of a parameter.
fn fits(parameter: u8, argument: &Argument, kinds: &[Kind]) -> bool {
    match (parameter, argument) {
        (b'i', Argument::Int(_)) | (b'f', Argument::Float(_)) | (b'm' | b's' | b'c', Argument::Absent) => true,
        (_, Argument::Tensor(tensor)) => match parameter {
            b'T' => kinds.first() == Some(&tensor.kind()),
            b'G' => kinds.get(1) == Some(&tensor.kind()),
            b'F' | b's' => tensor.kind() == Kind::Float,
            b'D' => tensor.kind() == Kind::Double,
            b'L' => tensor.kind() == Kind::Int64,
            b'c' => tensor.kind() == Kind::BFloat16,
            b'm' => matches!(tensor.kind(), Kind::Float | Kind::BFloat16 | Kind::Uint8),
            _ => false,
        },
        _ => false,
    }
}

/// Panics unless each tensor has so many elements: a kernel would read beside it.
fn lengths<const N: usize>(expected: [(&Tensor, usize); N]) {
    for (tensor, len) in expected {
        assert!(tensor.numel() == len, "invariant: {len} elements, got {:?}", tensor.size());
    }
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
