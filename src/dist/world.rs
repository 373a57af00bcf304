//! What one rank knows of the job: its place and the groups it belongs to.

use std::rc::Rc;
use std::time::Duration;

use super::group::Group;
use super::mesh::Mesh;
use super::nccl::Nccl;
use super::tcp::{Peers, Tcp};
use super::watchdog::Watchdog;
use crate::abi::nccl::{Comm, Nccl as Library, UniqueId};

/// One rank's view of the job. Clones are of the same groups.
#[derive(Clone)]
pub struct World {
    pub mesh: Mesh,
    /// All ranks.
    pub world: Rc<Group>,
    /// The ranks that hold the other shards of this rank's model copy.
    pub tp: Rc<Group>,
    /// The ranks that hold the same shard of the other copies.
    pub dp: Rc<Group>,
    pub watchdog: Watchdog,
    /// The other ranks are not there, see [`super::planned`].
    pub planned: bool,
}

impl World {
    /// Lets the tensor- and data-parallel groups carry tensors of GPU `device` over NCCL. All ranks call it, before the groups
    /// are shared.
    ///
    /// `timeout`: how long a rank waits for the others to join; `max_ctas`: see [`Comm::init`].
    ///
    /// # Errors
    /// NCCL's own words, or who did not come.
    pub fn with_nccl(
        mut self,
        library: Library,
        device: usize,
        timeout: Duration,
        max_ctas: Option<i32>,
    ) -> Result<Self, String> {
        for (group, axis, beside) in [(&mut self.tp, "tp", false), (&mut self.dp, "dp", true)] {
            let group = Rc::get_mut(group).expect("invariant: called before the groups are shared");
            if group.size() == 1 {
                continue;
            }
            // one rank draws the id; its failure reaches all through the length
            let drawn =
                if group.is_first() { library.unique_id().map(|id| id.bytes().to_vec()) } else { Ok(Vec::new()) };
            let told = group.broadcast_bytes(drawn.as_deref().unwrap_or_default(), 0);
            drawn?;
            let id = UniqueId::from_bytes(&told).ok_or(format!("the first rank of {axis} could not start NCCL"))?;
            let comm = Comm::init(library, id, group.rank(), group.size(), axis, timeout, max_ctas)?;
            group.carry_devices(Box::new(Nccl::new(comm, device, beside)));
        }
        Ok(self)
    }

    /// The only rank of a job; needs no MPI.
    pub fn solo() -> Self {
        let mesh = Mesh { rank: 0, tp: 1, dp: 1 };
        let group = |axis| Rc::new(Group::solo(axis));
        Self {
            mesh,
            world: group("world"),
            tp: group("tp"),
            dp: group("dp"),
            watchdog: Watchdog::new(std::time::Duration::MAX),
            planned: false,
        }
    }

    pub fn is_first(&self) -> bool {
        self.mesh.rank == 0
    }
}

/// The groups of a job whose ranks have met over TCP. Collective over all ranks.
///
/// `dp`: None means world size / tp.
pub fn tcp_world(
    peers: &Rc<Peers>,
    tp: usize,
    dp: Option<usize>,
    watchdog: Watchdog,
) -> Result<World, super::mesh::MeshError> {
    let mesh = Mesh::new(peers.rank(), peers.world(), tp, dp)?;
    let group = |axis, number: usize, members: Vec<usize>| {
        let rank = members.iter().position(|&rank| rank == mesh.rank).expect("invariant: own groups");
        let carrier = Tcp::new(peers, number as u32, &members);
        Rc::new(Group::new(axis, rank, members.len(), Box::new(carrier), &watchdog))
    };
    let row = (0..tp).map(|i| mesh.dp_rank() * tp + i).collect();
    let column = (0..mesh.dp).map(|i| i * tp + mesh.tp_rank()).collect();
    Ok(World {
        mesh,
        world: group("world", 0, (0..mesh.world()).collect()),
        tp: group("tp", 1 + mesh.dp_rank(), row),
        dp: group("dp", 1 + mesh.dp + mesh.tp_rank(), column),
        watchdog: watchdog.clone(),
        planned: false,
    })
}

/// The groups of an MPI job. Collective over all ranks.
///
/// `dp`: None means world size / tp.
#[cfg(feature = "mpi")]
pub fn mpi_world(
    environment: &crate::abi::mpi::Environment,
    tp: usize,
    dp: Option<usize>,
    watchdog: Watchdog,
) -> Result<World, super::mesh::MeshError> {
    use super::mpi::Mpi;

    let all = environment.world();
    let mesh = Mesh::new(all.rank(), all.size(), tp, dp)?;
    let row = all.split(mesh.dp_rank());
    let column = all.split(mesh.tp_rank());
    let group = |axis, comm: crate::abi::mpi::Comm| {
        let (rank, size) = (comm.rank(), comm.size());
        Rc::new(Group::new(axis, rank, size, Box::new(Mpi::new(comm)), &watchdog))
    };
    Ok(World {
        mesh,
        tp: group("tp", row),
        dp: group("dp", column),
        world: group("world", all),
        watchdog: watchdog.clone(),
        planned: false,
    })
}
