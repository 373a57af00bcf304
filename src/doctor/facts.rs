//! What a rank says of itself, and what follows from what all have said.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::Device;

use super::{Line, Verdict};
use crate::abi::{host, signals};

/// One rank and its host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub rank: usize,
    pub host: String,
    /// Ranks that the launcher has started, as its environment says.
    pub launched: usize,
    pub version: String,
    /// Digest of this program's file.
    pub program: String,
    pub libtorch: String,
    pub mpi: Option<String>,
    pub nccl: Option<String>,
    /// Cores that this rank may use.
    pub cores: Vec<usize>,
    pub memory: u64,
    pub available: u64,
    /// Bytes that may be locked, files that may be open; None: unlimited.
    pub locked: Option<u64>,
    pub files: Option<u64>,
    /// Free bytes of /dev/shm.
    pub shared: Option<u64>,
    /// Network interfaces that are up: name, MTU, Mbit/s where the system knows.
    pub networks: Vec<Network>,
    /// InfiniBand and RoCE adapters.
    pub adapters: Vec<String>,
    /// Variables that steer communication and threads.
    pub environment: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Network {
    pub name: String,
    pub mtu: u64,
    pub speed: Option<u64>,
}

impl Facts {
    /// Looks. `environment`: of this process.
    pub fn look(rank: usize, launched: usize, environment: impl Iterator<Item = (String, String)>) -> Self {
        let memory = sysinfo::System::new().map_or((0, 0), |mut system| {
            system.refresh_memory();
            (system.total_memory(), system.available_memory())
        });
        let (locked, files) = host::limits();
        Self {
            rank,
            host: sysinfo::System::host_name().unwrap_or_default(),
            launched,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            program: program_digest(),
            libtorch: loaded("libtorch_cpu.so"),
            mpi: None,
            nccl: None,
            cores: host::allowed_cores(),
            memory: memory.0,
            available: memory.1,
            locked,
            files,
            shared: signals::free_bytes(Path::new("/dev/shm")),
            networks: networks(),
            adapters: names("/sys/class/infiniband"),
            environment: environment.filter(|(name, _)| is_relevant(name)).collect(),
        }
    }
}

fn program_digest() -> String {
    let path = std::env::current_exe().unwrap_or_default();
    let mut hasher = blake3::Hasher::new();
    match hasher.update_mmap(&path) {
        Ok(hasher) => hasher.finalize().to_hex()[..16].to_owned(),
        Err(error) => format!("{}: {error}", path.display()),
    }
}

/// Path and size of a library in this process, and a digest of both its ends: the build's identity is in the first.
fn loaded(name: &str) -> String {
    const END: u64 = 1 << 20;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(path) = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.ends_with(name))
    else {
        return format!("{name} is not loaded");
    };
    let ends = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&size.to_le_bytes());
        for from in [0, size.saturating_sub(END)] {
            file.seek(SeekFrom::Start(from))?;
            let mut bytes = Vec::new();
            (&file).take(END).read_to_end(&mut bytes)?;
            hasher.update(&bytes);
        }
        Ok(format!("{name} of {} MiB ({})", size >> 20, &hasher.finalize().to_hex()[..16]))
    };
    ends().unwrap_or_else(|error| format!("{path}: {error}"))
}

