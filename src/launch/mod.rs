//! Starting ranks and looking after them: hosts, engines, batch scripts, supervision, and the exit codes by which a launcher
//! tells what a retry can cure from what it cannot.
//!
//! Starts processes of the site's own engine (`mpirun`, `srun`, `sbatch`), never a daemon of its own. Knows no tensors and not
//! how a run computes. The environment and the terminal come in as values.

mod attempt;
pub mod binding;
mod codes;
mod engine;
mod hosts;
mod journal;
mod judge;
mod notes;
mod ranks;
mod script;
mod sites;
mod supervisor;

pub use codes::{Code, Verdict};
pub use engine::{Command, Dialect, Engine, Flavour, quote};
pub use hosts::{Host, expand_nodes, parse_hostfile, parse_hosts};
pub use notes::{Ending, Notes};
pub use ranks::Launched;
pub use script::{Batch, script};
pub use sites::{Allocation, Job, LaunchError, fewer};
pub use supervisor::{NOTES, Outlet, Plan, Policy, Stream, supervise};
