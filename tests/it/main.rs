//! All integration tests in one binary: each binary would link libtorch again.

#![allow(clippy::print_stderr, clippy::print_stdout)]

mod checkpoints;
mod failures;
mod faults;
mod golden_logits;
mod golden_step;
mod layouts;
mod methods;
mod planned;
mod program;
mod recipes;
mod resume;
mod runs;
mod scopes;
mod structure;
mod subspace;
mod tiny;
mod toy_head;
mod watch;
mod weights;
mod without_mpi;
