//! Hosts and how many ranks each takes: option lists, host files, Slurm's compressed names.

/// A machine of the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    pub name: String,
    /// Ranks that it takes.
    pub slots: usize,
}

impl Host {
    fn new(name: &str, slots: usize) -> Result<Self, String> {
        let odd =
            |c: char| c.is_whitespace() || c == ',' || c == ':' || c == '=' || c == '[' || c == ']' || c.is_control();
        if name.is_empty() || name.starts_with('-') || name.contains(odd) {
            return Err(format!("{name:?} is no host name"));
        }
        if slots == 0 {
            return Err(format!("{name} has 0 slots; leave it out"));
        }
        Ok(Self { name: name.to_owned(), slots })
    }
}

/// Hosts of `a:4,b:4`; without a number a host takes one rank. `node[01-03]:8` stands for three.
///
/// # Errors
/// In words, with the piece that cannot be read.
pub fn parse_hosts(text: &str) -> Result<Vec<Host>, String> {
    let mut hosts = Vec::new();
    for piece in split_outside_brackets(text)? {
        let (names, slots) = match piece.rsplit_once(':') {
            Some((names, slots)) => {
                let bad = || format!("{piece:?}: {slots:?} is no number of slots; expected HOST:SLOTS");
                (names, slots.parse::<usize>().map_err(|_| bad())?)
            }
            None => (piece, 1),
        };
        for name in expand_nodes(names)? {
            hosts.push(Host::new(&name, slots)?);
        }
    }
    distinct(hosts)
}

/// Hosts of a file as Open MPI (`name slots=4`) and MPICH (`name:4`) know it, a line each; `#` starts a comment. `max_slots=` is read over.
///
/// # Errors
/// In words, with the number of the line.
pub fn parse_hostfile(text: &str) -> Result<Vec<Host>, String> {
    let mut hosts = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let at = |why: String| format!("line {}: {why}", index + 1);
        let (name, mut slots) = match first.split_once(':') {
            Some((name, slots)) => {
                (name, slots.parse::<usize>().map_err(|_| at(format!("{slots:?} is no number of slots")))?)
            }
            None => (first, 1),
        };
        for word in words {
            match word.split_once('=') {
                Some(("slots", value)) => {
                    slots = value.parse().map_err(|_| at(format!("slots={value:?} is no number")))?;
                }
                Some(("max_slots" | "max-slots", _)) => {}
                _ => return Err(at(format!("{word:?} is not known here; expected slots=N"))),
            }
        }
        hosts.push(Host::new(name, slots).map_err(at)?);
    }
    if hosts.is_empty() {
        return Err("names no host".to_owned());
    }
    distinct(hosts)
}

fn distinct(hosts: Vec<Host>) -> Result<Vec<Host>, String> {
    for (index, host) in hosts.iter().enumerate() {
        if hosts[..index].iter().any(|other| other.name == host.name) {
            return Err(format!("{} is there twice; write {}:SLOTS once", host.name, host.name));
        }
    }
    Ok(hosts)
}

/// Most names that one expression may stand for: a typing error must not fill the memory.
const MOST_NODES: usize = 100_000;

/// Names of Slurm's compressed form, `n[1-3,07],login`, in order; numbers keep their leading zeros.
///
/// # Errors
/// In words, with the piece that cannot be read.
pub fn expand_nodes(text: &str) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for piece in split_outside_brackets(text)? {
        let mut made = vec![String::new()];
        let mut rest = piece;
        while let Some((before, after)) = rest.split_once('[') {
            let (inside, behind) = after.split_once(']').ok_or_else(|| format!("{piece:?}: `[` without `]`"))?;
            let numbers = range_list(inside).map_err(|why| format!("{piece:?}: {why}"))?;
            if made.len() * numbers.len() > MOST_NODES {
                return Err(format!("{piece:?} stands for more than {MOST_NODES} hosts"));
            }
            made = made.iter().flat_map(|name| numbers.iter().map(move |n| format!("{name}{before}{n}"))).collect();
            rest = behind;
        }
        names.extend(made.into_iter().map(|name| name + rest));
        if names.len() > MOST_NODES {
            return Err(format!("more than {MOST_NODES} hosts"));
        }
    }
    Ok(names)
}

/// Numbers of `1-3,07` as they are written.
fn range_list(text: &str) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits
                .then(|| text.parse::<usize>().ok())
                .flatten()
                .ok_or_else(|| format!("{part:?} is no range of numbers"))
        };
        let (first, last) = (number(from)?, number(to)?);
        if first > last || last - first >= MOST_NODES {
            return Err(format!("{part:?} is no range from a lower to a higher number"));
        }
        let width = from.len();
        all.extend((first..=last).map(|n| format!("{n:0width$}")));
    }
    Ok(all)
}

