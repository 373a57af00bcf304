//! Methods: what is minimised, one file each; none of them knows ranks.
//!
//! A new objective is a file with its formula and an [`Entry`], and one line in [`ENTRIES`].

mod ap;
mod distributions;
mod dpo;
mod flat;
mod ga;
mod kto;
mod lau;
mod nll;
mod npo;
mod registry;
mod rmu;
mod satimp;
mod simnpo;
pub mod synthetic;
mod tnpo;
#[cfg(test)]
mod toy;
mod weighted;
mod wga;

pub use nll::NegativeLogLikelihood;
pub use registry::{Entry, Listed, Needs, RETAIN_TERMS, RetainEntry, list};

use crate::config;
use crate::data::{RowsOf, Texts, Wanted};
use crate::train::{Dual, Method, Retain};

/// All objectives, in the order of their papers.
pub const ENTRIES: &[Entry] = &[
    nll::FINETUNE,
    ga::ENTRY,
    nll::IDK,
    dpo::DPO,
    dpo::IDK_DPO,
    dpo::ALT_PO,
    kto::ENTRY,
    npo::ENTRY,
    simnpo::ENTRY,
    wga::ENTRY,
    tnpo::ENTRY,
    satimp::ENTRY,
    distributions::CE_U,
    distributions::UNDIAL,
    distributions::ME,
    distributions::IHL,
    flat::ENTRY,
    rmu::ENTRY,
    lau::ADV_NPO,
    lau::ADV_RMU,
    distributions::PDU,
    nll::UNLEARN,
    nll::LEARN,
];

/// The method that a configuration asks for. `seed`: of what the method draws; `steps_per_epoch`: of the run.
pub fn method(config: &config::Method, seed: u64, steps_per_epoch: usize) -> Method {
    let entry = registry::find(config.objective);
    Method {
        forget: (entry.build)(config),
        forget_weight: config.forget_weight.unwrap_or(config::Method::WEIGHT),
        retain: retain(config),
        retain_weight: config.dual_start.or(config.retain_weight).unwrap_or(config::Method::WEIGHT),
        adversary: lau::adversary(config),
        dual: config.dual_start.map(|_| Dual {
            bound: number(config.retain_bound),
            rate: number(config.dual_rate),
            warmup: (number(config.dual_warmup) * steps_per_epoch as f64).ceil() as usize,
        }),
        seed,
    }
}

/// Answers that the method prefers to those of the forget samples, and to those of the retain samples.
pub fn wanted(config: &config::Method) -> (Wanted, Wanted) {
    let forget = match registry::find(config.objective).needs.preferred {
        "" => Wanted::Nothing,
        "alternates" => Wanted::Alternates,
        "a chosen answer" => Wanted::Chosen,
        _ => Wanted::Refusal,
    };
    (forget, if config.retain == config::Retain::Ap { Wanted::Refusal } else { Wanted::Nothing })
}

fn retain(config: &config::Method) -> Retain {
    match config.retain {
        config::Retain::None => Retain::None,
        config::Retain::Nll => Retain::Likelihood(Box::new(nll::NegativeLogLikelihood { texts: Texts::Answer })),
        config::Retain::Ap => {
            let beta = number(config.retain_beta);
            Retain::Likelihood(Box::new(ap::AnswerPreservation { beta }))
        }
        config::Retain::Kl => Retain::Divergence,
        config::Retain::Embedding => Retain::Embedding {
            edge: config.layer.expect("invariant: filled in") + 1,
            rows: match config.compat {
                Some(config::Compat::OpenUnlearning) => RowsOf::Scored,
                None => rmu::rows(config),
            },
            by_sample: config.compat == Some(config::Compat::OpenUnlearning),
        },
    }
}

/// A number that the configuration room has filled in.
fn number(key: Option<f64>) -> f64 {
    key.expect("invariant: keys that an objective takes are filled in")
}
