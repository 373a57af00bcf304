//! The only room with `unsafe`: libtorch's C ABI, tensor memory as slices, raw MPI, the CUDA driver and its compiler, and
//! process-wide host settings.
//!
//! Everything that leaves this room is safe to call. It must not know what the tensors mean.

pub mod dispatcher;
pub mod driver;
#[cfg(test)]
pub mod emulator;
pub mod host;
pub mod library;
pub mod module;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod nvrtc;
pub mod parallel;
pub mod slices;
pub mod storage;
#[cfg(test)]
pub mod tests;

/// First line of a libtorch error; the C++ backtrace behind it helps no user.
pub fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
