//! Ranks: the mesh, the groups over its axes, and the transports that carry their collectives.
//!
//! A collective is called by all ranks of its group, in the same program order. Nothing here knows what is being summed.

mod group;
mod mesh;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
pub mod planned;
mod tcp;
mod threads;
mod watchdog;
pub mod wire;
mod world;

pub use group::{Group, Pending, Reduce, Traffic};
pub use mesh::{Mesh, MeshError, part};
pub use tcp::{Peers, Rendezvous};
pub use threads::{Fault, run_threads, run_threads_with};
pub use watchdog::Watchdog;
#[cfg(feature = "mpi")]
pub use world::mpi_world;
pub use world::{World, tcp_world};
