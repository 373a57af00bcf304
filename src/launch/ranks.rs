//! How this process was started: alone, or as one rank of a job.

use crate::dist::Rendezvous;

/// Launch facts from the environment, before MPI is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Rank as the launcher says; 0 when started alone.
    pub rank: usize,
    /// Ranks as the launcher says.
    pub world: usize,
    /// The launcher speaks to MPI.
    pub by_mpi: bool,
    /// Where the ranks of a launcher without MPI meet.
    pub meeting: Option<Rendezvous>,
}

impl Launched {
    /// Open MPI and PRRTE set `OMPI_COMM_WORLD_*`; Slurm's PMIx plugin `PMIX_RANK`; MPICH and PMI launchers `PMI_*`. Without any
    /// of them, the four variables of PyTorch's launchers say where the ranks meet: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
    /// `MASTER_PORT`.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| lookup(name).and_then(|text| text.parse::<usize>().ok());
        let pair = |rank, world| Some((rank?, world?)).filter(|(rank, world)| rank < world);
        let open_mpi = pair(number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE"));
        let pmi = pair(number("PMI_RANK"), number("PMI_SIZE"));
        // a batch script has SLURM_NTASKS too, but runs once and has no step of its own
        let in_step = lookup("SLURM_STEP_ID").is_some_and(|id| id.parse::<u32>().is_ok());
        let tasks = number("SLURM_STEP_NUM_TASKS").or_else(|| number("SLURM_NTASKS"));
        let slurm = pair(number("SLURM_PROCID"), tasks).filter(|_| in_step);
        let by_mpi = open_mpi.is_some() || pmi.is_some() || lookup("PMIX_RANK").is_some();
        if let (false, Some(meeting)) = (by_mpi, meeting(&lookup)) {
            return Self { rank: meeting.rank, world: meeting.world, by_mpi, meeting: Some(meeting) };
        }
        let alone = || (number("PMIX_RANK").unwrap_or(0), 1);
        let (rank, world) = open_mpi.or(pmi).or(slurm).unwrap_or_else(alone);
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
    use std::collections::HashMap;

    use proptest::prelude::*;

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

    const NAMES: [&str; 14] = [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_RANK",
        "PMI_SIZE",
        "PMIX_RANK",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_ID",
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
    ];

    proptest! {
        /// Whatever variables of launchers are there, however odd: no panic, and a rank below the number of ranks wherever the
        /// launcher told both.
        #[test]
        fn any_environment_gives_a_place(values in proptest::collection::vec(proptest::option::of("[0-9]{1,3}|True|n1|-1||4294967295"), NAMES.len())) {
            let set: HashMap<&str, String> = NAMES.into_iter().zip(values).filter_map(|(name, value)| Some((name, value?))).collect();
            let found = Launched::from_lookup(|name| set.get(name).cloned());
            if found.world > 1 && found.meeting.is_none() {
                prop_assert!(found.rank < found.world, "{found:?} from {set:?}");
            }
            prop_assert!(!(found.by_mpi && found.meeting.is_some()));
        }

        /// Each launcher's own variables are believed before those of what it runs inside of.
        #[test]
        fn the_innermost_launcher_wins(rank in 0usize..64, more in 1usize..64, outer in 1usize..999) {
            let world = rank + more;
            for (names, by_mpi) in [(["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"], true), (["PMI_RANK", "PMI_SIZE"], true)] {
                let text = [rank.to_string(), world.to_string(), outer.to_string()];
                let set = [(names[0], &*text[0]), (names[1], &*text[1]), ("SLURM_NTASKS", &*text[2]), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0")];
                prop_assert_eq!(launched(&set), Launched { rank, world, by_mpi, meeting: None });
            }
        }
    }
}
