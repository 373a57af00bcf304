//! The only room with `unsafe`: libtorch's C ABI, tensor memory as slices, raw MPI, NCCL, the CUDA driver and its compiler,
//! and process-wide host settings.
//!
//! Everything that leaves this room is safe to call. It must not know what the tensors mean.

#[cfg(test)]
pub mod dispatcher;
pub mod driver;
#[cfg(test)]
pub mod emulator;
pub mod host;
pub mod library;
pub mod module;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod nccl;
pub mod nvrtc;
pub mod parallel;
pub mod signals;
pub mod slices;
pub mod storage;
#[cfg(test)]
pub mod tests;
pub mod torch_cuda;
pub mod upload;

/// First line of a libtorch error; the C++ backtrace behind it helps no user.
pub fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
