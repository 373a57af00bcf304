//! What exists: names, sources and needs of the objectives and retain terms, as `dunlearn methods` lists them.

use serde::Serialize;

use super::ENTRIES;
use crate::config::{self, Method, Objective};
use crate::train::Forget;

/// One objective.
pub struct Entry {
    pub objective: Objective,
    /// One line.
    pub title: &'static str,
    /// Address of the paper.
    pub source: &'static str,
    pub needs: Needs,
    /// The forget term, from a configuration whose keys are filled in.
    pub build: fn(&Method) -> Forget,
}

/// What an objective needs besides forget samples.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Needs {
    /// What must be known of the model before training; empty for nothing.
    pub reference: &'static str,
    /// Another answer to each forget question; empty for none.
    pub preferred: &'static str,
    /// Reads or changes hidden states between layers.
    pub hidden: bool,
    /// Keeps a copy of the head.
    pub head_copy: bool,
    /// Trains a few matrices and leaves the others without optimizer state.
    pub trains_few: bool,
    /// Retain samples, always.
    pub retain: bool,
    /// Samples of similar tasks, where there are any.
    pub similar: bool,
}

impl Needs {
    pub const NOTHING: Self = Self {
        reference: "",
        preferred: "",
        hidden: false,
        head_copy: false,
        trains_few: false,
        retain: false,
        similar: false,
    };

    /// For people.
    pub fn words(self) -> String {
        let reference = (!self.reference.is_empty()).then(|| format!("reference {}", self.reference));
        let preferred = (!self.preferred.is_empty()).then(|| self.preferred.to_owned());
        let hidden = self.hidden.then(|| "hidden states".to_owned());
        let retain = self.retain.then(|| "retain samples".to_owned());
        let similar = self.similar.then(|| "samples of similar tasks".to_owned());
        [reference, preferred, hidden, retain, similar].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// One retain term.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct RetainEntry {
    pub name: &'static str,
    pub title: &'static str,
    pub source: &'static str,
    pub reference: &'static str,
    pub head_copy: bool,
}

pub const RETAIN_TERMS: &[RetainEntry] = &[
    RetainEntry { name: "none", title: "nothing holds the model", source: "", reference: "", head_copy: false },
    RetainEntry {
        name: "nll",
        title: "negative log-likelihood of the retain answers",
        source: "https://arxiv.org/abs/2401.06121",
        reference: "",
        head_copy: false,
    },
    RetainEntry {
        name: "kl",
        title: "KL(reference, model) at every retain token",
        source: "https://arxiv.org/abs/2401.06121",
        reference: "final hidden rows",
        head_copy: true,
    },
    RetainEntry {
        name: "embedding",
        title: "squared difference of hidden states from the reference's",
        source: "https://arxiv.org/abs/2403.03218",
        reference: "hidden rows of a layer",
        head_copy: false,
    },
    RetainEntry {
        name: "ap",
        title: "answer preservation: the answer likelier than a refusal",
        source: "https://arxiv.org/abs/2410.08109",
        reference: "",
        head_copy: false,
    },
];

/// An objective as it is listed.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// The value of `method.objective`.
    pub name: String,
    pub title: &'static str,
    pub source: &'static str,
    pub needs: Needs,
    /// [`Self::needs`] in words.
    pub needs_words: String,
    /// Its own keys with their defaults, as TOML.
    pub keys: Vec<String>,
    /// Weights in bf16 with f32 master weights, gradient and AdamW moments, on one data-parallel rank; weights alone where only a few
    /// matrices are trained at a time. Unit: bytes a parameter.
    pub bytes_per_parameter: u32,
}

/// Of weights in bf16.
const FROZEN: u32 = 2;
/// Besides, what is trained has an f32 master (4), a gradient (4) and AdamW's two moments (8).
const TRAINED: u32 = 16;

/// All objectives, in the order of [`ENTRIES`].
pub fn list() -> Vec<Listed> {
    ENTRIES
        .iter()
        .map(|entry| Listed {
            name: config::objective_name(entry.objective),
            title: entry.title,
            source: entry.source,
            needs: entry.needs,
            needs_words: entry.needs.words(),
            keys: config::own_keys(entry.objective),
            bytes_per_parameter: FROZEN + if entry.needs.trains_few { 0 } else { TRAINED },
        })
        .collect()
}

pub(super) fn find(objective: Objective) -> &'static Entry {
    ENTRIES.iter().find(|entry| entry.objective == objective).expect("invariant: every objective has an entry")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_objective_has_one_entry() {
        for objective in config::OBJECTIVES {
            assert_eq!(ENTRIES.iter().filter(|entry| entry.objective == objective).count(), 1, "{objective:?}");
        }
        assert_eq!(ENTRIES.len(), config::OBJECTIVES.len());
    }
}
