//! Which device a rank computes on: decided once, by all ranks alike, before any tensor is on one.

use std::time::Duration;

use anyhow::bail;
use tch::Device;

use crate::abi::{driver, host, nccl, torch_cuda};
use crate::config;
use crate::dist::World;
use crate::kernels;

/// What was decided.
pub(super) struct Chosen {
    pub(super) world: World,
    pub(super) device: Device,
    /// For the log: what this rank computes on, or why not on a GPU.
    pub(super) about: String,
}

/// Most thread blocks of a collective where ranks share a GPU: the kernels of all ranks must fit beside each other.
const SHARED_CTAS: i32 = 4;

/// Decides. All ranks call it.
///
/// # Errors
/// Where `cuda` is asked for and some rank has no GPU, or where ranks would have to share one without leave.
pub(super) fn choose(asked: config::Device, share: bool, world: World, timeout: Duration) -> anyhow::Result<Chosen> {
    if asked == config::Device::Cpu {
        return Ok(Chosen { world, device: Device::Cpu, about: "computing on CPUs".to_owned() });
    }
    let mine = Here::look(world.mesh.world() > 1);
    let all = world.world.gather_bytes(mine.to_line().as_bytes());
    let all: Vec<Here> = all.iter().map(|line| Here::from_line(&String::from_utf8_lossy(line))).collect();
    match place(&all, world.mesh.rank, share) {
        Ok(place) => on_gpu(place, &mine, world, timeout),
        Err(reason) if asked == config::Device::Cuda => bail!("run.device = \"cuda\": {reason}"),
        Err(reason) => Ok(Chosen { world, device: Device::Cpu, about: format!("computing on CPUs: {reason}") }),
    }
}

fn on_gpu(place: Place, mine: &Here, world: World, timeout: Duration) -> anyhow::Result<Chosen> {
    let Place { device, shared } = place;
    torch_cuda::set_device(device);
    let mut about = driver::device(device).map_or_else(|error| error.to_string(), |gpu| gpu.name);
    tracing::debug!("GPU {device} of {}: {about}", mine.host);
    about = format!("computing on GPUs: {about}");
    let world = if world.mesh.world() > 1 {
        let library = nccl::Nccl::load().map_err(anyhow::Error::msg)?;
        if shared {
            share_gpu(library, world.mesh.rank);
        }
        about = format!("{about}; NCCL {}", library.version_text());
        world.with_nccl(library, device, timeout, shared.then_some(SHARED_CTAS)).map_err(anyhow::Error::msg)?
    } else {
        world
    };
    match kernels::cuda::load(device) {
        Ok(compiled) => about = format!("{about}; kernels {compiled}"),
        Err(reason) => about = format!("{about}; without its own kernels, slower: {reason}"),
    }
    Ok(Chosen { world, device: Device::Cuda(device), about })
}

/// Tells NCCL, before its first call, that ranks share a GPU: it refuses that otherwise. From 2.30 there is a switch for it;
/// older versions take ranks with different host names for different hosts and use sockets between them.
fn share_gpu(library: nccl::Nccl, rank: usize) {
    if library.version() >= 23_000 {
        host::set_variable("NCCL_MULTI_RANK_GPU_ENABLE", "1");
    } else {
        host::set_variable("NCCL_HOSTID", &format!("rank{rank}"));
        for (name, value) in [("NCCL_P2P_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1"), ("NCCL_IB_DISABLE", "1")] {
            host::set_variable(name, value);
        }
        if std::env::var_os("NCCL_SOCKET_IFNAME").is_none() {
            host::set_variable("NCCL_SOCKET_IFNAME", "lo");
        }
    }
}

/// What one rank sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Here {
    host: String,
    /// Identities of the GPUs that this rank may use, in libtorch's order.
    gpus: Vec<String>,
    /// Why there are none, or why they are of no use.
    reason: String,
}

/// A rank's GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    device: usize,
    /// Another rank has the same.
    shared: bool,
}

