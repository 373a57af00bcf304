//! Which cores a rank computes on: whole cores, neighbours together, each in one rank only.

use std::path::Path;

/// A hardware thread and the core that it is half of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub package: usize,
    pub core: usize,
    /// The system's number of the hardware thread.
    pub cpu: usize,
}

/// What the system says of hardware threads `cpus`; one that it says nothing of counts as a core.
pub fn topology(cpus: &[usize]) -> Vec<Place> {
    topology_in(Path::new("/sys/devices/system/cpu"), cpus)
}

fn topology_in(folder: &Path, cpus: &[usize]) -> Vec<Place> {
    let read = |cpu: usize, name: &str| {
        let path = folder.join(format!("cpu{cpu}/topology/{name}"));
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<usize>().ok())
    };
    let place = |&cpu: &usize| Place {
        package: read(cpu, "physical_package_id").unwrap_or(0),
        core: read(cpu, "core_id").unwrap_or(cpu),
        cpu,
    };
    cpus.iter().map(place).collect()
}

/// The hardware threads of rank `index` of the `ranks` on a host, and how many cores they are; None where there are fewer cores than
/// ranks, or one rank, which may have all.
pub fn share(places: &[Place], index: usize, ranks: usize) -> Option<(Vec<usize>, usize)> {
    let mut sorted = places.to_vec();
    sorted.sort_unstable();
    let cores: Vec<&[Place]> = sorted.chunk_by(|a, b| (a.package, a.core) == (b.package, b.core)).collect();
    if ranks < 2 || cores.len() < ranks || index >= ranks {
        return None;
    }
    let each = cores.len() / ranks;
    let mine = &cores[index * each..(index + 1) * each];
    Some((mine.iter().flat_map(|core| core.iter().map(|place| place.cpu)).collect(), each))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two packages of four cores with two threads each, numbered as Linux does: first threads first.
    fn machine() -> Vec<Place> {
        (0..16).map(|cpu| Place { package: cpu / 4 % 2, core: cpu % 4, cpu }).collect()
    }

    #[test]
    fn ranks_get_whole_neighbouring_cores() {
        assert_eq!(share(&machine(), 0, 4), Some((vec![0, 8, 1, 9], 2)));
        assert_eq!(share(&machine(), 3, 4), Some((vec![6, 14, 7, 15], 2)));
        assert_eq!(share(&machine(), 2, 3), Some((vec![4, 12, 5, 13], 2)), "two cores stay free");
        assert_eq!(share(&machine(), 0, 1), None);
        assert_eq!(share(&machine(), 0, 9), None);
    }

    #[test]
    fn what_the_system_says_is_read() {
        let folder = tempfile::tempdir().unwrap();
        for (cpu, core) in [(0, 5), (3, 5)] {
            let topology = folder.path().join(format!("cpu{cpu}/topology"));
            std::fs::create_dir_all(&topology).unwrap();
            std::fs::write(topology.join("core_id"), format!("{core}\n")).unwrap();
            std::fs::write(topology.join("physical_package_id"), "1\n").unwrap();
        }
        let place = |package, core, cpu| Place { package, core, cpu };
        assert_eq!(topology_in(folder.path(), &[0, 3, 7]), [place(1, 5, 0), place(1, 5, 3), place(0, 7, 7)]);
    }

    proptest! {
        #[test]
        fn no_core_is_in_two_ranks(packages in 1usize..3, cores in 1usize..9, threads in 1usize..3, ranks in 2usize..9) {
            let all = packages * cores * threads;
            let places: Vec<Place> = (0..all).map(|cpu| Place { package: cpu / cores % packages, core: cpu % cores, cpu }).collect();
            let shares: Vec<_> = (0..ranks).map(|index| share(&places, index, ranks)).collect();
            if packages * cores < ranks {
                prop_assert!(shares.iter().all(Option::is_none));
            } else {
                let mut cpus: Vec<usize> = shares.iter().flat_map(|share| share.clone().unwrap().0).collect();
                let count = cpus.len();
                cpus.sort_unstable();
                cpus.dedup();
                prop_assert_eq!(cpus.len(), count);
                prop_assert_eq!(count, packages * cores / ranks * ranks * threads);
            }
        }
    }
}
