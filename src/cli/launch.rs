//! How this process was started: alone, or as one rank of a job.

use std::env;

use crate::dist::Rendezvous;

/// Launch facts from the environment, before MPI is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Launched {
    /// Rank as the launcher says; 0 when started alone.
    pub(super) rank: usize,
    /// Ranks as the launcher says.
    pub(super) world: usize,
    /// The launcher speaks to MPI.
    pub(super) by_mpi: bool,
    /// Where the ranks of a launcher without MPI meet.
    pub(super) meeting: Option<Rendezvous>,
}

impl Launched {
    pub(super) fn from_environment() -> Self {
        Self::from_lookup(|name| env::var(name).ok())
    }

    /// Open MPI and PRRTE set `OMPI_COMM_WORLD_*`; Slurm's PMIx plugin `PMIX_RANK`; MPICH and PMI launchers `PMI_*`. Without any
    /// of them, the four variables of PyTorch's launchers say where the ranks meet: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
    /// `MASTER_PORT`.
    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| lookup(name).and_then(|text| text.parse::<usize>().ok());
        let slurm = (number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS").or_else(|| number("SLURM_NTASKS")));
        let open_mpi = (number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE"));
        let pmi = (number("PMI_RANK"), number("PMI_SIZE"));
        let by_mpi = open_mpi.1.is_some() || pmi.0.is_some() || lookup("PMIX_RANK").is_some();
        let (rank, world) = match (open_mpi, pmi, slurm) {
            ((Some(rank), Some(world)), _, _) | (_, (Some(rank), Some(world)), _) => (rank, world),
            // a batch script has SLURM_NTASKS too, but runs once and has no step of its own
            (_, _, (Some(rank), Some(world)))
                if lookup("SLURM_STEP_ID").is_some_and(|id| id.parse::<u32>().is_ok()) =>
            {
                (rank, world)
            }
            _ => (number("PMIX_RANK").unwrap_or(0), 1),
        };
        if let (false, Some(meeting)) = (by_mpi, meeting(&lookup)) {
            return Self { rank: meeting.rank, world: meeting.world, by_mpi, meeting: Some(meeting) };
        }
        Self { rank, world, by_mpi, meeting: None }
    }
}

fn meeting(lookup: impl Fn(&str) -> Option<String>) -> Option<Rendezvous> {
    let number = |name: &str| lookup(name).and_then(|text| text.parse::<usize>().ok());
    let (rank, world) = (number("RANK")?, number("WORLD_SIZE").filter(|&world| world > 1)?);
    let (host, port) = (lookup("MASTER_ADDR")?, u16::try_from(number("MASTER_PORT")?).ok()?);
    // torchrun itself listens on the port that it tells
    let taken = lookup("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True");
    Some(Rendezvous { rank, world, host, port: if taken { port.wrapping_add(1) } else { port } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launched(environment: &[(&str, &str)]) -> Launched {
        Launched::from_lookup(|name| {
            environment.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn launchers_are_told_apart() {
        let of = |rank, world, by_mpi| Launched { rank, world, by_mpi, meeting: None };
        assert_eq!(launched(&[]), of(0, 1, false));
        let mpirun = [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4"), ("SLURM_NTASKS", "8")];
        assert_eq!(launched(&mpirun), of(3, 4, true));
        let srun = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2"), ("SLURM_STEP_ID", "0")];
        assert_eq!(launched(&srun), of(1, 2, false));
        let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")];
        assert_eq!(launched(&batch), of(0, 1, false));
        let mpich = [("PMI_RANK", "1"), ("PMI_SIZE", "2")];
        assert_eq!(launched(&mpich), of(1, 2, true));
        let torchrun = [("RANK", "2"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "node1"), ("MASTER_PORT", "29500")];
        let meeting = |port| Rendezvous { rank: 2, world: 4, host: "node1".to_owned(), port };
        let meets = |port| Launched { meeting: Some(meeting(port)), ..of(2, 4, false) };
        assert_eq!(launched(&torchrun), meets(29500));
        assert_eq!(launched(&[&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat()), meets(29501));
        assert_eq!(launched(&torchrun[..3]), of(0, 1, false));
        assert_eq!(launched(&[&torchrun[..], &mpirun[..]].concat()), of(3, 4, true));
    }
}