impl Here {
    /// Loads what GPUs need. `several`: ranks will have to talk.
    fn look(several: bool) -> Self {
        let host = sysinfo::System::host_name().unwrap_or_default();
        let look = || -> Result<Vec<String>, String> {
            // without a driver nobody needs to hear which of the vendor's libraries are missing too
            driver::device_count().map_err(|error| match error {
                driver::Error::Driver(_) => "no NVIDIA driver (libcuda.so.1) here".to_owned(),
                error => error.to_string(),
            })?;
            torch_cuda::load()?;
            let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
            if count == 0 {
                return Err("libtorch sees no GPU; CUDA_VISIBLE_DEVICES may hide them".to_owned());
            }
            if several {
                nccl::Nccl::load()?;
            }
            (0..count).map(|device| driver::identity(device).map_err(|error| error.to_string())).collect()
        };
        match look() {
            Ok(gpus) => Self { host, gpus, reason: String::new() },
            Err(reason) => Self { host, gpus: Vec::new(), reason },
        }
    }

    fn to_line(&self) -> String {
        [self.host.clone(), self.gpus.join(","), self.reason.replace(['\n', '\t'], " ")].join("\t")
    }

    fn from_line(line: &str) -> Self {
        let mut parts = line.split('\t').map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        let (host, gpus, reason) = (next(), next(), next());
        let gpus = gpus.split(',').filter(|gpu| !gpu.is_empty()).map(str::to_owned).collect();
        Self { host, gpus, reason }
    }
}

/// The GPU of rank `rank`: the next of those that the ranks of its host see alike, or the only one that a launcher left to it.
///
/// # Errors
/// In words, naming the host, where a rank has none or where two would have the same and may not share.
fn place(all: &[Here], rank: usize, share: bool) -> Result<Place, String> {
    if let Some((without, here)) = all.iter().enumerate().find(|(_, here)| here.gpus.is_empty()) {
        let who = if all.len() == 1 { String::new() } else { format!("rank {without} on {}: ", here.host) };
        return Err(format!("{who}{}", here.reason));
    }
    let index = |rank: usize| {
        let here = &all[rank];
        let before = all[..rank].iter().filter(|other| other.host == here.host && other.gpus == here.gpus).count();
        (before, before % here.gpus.len())
    };
    let identity = |rank: usize| (&all[rank].host, &all[rank].gpus[index(rank).1]);
    for (first, second) in (0..all.len()).flat_map(|b| (0..b).map(move |a| (a, b))) {
        if !share && identity(first) == identity(second) {
            let here = &all[second];
            let ranks = all.iter().filter(|other| other.host == here.host).count();
            return Err(format!(
                "ranks {first} and {second} would share a GPU of {}, which has {} for {ranks} ranks; start fewer ranks there, or set \
                 run.allow_shared_gpu = true to try things out",
                here.host,
                here.gpus.len()
            ));
        }
    }
    let shared = (0..all.len()).any(|other| other != rank && identity(other) == identity(rank));
    Ok(Place { device: index(rank).1, shared })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(host: &str, gpus: &[&str]) -> Here {
        Here { host: host.to_owned(), gpus: gpus.iter().map(|&gpu| gpu.to_owned()).collect(), reason: String::new() }
    }

    #[test]
    fn ranks_take_the_gpus_of_their_host_in_order() {
        let all = [here("a", &["0", "1"]), here("a", &["0", "1"]), here("b", &["0", "1"]), here("b", &["0", "1"])];
        let places: Vec<_> = (0..4).map(|rank| place(&all, rank, false).unwrap()).collect();
        assert_eq!(places.iter().map(|place| place.device).collect::<Vec<_>>(), [0, 1, 0, 1]);
        assert!(places.iter().all(|place| !place.shared));
        // a launcher that leaves one GPU to each rank
        let bound = [here("a", &["u0"]), here("a", &["u1"])];
        assert_eq!(place(&bound, 1, false), Ok(Place { device: 0, shared: false }));
    }

    #[test]
    fn sharing_needs_leave() {
        let all = vec![here("a", &["0"]); 3];
        let text = place(&all, 0, false).unwrap_err();
        assert!(text.starts_with("ranks 0 and 1 would share a GPU of a, which has 1 for 3 ranks"), "{text}");
        assert_eq!(place(&all, 2, true), Ok(Place { device: 0, shared: true }));
    }

    #[test]
    fn a_rank_without_a_gpu_is_named() {
        let blind = Here { reason: "no driver".to_owned(), ..here("b", &[]) };
        assert_eq!(place(&[here("a", &["0"]), blind.clone()], 0, false).unwrap_err(), "rank 1 on b: no driver");
        assert_eq!(place(std::slice::from_ref(&blind), 0, false).unwrap_err(), "no driver");
        assert_eq!(Here::from_line(&blind.to_line()), blind);
        let full = here("a", &["x", "y"]);
        assert_eq!(Here::from_line(&full.to_line()), full);
    }
}
