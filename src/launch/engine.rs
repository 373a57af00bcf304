//! The site's engine and how it is called: `mpirun` of Open MPI or MPICH, or `srun`.

use super::sites::Job;

/// A process to start: what is added to the environment, the program, its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    pub environment: Vec<(String, String)>,
    pub program: String,
    pub arguments: Vec<String>,
}

/// Whose MPI the binary was built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    OpenMpi5,
    OpenMpi4,
    Mpich,
}

impl Dialect {
    /// Of the library's own words, such as "Open MPI v5.0.11".
    pub fn of_version(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        if text.contains("mpich") || text.contains("mvapich") || text.contains("intel") {
            return Some(Self::Mpich);
        }
        let behind = text.split("open mpi v").nth(1)?;
        let major: u32 = behind.split('.').next()?.parse().ok()?;
        Some(if major >= 5 { Self::OpenMpi5 } else { Self::OpenMpi4 })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    Mpirun,
    Srun,
}

#[derive(Clone, Debug)]
pub struct Engine {
    pub flavour: Flavour,
    pub dialect: Dialect,
    pub program: String,
    /// Where the MPI library is installed; `srun` must tell it.
    pub prefix: Option<String>,
    /// Quiet seconds after which Open MPI's daemons ask whether the other side is still there.
    pub keepalive: u64,
    /// Ranks before their lines.
    pub label: bool,
    /// Further arguments, as given.
    pub extra: Vec<String>,
    /// The hosts are those of the Slurm job: the engine knows them.
    pub allocated: bool,
}

impl Engine {
    /// The command that starts `run` on every rank. `environment`: for the ranks; `all_hosts`: none of the job's hosts was left out.
    pub fn command(&self, job: &Job, environment: &[(String, String)], run: &[String], all_hosts: bool) -> Command {
        let mut arguments = match self.flavour {
            Flavour::Mpirun => self.mpirun(job, all_hosts),
            Flavour::Srun => self.srun(job, all_hosts),
        };
        if self.flavour == Flavour::Mpirun && self.dialect != Dialect::Mpich {
            // MPICH and srun hand over everything
            arguments.extend(environment.iter().flat_map(|(name, _)| ["-x".to_owned(), name.clone()]));
        }
        arguments.extend(self.extra.iter().cloned());
        arguments.extend(run.iter().cloned());
        let environment = self.settings().into_iter().chain(environment.iter().cloned()).collect();
        Command { environment, program: self.program.clone(), arguments }
    }

    /// A command that succeeds where the engine reaches `host`.
    pub fn probe(&self, host: &str) -> Command {
        let words: Vec<&str> = match (self.flavour, self.dialect) {
            (Flavour::Srun, _) => vec!["--ntasks=1", "--nodes=1", "--overlap", "--mpi=none", "--nodelist", host],
            (_, Dialect::Mpich) => vec!["-n", "1", "-hosts", host],
            _ => vec!["-n", "1", "--host", host],
        };
        let words = words.into_iter().map(str::to_owned).chain(self.extra.iter().cloned());
        let arguments = words.chain(["true".to_owned()]).collect();
        Command { environment: self.settings(), program: self.program.clone(), arguments }
    }

    fn mpirun(&self, job: &Job, all_hosts: bool) -> Vec<String> {
        let ranks = job.ranks.to_string();
        let hosts = job.host_list();
        // inside a Slurm job mpirun asks Slurm; hosts are named there only to leave some out
        let known = job.hosts.is_empty() || (self.allocated && all_hosts);
        let mut words = vec!["-n", &ranks];
        match self.dialect {
            Dialect::Mpich => {
                if !known {
                    words.extend(["-hosts", &hosts]);
                }
                words.extend(["-bind-to", "none"]);
                if self.label {
                    words.push("-prepend-rank");
                }
            }
            Dialect::OpenMpi4 | Dialect::OpenMpi5 => {
                if !known {
                    words.extend(["--host", &hosts]);
                }
                // on this machine alone, slots are cores; ranks may outnumber them
                if job.hosts.is_empty() {
                    words.push("--oversubscribe");
                }
                // ranks bind themselves, by the cores and ranks of their host
                words.extend(["--bind-to", "none"]);
                if self.label {
                    words.extend(if self.dialect == Dialect::OpenMpi5 {
                        &["--output", "tag"][..]
                    } else {
                        &["--tag-output"]
                    });
                }
            }
        }
        words.into_iter().map(str::to_owned).collect()
    }