fn split_outside_brackets(text: &str) -> Result<Vec<&str>, String> {
    let (mut pieces, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '[' if inside => return Err(format!("{text:?}: `[` inside `[`")),
            '[' => inside = true,
            ']' if !inside => return Err(format!("{text:?}: `]` without `[`")),
            ']' => inside = false,
            ',' if !inside => {
                pieces.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    pieces.push(&text[start..]);
    if let Some(piece) = pieces.iter().find(|piece| piece.trim().is_empty()) {
        return Err(format!("{text:?} has an empty name, {piece:?}"));
    }
    Ok(pieces.into_iter().map(str::trim).collect())
}

/// Numbers of Slurm's `2(x3),1`: 2, 2, 2, 1.
///
/// # Errors
/// In words.
pub(super) fn expand_counts(text: &str) -> Result<Vec<usize>, String> {
    let mut counts = Vec::new();
    for piece in text.split(',') {
        let bad = || format!("{piece:?} is no count such as 4 or 4(x2)");
        let (count, times) = match piece.split_once("(x") {
            Some((count, times)) => {
                (count, times.strip_suffix(')').and_then(|n| n.parse::<usize>().ok()).ok_or_else(bad)?)
            }
            None => (piece, 1),
        };
        let count: usize = count.parse().map_err(|_| bad())?;
        if times > MOST_NODES {
            return Err(bad());
        }
        counts.extend(std::iter::repeat_n(count, times));
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(text: &str) -> Vec<String> {
        expand_nodes(text).unwrap()
    }

    #[test]
    fn slurms_names_are_written_out() {
        // as `scontrol show hostnames` does
        assert_eq!(names("n1"), ["n1"]);
        assert_eq!(names("n[1-3,7]"), ["n1", "n2", "n3", "n7"]);
        assert_eq!(names("a[08-11],b2,c[1]"), ["a08", "a09", "a10", "a11", "b2", "c1"]);
        assert_eq!(names("r[1-2]n[0-1].x"), ["r1n0.x", "r1n1.x", "r2n0.x", "r2n1.x"]);
        for bad in [
            "",
            "n[1-3",
            "n1-3]",
            "][0]",
            "n[3-1]",
            "n[a]",
            "n[]",
            "a,,b",
            "n[[1]]",
            "n[0-99999999999999999999]",
            "n[0-999999][0-9]",
        ] {
            assert!(expand_nodes(bad).is_err(), "{bad}: {:?}", expand_nodes(bad));
        }
        assert_eq!(expand_counts("2(x3),1").unwrap(), [2, 2, 2, 1]);
        assert!(expand_counts("2(x").is_err() && expand_counts("").is_err());
    }

    #[test]
    fn host_files_of_both_kinds() {
        let host = |name: &str, slots| Host { name: name.to_owned(), slots };
        let text = "# mine\nn1 slots=4 max_slots=8\n\nn2:2   # the small one\nn3\n";
        assert_eq!(parse_hostfile(text).unwrap(), [host("n1", 4), host("n2", 2), host("n3", 1)]);
        assert_eq!(parse_hosts("n[1-2]:4,n9").unwrap(), [host("n1", 4), host("n2", 4), host("n9", 1)]);
        for (text, expected) in [
            ("n1 slots=four", "line 1: slots=\"four\" is no number"),
            ("\nn1 cores=4", "line 2: \"cores=4\" is not known here; expected slots=N"),
            ("n1\nn1", "n1 is there twice; write n1:SLOTS once"),
            ("# nothing", "names no host"),
            ("n1 slots=0", "line 1: n1 has 0 slots; leave it out"),
            ("-x slots=1", "line 1: \"-x\" is no host name"),
        ] {
            assert_eq!(parse_hostfile(text).unwrap_err(), expected);
        }
    }

    /// Slurm's way to shorten: the inverse of what is under test, written apart from it.
    fn compress(prefix: &str, width: usize, numbers: &[usize]) -> String {
        let mut parts: Vec<String> = Vec::new();
        let mut at = 0;
        while at < numbers.len() {
            let mut end = at;
            while end + 1 < numbers.len() && numbers[end + 1] == numbers[end] + 1 {
                end += 1;
            }
            let (from, to) = (format!("{:0width$}", numbers[at]), format!("{:0width$}", numbers[end]));
            parts.push(if end > at { format!("{from}-{to}") } else { from });
            at = end + 1;
        }
        format!("{prefix}[{}]", parts.join(","))
    }

    proptest! {
        #[test]
        fn what_slurm_shortens_is_written_out(prefix in "[a-z]{1,8}-?", width in 1usize..4, set in proptest::collection::btree_set(0usize..999, 1..40)) {
            let numbers: Vec<usize> = set.into_iter().collect();
            let text = compress(&prefix, width, &numbers);
            let expected: Vec<String> = numbers.iter().map(|n| format!("{prefix}{n:0width$}")).collect();
            prop_assert_eq!(expand_nodes(&text).unwrap(), expected);
        }

        #[test]
        fn host_lists_come_back(hosts in proptest::collection::btree_map("[a-z][a-z0-9.-]{0,11}", 1usize..99, 1..12)) {
            let expected: Vec<Host> = hosts.iter().map(|(name, &slots)| Host { name: name.clone(), slots }).collect();
            let list: Vec<String> = hosts.iter().map(|(name, slots)| format!("{name}:{slots}")).collect();
            prop_assert_eq!(parse_hosts(&list.join(",")).unwrap(), expected.clone());
            let file: Vec<String> = hosts.iter().map(|(name, slots)| format!("{name}  slots={slots} # x")).collect();
            prop_assert_eq!(parse_hostfile(&file.join("\n")).unwrap(), expected);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[a-z0-9\\[\\],:()x= #-]{0,24}|\\PC{0,12}") {
            let _ = (parse_hosts(&text), parse_hostfile(&text), expand_counts(&text));
            if let Ok(names) = expand_nodes(&text) {
                prop_assert!(!names.is_empty() && names.iter().all(|name| !name.contains(['[', ']'])));
            }
        }
    }
}
