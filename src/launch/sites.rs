//! What there is to run on, and whether the ranks fit: refused before anything starts.

use thiserror::Error;

use super::hosts::{Host, expand_counts, expand_nodes};

/// Why nothing is started.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LaunchError {
    #[error("how many ranks? Say --np, --hosts or --hostfile, or set parallel.dp; parallel.tp is {tp}")]
    HowMany { tp: usize },
    #[error("parallel.tp = {tp} does not divide {ranks} ranks; take --np {}", tp * (ranks / tp).max(1))]
    TpDoesNotDivide { tp: usize, ranks: usize },
    #[error("parallel.tp = {tp} x parallel.dp = {dp} needs {} ranks, not {ranks}; take --np {}, or dp = \"auto\"", tp * dp, tp * dp)]
    WrongRanks { tp: usize, dp: usize, ranks: usize },
    #[error(
        "{ranks} ranks are more than the {slots} slots of {whose}; take --np {slots} or fewer, or more slots a host"
    )]
    TooManyRanks { ranks: usize, slots: usize, whose: String },
    #[error("{0}")]
    Said(String),
}

/// What Slurm has given to the job that this process runs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    pub job: String,
    pub hosts: Vec<Host>,
    /// How often the job was put back into the queue.
    pub restarts: usize,
}

impl Allocation {
    /// None outside a job.
    ///
    /// # Errors
    /// In words: a variable of Slurm's that cannot be read.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, LaunchError> {
        let Some(job) = lookup("SLURM_JOB_ID") else { return Ok(None) };
        let Some(nodes) = lookup("SLURM_JOB_NODELIST").or_else(|| lookup("SLURM_NODELIST")) else { return Ok(None) };
        let said = |name: &str, why: String| LaunchError::Said(format!("{name}: {why}"));
        let names = expand_nodes(&nodes).map_err(|why| said("SLURM_JOB_NODELIST", why))?;
        let counts = match lookup("SLURM_TASKS_PER_NODE") {
            Some(text) => expand_counts(&text).map_err(|why| said("SLURM_TASKS_PER_NODE", why))?,
            None => vec![1; names.len()],
        };
        if counts.len() != names.len() {
            let why = format!("counts for {} nodes, SLURM_JOB_NODELIST names {}", counts.len(), names.len());
            return Err(said("SLURM_TASKS_PER_NODE", why));
        }
        let hosts = names.into_iter().zip(counts).map(|(name, slots)| Host { name, slots }).collect();
        let restarts = lookup("SLURM_RESTART_COUNT").and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok(Some(Self { job, hosts, restarts }))
    }
}

/// Ranks and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub ranks: usize,
    /// Empty: this machine, or what the engine finds by itself.
    pub hosts: Vec<Host>,
    pub tp: usize,
    pub dp: Option<usize>,
}

impl Job {
    /// `ranks`: as asked for; otherwise as many as the hosts have slots, or as the configuration fixes.
    ///
    /// # Errors
    /// A layout that does not divide, or more ranks than slots.
    pub fn new(ranks: Option<usize>, hosts: Vec<Host>, tp: usize, dp: Option<usize>) -> Result<Self, LaunchError> {
        let slots = hosts.iter().map(|host| host.slots).sum::<usize>();
        let known = ranks.or((slots > 0).then_some(slots)).or(dp.map(|dp| tp * dp));
        let ranks = known.filter(|&ranks| ranks > 0).ok_or(LaunchError::HowMany { tp })?;
        match dp {
            Some(dp) if tp * dp != ranks => return Err(LaunchError::WrongRanks { tp, dp, ranks }),
            None if !ranks.is_multiple_of(tp) => return Err(LaunchError::TpDoesNotDivide { tp, ranks }),
            _ => {}
        }
        if slots > 0 && ranks > slots {
            return Err(LaunchError::TooManyRanks { ranks, slots, whose: list(&hosts) });
        }
        Ok(Self { ranks, hosts, tp, dp })
    }

    /// Hosts as `a:4,b:4`.
    pub fn host_list(&self) -> String {
        list(&self.hosts)
    }
}