    fn srun(&self, job: &Job, all_hosts: bool) -> Vec<String> {
        let mut words = vec![format!("--ntasks={}", job.ranks)];
        let slots = job.hosts.first().map_or(0, |host| host.slots);
        if slots > 0 && job.hosts.iter().all(|host| host.slots == slots) && job.ranks == slots * job.hosts.len() {
            words.push(format!("--ntasks-per-node={slots}"));
        }
        if !all_hosts || !self.allocated {
            words.push(format!("--nodes={}", job.hosts.len()));
            let names: Vec<&str> = job.hosts.iter().map(|host| host.name.as_str()).collect();
            words.push(format!("--nodelist={}", names.join(",")));
        }
        let pmi = if self.dialect == Dialect::Mpich { "--mpi=pmi2" } else { "--mpi=pmix" };
        words.extend([pmi, "--cpu-bind=none", "--kill-on-bad-exit=1", "--export=ALL"].map(str::to_owned));
        if self.label {
            words.push("--label".to_owned());
        }
        words
    }

    /// Variables of the engine itself.
    fn settings(&self) -> Vec<(String, String)> {
        let mut set: Vec<(String, String)> = Vec::new();
        let mut put = |name: &str, value: &str| set.push((name.to_owned(), value.to_owned()));
        if self.dialect != Dialect::Mpich {
            // more ranks than cores, where mpirun cannot see it: those that wait leave their core to those that work
            put("OMPI_MCA_mpi_yield_when_idle", "1");
        }
        match (self.flavour, self.dialect) {
            (Flavour::Mpirun, Dialect::OpenMpi4 | Dialect::OpenMpi5) => {
                // without effect but in containers, where everybody is root
                put("OMPI_ALLOW_RUN_AS_ROOT", "1");
                put("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
                let family = if self.dialect == Dialect::OpenMpi5 { "PRTE" } else { "OMPI" };
                let every = (self.keepalive / 5).max(1);
                put(&format!("{family}_MCA_oob_tcp_keepalive_time"), &self.keepalive.to_string());
                put(&format!("{family}_MCA_oob_tcp_keepalive_intvl"), &every.to_string());
                put(&format!("{family}_MCA_oob_tcp_keepalive_probes"), "3");
            }
            (Flavour::Srun, Dialect::OpenMpi4 | Dialect::OpenMpi5) => {
                // Slurm's default fence lets ranks go too early: some then fail in MPI_Init
                put("SLURM_PMIX_FENCE", "ring");
                if let Some(prefix) = &self.prefix {
                    put("OPAL_PREFIX", prefix);
                }
            }
            (_, Dialect::Mpich) => {}
        }
        set
    }
}

/// A word as a shell wants it.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

impl std::fmt::Display for Command {
    /// As a shell takes it: a line for each variable, the program with its arguments on the last.
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        for (name, value) in &self.environment {
            writeln!(f, "{name}={} \\", quote(value))?;
        }
        write!(f, "{}", quote(&self.program))?;
        self.arguments.iter().try_for_each(|word| write!(f, " {}", quote(word)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_told_apart() {
        for (text, expected) in [
            ("Open MPI v5.0.11", Some(Dialect::OpenMpi5)),
            ("Open MPI v4.1.4", Some(Dialect::OpenMpi4)),
            ("MPICH Version:      5.0.2", Some(Dialect::Mpich)),
            ("Intel(R) MPI Library 2021.9", Some(Dialect::Mpich)),
            ("", None),
        ] {
            assert_eq!(Dialect::of_version(text), expected, "{text}");
        }
    }

    #[test]
    fn words_for_a_shell() {
        assert_eq!(quote("a=b"), "a=b");
        assert_eq!(quote("it's [1, 2]"), r"'it'\''s [1, 2]'");
        assert_eq!(quote(""), "''");
    }
}
