//! dunlearn: a distributed unlearning trainer for large language models. See ARCHITECTURE.md for the rooms and their
//! invariants.

pub mod abi;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod dist;
pub mod doctor;
pub mod eval;
pub mod kernels;
pub mod launch;
pub mod model;
pub mod plan;
pub mod report;
pub mod run;
pub mod scope;
pub mod telemetry;
pub mod train;
pub mod unlearn;
pub mod weights;
