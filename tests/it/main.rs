//! All integration tests in one binary: each binary would link libtorch again.

#![allow(clippy::print_stderr, clippy::print_stdout)]

mod attacks;
mod checkpoints;
mod evaluations;
mod failures;
mod faults;
mod generation;
mod golden_logits;
mod golden_step;
mod launch;
mod layouts;
mod membership;
mod methods;
mod planned;
mod planning;
mod program;
mod recipes;
mod report;
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
