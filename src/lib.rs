//! dunlearn: a distributed unlearning trainer for large language models. See ARCHITECTURE.md for the rooms and their
//! invariants.

pub mod abi;
pub mod config;
pub mod dist;
pub mod kernels;
pub mod model;
