//! How this process was started: alone, or as one rank of a job.

use std::env;

/// Launch facts from the environment, before MPI is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Launched {
    /// Rank as the launcher says; 0 when started alone.
    pub(super) rank: usize,
    /// Ranks as the launcher says.
    pub(super) world: usize,
    /// The launcher speaks to MPI.
    pub(super) by_mpi: bool,
}

impl Launched {
    pub(super) fn from_environment() -> Self {
        Self::from_lookup(|name| env::var(name).ok())
    }

    /// Open MPI and PRRTE set `OMPI_COMM_WORLD_*`; Slurm's PMIx plugin `PMIX_RANK`; MPICH and PMI launchers `PMI_*`.
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
        Self { rank, world, by_mpi }
    }
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
        assert_eq!(launched(&[]), Launched { rank: 0, world: 1, by_mpi: false });
        let mpirun = [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4"), ("SLURM_NTASKS", "8")];
        assert_eq!(launched(&mpirun), Launched { rank: 3, world: 4, by_mpi: true });
        let srun = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2"), ("SLURM_STEP_ID", "0")];
        assert_eq!(launched(&srun), Launched { rank: 1, world: 2, by_mpi: false });
        let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")];
        assert_eq!(launched(&batch), Launched { rank: 0, world: 1, by_mpi: false });
        let mpich = [("PMI_RANK", "1"), ("PMI_SIZE", "2")];
        assert_eq!(launched(&mpich), Launched { rank: 1, world: 2, by_mpi: true });
    }
}
