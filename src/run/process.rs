//! Facts about this process: what it runs on, its memory, the time.

use serde_json::json;
use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};

use super::Context;
use crate::abi::driver;

/// Versions of what this process runs on.
pub fn libraries(context: &Context) -> serde_json::Value {
    json!({ "libtorch": "2.11.0", "tch": "0.24.0", "mpi": context.mpi_version })
}

/// Seconds since 1970.
pub fn unix_seconds() -> f64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0.0, |time| time.as_secs_f64())
}

/// Memory of the device that is in use, by this process unless it shares the device: libtorch gives nothing back, so this is the
/// largest that it has held, its own context and NCCL's buffers included. 0 on a CPU. Unit: bytes.
pub fn device_bytes(device: tch::Device) -> u64 {
    match device {
        tch::Device::Cuda(index) => driver::memory_info(index).map_or(0, |(free, total)| total - free),
        _ => 0,
    }
}

/// Memory of this process at the moment.
pub fn resident_bytes() -> u64 {
    let (Ok(pid), Ok(mut system)) = (sysinfo::get_current_pid(), System::new()) else { return 0 };
    let memory = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, memory);
    system.process(pid).map_or(0, sysinfo::Process::memory)
}
