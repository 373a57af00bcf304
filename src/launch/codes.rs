//! Exit codes, in one place: what each means and whether starting again can help. `docs/launch.md` has them as a table.

/// How a process of dunlearn ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// It did what it was asked to do.
    Done,
    /// What was asked about is not as it should be: a dead run, records that part.
    No,
    /// A mistake in command, configuration, model or data, or a disk that is full: trying again changes nothing.
    Refused,
    /// Asked to stop, the state is saved: start it again (`EX_TEMPFAIL` of sysexits.h).
    Again,
    /// A panic: an error in the program, or a fault that it knows no words for.
    Panic,
    /// A rank waited for others longer than its deadline.
    Deadline,
    /// The launcher of the rank has died.
    Orphan,
    /// A device ran out of memory: trying again changes nothing.
    Memory,
    /// Another rank has failed or broken off.
    Loss,
    /// Of `dunlearn launch`: the engine ended without the run's mark, as `mpirun` does with code 0 when it loses a host.
    Unfinished,
}

/// What `dunlearn launch` does after an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing more to do.
    Finished,
    /// The run was asked to stop and can be started again; whoever asked decides when.
    Stopped,
    /// Starting again can help.
    Retry,
    /// It cannot.
    Hopeless,
}

impl Code {
    pub const ALL: [Self; 10] = [
        Self::Done,
        Self::No,
        Self::Refused,
        Self::Again,
        Self::Panic,
        Self::Deadline,
        Self::Orphan,
        Self::Memory,
        Self::Loss,
        Self::Unfinished,
    ];

    pub const fn number(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::No => 1,
            Self::Refused => 2,
            Self::Again => 75,
            Self::Panic => 101,
            Self::Deadline => 102,
            Self::Orphan => 103,
            Self::Memory => 104,
            Self::Loss => 105,
            Self::Unfinished => 106,
        }
    }

    pub fn of(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|code| i32::from(code.number()) == number)
    }

    /// For people.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Done => "finished",
            Self::No => "what was asked about is not as it should be: a dead run, records that part",
            Self::Refused => "a mistake in command, configuration, model or data, or a full disk",
            Self::Again => "asked to stop, the state is saved",
            Self::Panic => "a panic",
            Self::Deadline => "a wait for other ranks beyond its deadline",
            Self::Orphan => "the launcher of a rank has died",
            Self::Memory => "a device ran out of memory",
            Self::Loss => "another rank has broken off",
            Self::Unfinished => "the engine ended without the run's mark: a host or its connection is lost",
        }
    }

    pub const fn verdict(self) -> Verdict {
        match self {
            Self::Done => Verdict::Finished,
            Self::Again => Verdict::Stopped,
            Self::No | Self::Refused | Self::Memory => Verdict::Hopeless,
            Self::Panic | Self::Deadline | Self::Orphan | Self::Loss | Self::Unfinished => Verdict::Retry,
        }
    }

    /// Whether a rank that ends so may only have felt what happened to another one.
    pub const fn is_echo(self) -> bool {
        matches!(self, Self::Deadline | Self::Orphan | Self::Loss)
    }
}

impl Verdict {
    /// For `launch.jsonl`.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Retry => "retry",
            Self::Hopeless => "hopeless",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The documented table is this one.
    #[test]
    fn the_documentation_has_every_code() {
        let page = include_str!("../../docs/launch.md");
        for code in Code::ALL {
            let again = match code.verdict() {
                Verdict::Finished => "-",
                Verdict::Stopped => "whoever asked",
                Verdict::Retry => "yes",
                Verdict::Hopeless => "no",
            };
            let line = format!("| {} | {} | {again} |", code.number(), code.meaning());
            assert!(page.contains(&line), "docs/launch.md lacks\n{line}");
            assert_eq!(Code::of(i32::from(code.number())), Some(code));
        }
    }
}
