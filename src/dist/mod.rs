//! Ranks: the mesh, the groups over its axes, the transports that carry their collectives, and the record of what was called.
//!
//! A collective is called by all ranks of its group, in the same program order. Nothing here knows what is being summed.

mod divergence;
mod flight;
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

pub use divergence::{Parting, parting, report, verdict};
pub use flight::{Dump, Failed};
pub use group::{Group, Pending, Reduce, Traffic};
pub use mesh::{Mesh, MeshError, part};
pub use tcp::{MeetError, Peers, Rendezvous};
pub use threads::{Fault, run_threads, run_threads_with};
pub use watchdog::{ASK, Alarm, Phase, Watchdog};
#[cfg(feature = "mpi")]
pub use world::mpi_world;
pub use world::{World, tcp_world};
