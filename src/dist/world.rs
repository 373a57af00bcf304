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

    /// Numbers that say what this rank has called, for [`Self::compare_calls`]: take the maximum of each over all ranks.
    ///
    /// Two a group, the digest of its calls and its negative, so that the maximum shows both ends; none of others' groups.
    pub fn calls(&self) -> Vec<f64> {
        let Mesh { tp, dp, .. } = self.mesh;
        let mut numbers = vec![f64::NEG_INFINITY; 2 * (1 + dp + tp)];
        let places = [(&self.world, 0), (&self.tp, 1 + self.mesh.dp_rank()), (&self.dp, 1 + dp + self.mesh.tp_rank())];
        for (digest, place) in places.into_iter().filter_map(|(group, place)| Some((group.digest()?, place))) {
            numbers[2 * place] = digest;
            numbers[2 * place + 1] = -digest;
        }
        numbers
    }

    /// Holds the maxima of all ranks' [`Self::calls`] against each other: the ranks of a group have called the same collectives.
    ///
    /// # Panics
    /// On all ranks where they have not: sums have then been made of numbers that do not belong together.
    #[track_caller]
    pub fn compare_calls(&self, maxima: &[f64]) {
        let Mesh { tp, dp, .. } = self.mesh;
        for (place, both) in maxima.chunks_exact(2).enumerate() {
            if both[0] == -both[1] || both[0] == f64::NEG_INFINITY {
                continue;
            }
            let of = |rank: usize| Mesh { rank, ..self.mesh };
            let (group, members) = match place {
                0 => (&self.world, (0..tp * dp).collect()),
                place if place <= dp => (&self.tp, of((place - 1) * tp).row()),
                place => (&self.dp, of(place - 1 - dp).column()),
            };
            panic!(
                "the ranks of {} {members:?} have called different collectives: what they have summed up does not belong together",
                group.axis()
            );
        }
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
        Rc::new(Group::new(axis, rank, &members, Box::new(carrier), &watchdog))
    };
    Ok(World {
        mesh,
        world: group("world", 0, (0..mesh.world()).collect()),
        tp: group("tp", 1 + mesh.dp_rank(), mesh.row()),
        dp: group("dp", 1 + mesh.dp + mesh.tp_rank(), mesh.column()),
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

    let all = watchdog.watch("the ranks to form their groups", || environment.world());
    let mesh = Mesh::new(all.rank(), all.size(), tp, dp)?;
    let (row, column) =
        watchdog.watch("the ranks to form their groups", || (all.split(mesh.dp_rank()), all.split(mesh.tp_rank())));
    let group = |axis, comm: crate::abi::mpi::Comm, members: Vec<usize>| {
        let rank = comm.rank();
        assert_eq!(comm.size(), members.len(), "invariant: {axis} is what the mesh says");
        Rc::new(Group::new(axis, rank, &members, Box::new(Mpi::new(comm)), &watchdog))
    };
    Ok(World {
        mesh,
        tp: group("tp", row, mesh.row()),
        dp: group("dp", column, mesh.column()),
        world: group("world", all, (0..mesh.world()).collect()),
        watchdog: watchdog.clone(),
        planned: false,
    })
}
