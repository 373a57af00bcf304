//! Faults put in on purpose (`--fault`), to see that one failing rank ends the whole job.

use std::str::FromStr;

use super::RunError;

/// What happens, where, and on which rank: `panic@step:1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    kind: Kind,
    phase: Phase,
    rank: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Panic,
    Error,
    /// The process ends at once, as if it were killed.
    Kill,
    /// The rank stops answering.
    Hang,
}

/// Parts of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Load,
    /// Before the second step, so that the others are inside one.
    Step,
    Eval,
    /// Before a save.
    Save,
    Export,
    /// After the export, before the summary.
    End,
}

impl Fault {
    /// Lets the fault happen if this is its phase and rank.
    pub fn strike(fault: Option<Self>, phase: Phase, rank: usize) -> Result<(), RunError> {
        let Some(fault) = fault.filter(|fault| fault.phase == phase && fault.rank == rank) else { return Ok(()) };
        match fault.kind {
            Kind::Panic => panic!("injected panic in phase {phase:?}"),
            Kind::Error => Err(RunError::Refused(format!("injected error in phase {phase:?}"))),
            Kind::Kill => std::process::abort(),
            Kind::Hang => loop {
                std::thread::sleep(std::time::Duration::from_secs(1));
            },
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?}; expected panic|error|kill|hang@load|step|eval|save|export|end:RANK");
        let (kind, rest) = text.split_once('@').ok_or_else(refuse)?;
        let (phase, rank) = rest.split_once(':').ok_or_else(refuse)?;
        let kind = match kind {
            "panic" => Kind::Panic,
            "error" => Kind::Error,
            "kill" => Kind::Kill,
            "hang" => Kind::Hang,
            _ => return Err(refuse()),
        };
        let phase = match phase {
            "load" => Phase::Load,
            "step" => Phase::Step,
            "eval" => Phase::Eval,
            "save" => Phase::Save,
            "export" => Phase::Export,
            "end" => Phase::End,
            _ => return Err(refuse()),
        };
        Ok(Self { kind, phase, rank: rank.parse().map_err(|_| refuse())? })
    }
}