fn names(folder: &str) -> Vec<String> {
    let listed = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = listed.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn networks() -> Vec<Network> {
    let read = |name: &str, what: &str| {
        let text = std::fs::read_to_string(format!("/sys/class/net/{name}/{what}")).unwrap_or_default();
        text.trim().to_owned()
    };
    let up = |name: &String| name != "lo" && read(name, "operstate") != "down";
    let about = |name: String| Network {
        mtu: read(&name, "mtu").parse().unwrap_or(0),
        // the kernel says -1 where it does not know
        speed: read(&name, "speed").parse().ok(),
        name,
    };
    names("/sys/class/net").into_iter().filter(up).map(about).collect()
}

fn is_relevant(name: &str) -> bool {
    const PREFIXES: [&str; 10] =
        ["NCCL_", "OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_", "UCX_", "FI_", "OMP_", "MKL_", "GOMP_", "DUNLEARN_"];
    const NAMES: [&str; 5] = ["CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "LD_PRELOAD", "MASTER_ADDR", "MASTER_PORT"];
    // what a launcher tells each rank of its job is no setting
    let of_the_job = [
        "OMPI_MCA_orte_",
        "OMPI_MCA_ess",
        "OMPI_MCA_pmix",
        "OMPI_MCA_PREFIXES",
        "OMPI_MCA_cpu_type",
        "OMPI_MCA_initial_wdir",
        "OMPI_MCA_num_procs",
        "PMIX_MCA_mca_base",
        "PMIX_MCA_psec",
        "PRTE_MCA_ess",
    ];
    (PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || NAMES.contains(&name))
        && !of_the_job.iter().any(|prefix| name.starts_with(prefix))
}

/// Everything that can be judged from words.
pub(super) fn judge(ranks: &[Facts]) -> Vec<Line> {
    let hosts = hosts(ranks);
    let mut lines = vec![started(ranks, &hosts)];
    type Part = (&'static str, fn(&Facts) -> String);
    let parts: [Part; 5] = [
        ("dunlearn", |facts| format!("{} ({})", facts.version, facts.program)),
        ("libtorch", |facts| facts.libtorch.clone()),
        ("MPI", |facts| facts.mpi.clone().unwrap_or_else(|| "none".to_owned())),
        ("NCCL", |facts| facts.nccl.clone().unwrap_or_else(|| "none".to_owned())),
        ("variables", |facts| {
            let words = facts.environment.iter().filter(|(name, _)| *name != "CUDA_VISIBLE_DEVICES");
            words.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        }),
    ];
    for (what, value) in parts {
        lines.push(equal(what, ranks, value));
    }
    lines.extend([cores(ranks, &hosts), memory(ranks, &hosts), limits(ranks), shared(ranks, &hosts)]);
    lines.extend([network(ranks, &hosts)]);
    lines.extend(settings(ranks, &hosts));
    lines
}

/// Ranks of each host.
fn hosts(ranks: &[Facts]) -> BTreeMap<&str, Vec<&Facts>> {
    let mut hosts: BTreeMap<&str, Vec<&Facts>> = BTreeMap::new();
    ranks.iter().for_each(|facts| hosts.entry(&facts.host).or_default().push(facts));
    hosts
}

fn started(ranks: &[Facts], hosts: &BTreeMap<&str, Vec<&Facts>>) -> Line {
    let counts: Vec<String> = hosts.iter().map(|(host, on)| format!("{} on {host}", on.len())).collect();
    let found = format!("{}: {}", ranks.len(), counts.join(", "));
    let launched = ranks.iter().map(|facts| facts.launched).max().unwrap_or(0);
    if launched != ranks.len() {
        let advice =
            format!("the launcher says {launched}: is mpirun or srun that of the MPI this program was built with?");
        return Line::new("ranks", Verdict::Fail, found, advice);
    }
    let most = hosts.values().map(Vec::len).max().unwrap_or(0);
    let least = hosts.values().map(Vec::len).min().unwrap_or(0);
    let verdict = if most == least { Verdict::Pass } else { Verdict::Warn };
    Line::new("ranks", verdict, found, "hosts have different numbers of ranks; the fullest one sets the pace")
}

fn equal(what: &str, ranks: &[Facts], value: impl Fn(&Facts) -> String) -> Line {
    let mut values: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    ranks.iter().for_each(|facts| values.entry(value(facts)).or_default().push(facts.rank));
    if values.len() == 1 {
        let only = values.into_keys().next().unwrap_or_default();
        let only = if only.is_empty() { "none that steers anything".to_owned() } else { only };
        return Line::new(what, Verdict::Pass, only, "");
    }
    let first = |of: &[usize]| {
        if of.len() == 1 { format!("rank {}", of[0]) } else { format!("ranks {} and {} more", of[0], of.len() - 1) }
    };
    // of long values the words that not all have
    let words: Vec<BTreeSet<&str>> = values.keys().map(|value| value.split(' ').collect()).collect();
    let common = words[1..].iter().fold(words[0].clone(), |all, these| &all & these);
    let shown = values.iter().map(|(value, of)| {
        let own: Vec<&str> = value.split(' ').filter(|word| !common.contains(word)).collect();
        format!("{} on {}", if own.is_empty() { "nothing else".to_owned() } else { own.join(" ") }, first(of))
    });
    let found = shown.collect::<Vec<_>>().join("; ");
    let verdict = if what == "variables" { Verdict::Warn } else { Verdict::Fail };
    Line::new(
        what,
        verdict,
        found,
        format!("{what} must be the same on all ranks; look at PATH, modules and mpirun -x"),
    )
}

fn cores(ranks: &[Facts], hosts: &BTreeMap<&str, Vec<&Facts>>) -> Line {
    let shares = hosts.iter().map(|(host, on)| {
        let seen: BTreeSet<usize> = on.iter().flat_map(|facts| facts.cores.iter().copied()).collect();
        (seen.len() as f64 / on.len() as f64, *host, seen.len(), on.len())
    });
    let Some((share, host, seen, on)) = shares.min_by(|a, b| a.0.total_cmp(&b.0)) else {
        return Line::new("cores", Verdict::Pass, "none", "");
    };
    let threads =
        ranks.iter().filter_map(|facts| facts.environment.get("OMP_NUM_THREADS")?.parse::<usize>().ok()).max();
    let found = format!("{seen} for {on} ranks on {host}");
    match threads {
        _ if share < 1.0 => Line::new(
            "cores",
            Verdict::Warn,
            found,
            "more ranks than cores: waiting ranks take time from working ones; bind fewer, or set OMPI_MCA_mpi_yield_when_idle=1",
        ),
        Some(threads) if threads as f64 > share.max(1.0) => {
            let advice = format!(
                "OMP_NUM_THREADS={threads} wants more cores than a rank's share; unset it, run.threads finds the share"
            );
            Line::new("cores", Verdict::Warn, found, advice)
        }
        _ => Line::new("cores", Verdict::Pass, found, ""),
    }
}

fn memory(ranks: &[Facts], hosts: &BTreeMap<&str, Vec<&Facts>>) -> Line {
    let least = ranks.iter().min_by_key(|facts| facts.available / hosts[facts.host.as_str()].len() as u64);
    let Some(least) = least else { return Line::new("memory", Verdict::Pass, "none", "") };
    let on = hosts[least.host.as_str()].len() as u64;
    let each = least.available / on;
    let gib = |bytes: u64| bytes as f64 / 1073741824.0;
    let found = format!(
        "{:.1} of {:.1} GiB free on {}, {:.1} GiB a rank",
        gib(least.available),
        gib(least.memory),
        least.host,
        gib(each)
    );
    let verdict = if each < 1 << 30 { Verdict::Warn } else { Verdict::Pass };
    Line::new(
        "memory",
        verdict,
        found,
        "less than 1 GiB for each rank; `dunlearn bench rank` measures what a configuration needs",
    )
}

fn limits(ranks: &[Facts]) -> Line {
    let words = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let least = |of: fn(&Facts) -> Option<u64>| ranks.iter().filter_map(of).min();
    let (locked, files) = (least(|facts| facts.locked), least(|facts| facts.files));
    let found = format!("files {}, locked memory {} bytes", words(files), words(locked));
    let needs_locking = ranks.iter().any(|facts| !facts.adapters.is_empty() || facts.nccl.is_some());
    if files.is_some_and(|files| files < 1024) {
        return Line::new("limits", Verdict::Warn, found, "few open files: ulimit -n 4096 before the launcher starts");
    }
    if needs_locking && locked.is_some_and(|locked| locked < 1 << 30) {
        let advice =
            "RDMA and NCCL lock memory: ulimit -l unlimited (for Slurm, in its limits: PropagateResourceLimits)";
        return Line::new("limits", Verdict::Warn, found, advice);
    }
    Line::new("limits", Verdict::Pass, found, "")
}

fn shared(ranks: &[Facts], hosts: &BTreeMap<&str, Vec<&Facts>>) -> Line {
    let each = |facts: &Facts| facts.shared.map(|free| free / hosts[facts.host.as_str()].len() as u64);
    let Some((least, host)) = ranks.iter().filter_map(|facts| Some((each(facts)?, &facts.host))).min() else {
        return Line::new(
            "/dev/shm",
            Verdict::Warn,
            "not there",
            "MPI and NCCL talk within a host through it; mount a tmpfs there",
        );
    };
    let found = format!("{} MiB free a rank on {host}", least >> 20);
    let verdict = if least < 32 << 20 { Verdict::Warn } else { Verdict::Pass };
    Line::new("/dev/shm", verdict, found, "containers give 64 MiB by default: --shm-size=8g, or --ipc=host")
}

fn network(ranks: &[Facts], hosts: &BTreeMap<&str, Vec<&Facts>>) -> Line {
    let Some(first) = ranks.first() else { return Line::new("network", Verdict::Pass, "none", "") };
    let words = |facts: &Facts| {
        let of = |net: &Network| {
            let speed = net.speed.map_or_else(String::new, |mbit| format!(", {mbit} Mbit/s"));
            format!("{} (MTU {}{speed})", net.name, net.mtu)
        };
        let nets: Vec<String> = facts.networks.iter().map(of).chain(facts.adapters.iter().cloned()).collect();
        if nets.is_empty() { "lo only".to_owned() } else { nets.join(", ") }
    };
    if hosts.len() < 2 {
        return Line::new("network", Verdict::Pass, format!("{}; one host", words(first)), "");
    }
    if let Some(alone) = ranks.iter().find(|facts| facts.networks.is_empty()) {
        let found = format!("{} has no network that is up", alone.host);
        return Line::new("network", Verdict::Fail, found, "hosts cannot reach each other; ask who runs the network");
    }
    let mtus = |facts: &Facts| facts.networks.iter().map(|net| (net.name.clone(), net.mtu)).collect::<BTreeMap<_, _>>();
    let names: BTreeMap<String, BTreeSet<u64>> =
        ranks.iter().flat_map(mtus).fold(BTreeMap::new(), |mut all, (name, mtu)| {
            all.entry(name).or_default().insert(mtu);
            all
        });
    if let Some((name, mtus)) = names.iter().find(|(_, mtus)| mtus.len() > 1) {
        let found = format!("{name} has MTUs {mtus:?} on different hosts");
        return Line::new(
            "network",
            Verdict::Warn,
            found,
            "large messages get lost or slow where MTUs differ; make them equal",
        );
    }
    Line::new("network", Verdict::Pass, words(first), "")
}

/// Settings that are known to go wrong.
fn settings(ranks: &[Facts], hosts: &BTreeMap<&str, Vec<&Facts>>) -> Vec<Line> {
    let value = |name: &str| ranks.iter().find_map(|facts| facts.environment.get(name));
    let mut lines = Vec::new();
    let mut warn =
        |check: &str, found: String, advice: &str| lines.push(Line::new(check, Verdict::Warn, found, advice));
    let several = hosts.len() > 1;
    if let Some(names) = value("NCCL_SOCKET_IFNAME").filter(|names| !names.starts_with(['=', '^'])) {
        let fits = |net: &&Network| names.split(',').any(|prefix| net.name.starts_with(prefix));
        let many = ranks.iter().any(|facts| facts.networks.iter().filter(fits).count() > 1);
        if many {
            let advice = "it is a prefix and fits several interfaces; write =NAME for exactly one";
            warn("NCCL_SOCKET_IFNAME", names.clone(), advice);
        }
    }
    for name in ["NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"] {
        if value(name).is_some_and(|value| value == "1") {
            warn(
                name,
                "1".to_owned(),
                "switches off a fast path between GPUs; unset it unless you know why it is there",
            );
        }
    }
    let keepalive = "PRTE_MCA_oob_tcp_keepalive_time";
    if several
        && ranks.iter().any(|facts| facts.mpi.as_ref().is_some_and(|mpi| mpi.contains("Open MPI")))
        && value(keepalive).is_none()
    {
        let advice = "mpirun notices a host that lost its power or link after 8 minutes; set it to 10, with ..._intvl=5 and ..._probes=3";
        warn(keepalive, "not set".to_owned(), advice);
    }
    lines
}

/// What the ranks compute on.
pub(super) fn device(about: &str, device: Device, ranks: &[Facts]) -> Line {
    let hidden = ranks.iter().any(|facts| facts.environment.get("CUDA_VISIBLE_DEVICES").is_some_and(String::is_empty));
    let verdict = if device == Device::Cpu { Verdict::Warn } else { Verdict::Pass };
    let advice = if hidden {
        "CUDA_VISIBLE_DEVICES is empty and hides all GPUs"
    } else {
        "fine for a small model; a large one wants GPUs: docs/gpu.md says what they need"
    };
    Line::new("devices", verdict, about, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(rank: usize, host: &str) -> Facts {
        Facts {
            rank,
            host: host.to_owned(),
            launched: 2,
            version: "1".to_owned(),
            cores: vec![0, 1],
            memory: 8 << 30,
            available: 8 << 30,
            files: Some(4096),
            shared: Some(1 << 30),
            networks: vec![Network { name: "eth0".to_owned(), mtu: 1500, speed: None }],
            mpi: Some("Open MPI v5.0.11".to_owned()),
            ..Facts::default()
        }
    }

    fn verdicts(ranks: &[Facts]) -> BTreeMap<String, (Verdict, String, String)> {
        let lines = judge(ranks).into_iter();
        lines.map(|line| (line.check, (line.verdict, line.found, line.advice))).collect()
    }

    #[test]
    fn equal_ranks_pass() {
        let all = verdicts(&[rank(0, "a"), rank(1, "a")]);
        assert!(all.values().all(|(verdict, _, advice)| *verdict == Verdict::Pass && advice.is_empty()), "{all:?}");
        assert_eq!(all["ranks"].1, "2: 2 on a");
    }

    /// Each of these is one change of one rank.
    #[test]
    fn what_differs_or_is_short_is_named() {
        type Change = fn(&mut Facts);
        let cases: [(Change, &str, Verdict, &str); 13] = [
            (|facts| facts.program = "f00d".into(), "dunlearn", Verdict::Fail, "(f00d) on rank 1"),
            (|facts| facts.mpi = None, "MPI", Verdict::Fail, "none on rank 1"),
            (|facts| facts.launched = 8, "ranks", Verdict::Fail, "2: 1 on a"),
            (|facts| facts.host = "a".into(), "ranks", Verdict::Pass, "2 on a"),
            (|facts| facts.available = 1 << 20, "memory", Verdict::Warn, "on b"),
            (|facts| facts.files = Some(100), "limits", Verdict::Warn, "files 100"),
            (|facts| facts.shared = Some(1 << 20), "/dev/shm", Verdict::Warn, "1 MiB"),
            (|facts| facts.shared = None, "/dev/shm", Verdict::Pass, "1024 MiB"),
            (|facts| facts.networks.clear(), "network", Verdict::Fail, "b has no network"),
            (|facts| facts.networks[0].mtu = 9000, "network", Verdict::Warn, "{1500, 9000}"),
            (|facts| facts.cores.clear(), "cores", Verdict::Warn, "0 for 1 ranks on b"),
            (
                |facts| drop(facts.environment.insert("NCCL_DEBUG".into(), "INFO".into())),
                "variables",
                Verdict::Warn,
                "NCCL_DEBUG=INFO on rank 1",
            ),
            (
                |facts| drop(facts.environment.insert("NCCL_IB_DISABLE".into(), "1".into())),
                "NCCL_IB_DISABLE",
                Verdict::Warn,
                "1",
            ),
        ];
        for (change, check, verdict, found) in cases {
            let mut second = rank(1, "b");
            change(&mut second);
            let all = verdicts(&[rank(0, "a"), second]);
            let line = &all[check];
            assert!(line.0 == verdict && line.1.contains(found), "{check}: {line:?}");
            assert_eq!(line.2.is_empty(), verdict == Verdict::Pass, "{check}: {line:?}");
        }
    }

    #[test]
    fn hosts_without_keepalive_are_warned() {
        let all = verdicts(&[rank(0, "a"), rank(1, "b")]);
        assert_eq!(all["PRTE_MCA_oob_tcp_keepalive_time"].0, Verdict::Warn);
        assert!(!verdicts(&[rank(0, "a"), rank(1, "a")]).contains_key("PRTE_MCA_oob_tcp_keepalive_time"));
    }

    #[test]
    fn a_prefix_of_several_interfaces_is_warned_of() {
        let mut one = rank(0, "a");
        one.environment.insert("NCCL_SOCKET_IFNAME".into(), "eth".into());
        assert!(!verdicts(&[one.clone()]).contains_key("NCCL_SOCKET_IFNAME"));
        one.networks.push(Network { name: "eth1".to_owned(), mtu: 1500, speed: None });
        assert_eq!(verdicts(&[one.clone()])["NCCL_SOCKET_IFNAME"].0, Verdict::Warn);
        one.environment.insert("NCCL_SOCKET_IFNAME".into(), "=eth0".into());
        assert!(!verdicts(&[one]).contains_key("NCCL_SOCKET_IFNAME"));
    }

    #[test]
    fn only_variables_that_steer_are_looked_at() {
        for name in ["NCCL_DEBUG", "OMPI_MCA_coll", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"] {
            assert!(is_relevant(name), "{name}");
        }
        for name in ["AWS_SECRET_ACCESS_KEY", "HOME", "OMPI_MCA_orte_ess_num_procs", "OMPI_MCA_PREFIXES", "PMIX_RANK"] {
            assert!(!is_relevant(name), "{name}");
        }
        let environment = [("NCCL_DEBUG", "INFO"), ("SECRET", "x")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        let facts = Facts::look(0, 1, environment.into_iter());
        assert_eq!(facts.environment.len(), 1);
        assert!(
            facts.memory > 0
                && facts.program.len() == 16
                && facts.libtorch.starts_with("libtorch_cpu.so of ")
                && facts.files.is_none_or(|files| files > 0),
            "{facts:?}"
        );
    }
}
