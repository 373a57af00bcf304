//! Faults put in on purpose (`--fault`), to see that one failing rank ends the whole job.

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tch::{Device, Tensor};

use super::{RunError, process};
use crate::abi::signals::{Blow, strike};
use crate::dist::World;

/// What happens, where, and on which rank: `panic@step:1`, or `panic@step.7:1` at the seventh occasion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    kind: Kind,
    occasion: Occasion,
    /// From 1.
    count: usize,
    rank: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Panic,
    Error,
    /// SIGKILL: the process ends at once.
    Kill,
    /// SIGSTOP: the process does nothing any more, its watching thread included.
    Stop,
    /// The rank stops answering; its watching thread lives.
    Hang,
    /// The rank calls a collective that the others do not.
    Order,
    /// From here on the rank takes half a second longer at each occasion. No failure.
    Slow,
}

/// Where faults can be put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Before the model is read.
    Load,
    /// Before a step; the second where nothing else is said, so that the others are inside one.
    Step,
    /// Before a collective, counted from the start of the second step; the fourth where nothing else is said.
    Collective,
    /// Before an evaluation.
    Eval,
    /// Before a save.
    Save,
    Export,
    /// After the export, before the summary.
    End,
}

const KINDS: [(&str, Kind); 7] = [
    ("panic", Kind::Panic),
    ("error", Kind::Error),
    ("kill", Kind::Kill),
    ("stop", Kind::Stop),
    ("hang", Kind::Hang),
    ("order", Kind::Order),
    ("slow", Kind::Slow),
];
const OCCASIONS: [(&str, Occasion, usize); 7] = [
    ("load", Occasion::Load, 1),
    ("step", Occasion::Step, 2),
    ("collective", Occasion::Collective, 4),
    ("eval", Occasion::Eval, 1),
    ("save", Occasion::Save, 1),
    ("export", Occasion::Export, 1),
    ("end", Occasion::End, 1),
];

/// Lets a fault happen when its time has come.
pub(super) struct Injector<'a> {
    fault: Option<Fault>,
    world: &'a World,
    /// Occasions of the fault's kind so far.
    seen: Cell<usize>,
}

impl<'a> Injector<'a> {
    pub(super) fn new(fault: Option<Fault>, world: &'a World) -> Self {
        Self { fault: fault.filter(|fault| fault.rank == world.mesh.rank), world, seen: Cell::new(0) }
    }

    /// To be called at each occasion.
    pub(super) fn at(&self, occasion: Occasion) -> Result<(), RunError> {
        let Some(fault) = self.fault else { return Ok(()) };
        let inside = fault.occasion == Occasion::Collective && occasion == Occasion::Step;
        if occasion != fault.occasion && !inside {
            return Ok(());
        }
        self.seen.set(self.seen.get() + 1);
        let seen = self.seen.get();
        if inside {
            if seen == 2 && fault.kind != Kind::Order {
                let trap = move || match fault.strike() {
                    Ok(()) => {}
                    Err(error) => panic!("{error}"),
                };
                self.world.watchdog.trap(fault.count as u64 - 1, Box::new(trap));
            }
            if seen != 2 || fault.kind != Kind::Order {
                return Ok(());
            }
        } else if seen < fault.count || (seen > fault.count && fault.kind != Kind::Slow) {
            return Ok(());
        }
        match fault.kind {
            Kind::Order => {
                fault.tell();
                let World { tp, dp, world, .. } = self.world;
                let inner = if tp.size() > 1 { tp } else { dp };
                let group = if inside { inner } else { world };
                let _ = group.all_gather(&Tensor::zeros([16], (tch::Kind::Uint8, Device::Cpu)));
                Ok(())
            }
            _ => fault.strike(),
        }
    }
}

impl Fault {
    fn tell(self) {
        tracing::warn!("fault {self} put in at {:.3}", process::unix_seconds());
    }

    fn strike(self) -> Result<(), RunError> {
        self.tell();
        match self.kind {
            Kind::Panic => panic!("injected panic in phase {:?}", self.occasion),
            Kind::Error => return Err(RunError::Refused(format!("injected error in phase {:?}", self.occasion))),
            Kind::Kill => strike(Blow::Kill),
            Kind::Stop => strike(Blow::Stop),
            Kind::Hang => loop {
                std::thread::sleep(Duration::from_secs(1));
            },
            Kind::Slow => std::thread::sleep(Duration::from_millis(500)),
            Kind::Order => {}
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let kind = KINDS.iter().find(|(_, kind)| *kind == self.kind).map_or("", |(name, _)| name);
        let occasion = OCCASIONS.iter().find(|(_, at, _)| *at == self.occasion).map_or("", |(name, ..)| name);
        write!(f, "{kind}@{occasion}.{}:{}", self.count, self.rank)
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = || {
            let (kind, rest) = text.split_once('@')?;
            let (occasion, rank) = rest.split_once(':')?;
            let (occasion, count) = occasion.split_once('.').map_or((occasion, None), |(name, n)| (name, Some(n)));
            let kind = KINDS.iter().find(|(name, _)| *name == kind)?.1;
            let (_, occasion, usual) = *OCCASIONS.iter().find(|(name, ..)| *name == occasion)?;
            let count = count.map_or(Some(usual), |n| n.parse().ok().filter(|&n| n > 0))?;
            Some(Self { kind, occasion, count, rank: rank.parse().ok()? })
        };
        parsed().ok_or_else(|| {
            let kinds = KINDS.map(|(name, _)| name).join("|");
            let occasions = OCCASIONS.map(|(name, ..)| name).join("|");
            format!("{text:?}; expected {kinds}@{occasions}[.COUNT]:RANK")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_and_shown() {
        for (text, shown) in [
            ("panic@step:1", "panic@step.2:1"),
            ("stop@collective.7:0", "stop@collective.7:0"),
            ("kill@save:3", "kill@save.1:3"),
        ] {
            assert_eq!(text.parse::<Fault>().unwrap().to_string(), shown);
        }
        for wrong in ["panic", "panic@step", "panic@nowhere:1", "burn@step:1", "panic@step.0:1", "panic@step:x"] {
            let refusal = wrong.parse::<Fault>().unwrap_err();
            assert!(refusal.contains("panic|error|kill|stop|hang|order|slow@load|step|collective"), "{refusal}");
        }
    }
}