fn list(hosts: &[Host]) -> String {
    let each = hosts.iter().map(|host| format!("{}:{}", host.name, host.slots));
    each.collect::<Vec<_>>().join(",")
}

/// The job on the hosts that are left: as many ranks as fit and the layout divides. None where that is not allowed or not possible.
pub fn fewer(job: &Job, left: Vec<Host>, min_nodes: usize) -> Option<Job> {
    let slots = left.iter().map(|host| host.slots).sum::<usize>();
    let ranks = (slots / job.tp * job.tp).min(job.ranks);
    (left.len() >= min_nodes.max(1)).then(|| Job::new(Some(ranks), left, job.tp, job.dp).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hosts(slots: &[usize]) -> Vec<Host> {
        slots.iter().enumerate().map(|(i, &slots)| Host { name: format!("n{i}"), slots }).collect()
    }

    #[test]
    fn impossible_layouts_are_refused() {
        let said = |ranks, slots: &[usize], tp, dp| Job::new(ranks, hosts(slots), tp, dp).unwrap_err().to_string();
        assert_eq!(said(Some(6), &[], 4, None), "parallel.tp = 4 does not divide 6 ranks; take --np 4");
        assert_eq!(said(Some(2), &[], 4, None), "parallel.tp = 4 does not divide 2 ranks; take --np 4");
        assert_eq!(
            said(Some(6), &[], 2, Some(2)),
            "parallel.tp = 2 x parallel.dp = 2 needs 4 ranks, not 6; take --np 4, or dp = \"auto\""
        );
        assert_eq!(
            said(Some(8), &[2, 2], 2, None),
            "8 ranks are more than the 4 slots of n0:2,n1:2; take --np 4 or fewer, or more slots a host"
        );
        assert!(said(None, &[], 2, None).starts_with("how many ranks?"));
        assert_eq!(Job::new(None, hosts(&[4, 4]), 2, None).unwrap().ranks, 8);
        assert_eq!(Job::new(None, Vec::new(), 2, Some(3)).unwrap().ranks, 6);
    }

    #[test]
    fn slurms_variables() {
        let environment = |name: &str| {
            let set = [
                ("SLURM_JOB_ID", "7"),
                ("SLURM_JOB_NODELIST", "n[1-3]"),
                ("SLURM_TASKS_PER_NODE", "2(x2),1"),
                ("SLURM_RESTART_COUNT", "1"),
            ];
            set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        let found = Allocation::from_lookup(environment).unwrap().unwrap();
        assert_eq!(list(&found.hosts), "n1:2,n2:2,n3:1");
        assert_eq!((found.job.as_str(), found.restarts), ("7", 1));
        assert_eq!(Allocation::from_lookup(|_| None).unwrap(), None);
        let odd = |name: &str| if name == "SLURM_TASKS_PER_NODE" { Some("2".to_owned()) } else { environment(name) };
        let text = Allocation::from_lookup(odd).unwrap_err().to_string();
        assert_eq!(text, "SLURM_TASKS_PER_NODE: counts for 1 nodes, SLURM_JOB_NODELIST names 3");
    }

    proptest! {
        #[test]
        fn with_fewer_hosts_the_layout_still_divides(slots in proptest::collection::vec(1usize..9, 1..8), tp in 1usize..9, gone in 0usize..8, min in 1usize..4) {
            let Ok(job) = Job::new(Some(slots.iter().sum::<usize>() / tp * tp), hosts(&slots), tp, None) else { return Ok(()) };
            let mut left = job.hosts.clone();
            left.remove(gone % left.len());
            let room: usize = left.iter().map(|host| host.slots).sum();
            match fewer(&job, left.clone(), min) {
                Some(next) => {
                    prop_assert!(next.ranks.is_multiple_of(tp) && next.ranks <= room && next.ranks <= job.ranks);
                    prop_assert!(next.ranks + tp > room.min(job.ranks) && left.len() >= min);
                }
                None => prop_assert!(room < tp || left.len() < min),
            }
        }
    }
}
