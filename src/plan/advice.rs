//! What makes a run fit that does not: each change by itself and then together, each planned anew, the cheapest first.

use serde::Serialize;

use super::text::gib;
use super::{Job, fits};
use crate::config::{self, Config};
use crate::dist::Mesh;

/// A change that makes the run fit.
#[derive(Clone, Debug, Serialize)]
pub struct Suggestion {
    /// For `--set`.
    pub set: Vec<String>,
    pub ranks: usize,
    /// Of the fullest rank. Unit: bytes.
    pub peak: u64,
    /// Unit: seconds a step.
    pub seconds: f64,
    pub device_hours: f64,
    /// What it costs beside time.
    pub price: Price,
}

/// What a change costs beside time, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Price {
    /// The result stays the same but for the order of sums.
    Nothing,
    /// Numbers are rounded more.
    Rounding,
    /// Something else is trained, or in another way.
    Training,
    MoreDevices,
}

/// One key that may be changed.
struct Change {
    key: &'static str,
    value: String,
    price: Price,
}

/// Changes that are put together at most.
const TOGETHER: usize = 4;

/// Suggestions, the cheapest first; empty where the run fits, or where nothing helps.
pub fn advice(job: &Job) -> Vec<Suggestion> {
    let base = config::to_toml(job.config);
    let changes = changes(job);
    let mut sets: Vec<Vec<usize>> = (0..changes.len()).map(|i| vec![i]).collect();
    for size in 1..=TOGETHER {
        let found: Vec<(Vec<usize>, Config, Mesh)> = sets
            .iter()
            .filter_map(|set| try_out(job, &base, &changes, set).map(|(c, m)| (set.clone(), c, m)))
            .collect();
        if !found.is_empty() {
            let mut told: Vec<Suggestion> =
                found.iter().filter_map(|(set, config, mesh)| tell(job, &changes, set, config, *mesh)).collect();
            told.sort_by(|a, b| a.price.cmp(&b.price).then(a.device_hours.total_cmp(&b.device_hours)));
            told.truncate(8);
            if !told.is_empty() {
                return told;
            }
        }
        // one more change that comes later in the list, of another key
        let grown = sets.iter().flat_map(|set| {
            let last = set[size - 1];
            (last + 1..changes.len())
                .filter(|&next| set.iter().all(|&at| changes[at].key != changes[next].key))
                .map(|next| set.iter().copied().chain([next]).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        });
        sets = grown.collect();
    }
    Vec::new()
}

/// What can be changed about a configuration.
fn changes(job: &Job) -> Vec<Change> {
    let Job { config, mesh, .. } = job;
    let (train, optimizer, parallel) = (&config.train, &config.optimizer, &config.parallel);
    let mut changes = Vec::new();
    let mut add = |on: bool, key, value: String, price| {
        if on {
            changes.push(Change { key, value, price });
        }
    };
    add(mesh.dp > 1 && !parallel.zero, "parallel.zero", "true".into(), Price::Nothing);
    add(mesh.tp > 1 && !parallel.sequence_parallel, "parallel.sequence_parallel", "true".into(), Price::Nothing);
    add(train.recompute == config::Recompute::None, "train.recompute", "half_block".into(), Price::Nothing);
    let longest = job.anchors.stats.longest.max(job.retain.map_or(0, |set| set.stats.longest));
    for part in [2, 4, 8] {
        let tokens = train.micro_batch_tokens / part;
        add(tokens >= longest, "train.micro_batch_tokens", tokens.to_string(), Price::Nothing);
    }
    add(train.logits_mib > 64.0, "train.logits_mib", "64.0".into(), Price::Nothing);
    let f32_gradients = train.grad_dtype == config::Float::F32;
    add(
        f32_gradients && train.precision == config::Precision::Bf16,
        "train.grad_dtype",
        "bf16".into(),
        Price::Rounding,
    );
    let adamw = optimizer.name == config::OptimizerName::Adamw;
    let state = optimizer.state_dtype.unwrap_or_default();
    add(adamw && state == config::StateDtype::F32, "optimizer.state_dtype", "bf16".into(), Price::Rounding);
    add(adamw && state != config::StateDtype::Int8, "optimizer.state_dtype", "int8".into(), Price::Rounding);
    add(train.precision == config::Precision::F32, "train.precision", "bf16".into(), Price::Rounding);
    add(!optimizer.in_backward, "optimizer.in_backward", "true".into(), Price::Training);
    for tp in job.arch.legal_tp().into_iter().filter(|&tp| tp > mesh.tp) {
        add(true, "parallel.tp", tp.to_string(), Price::Nothing);
    }
    for times in [2, 4, 8] {
        add(true, "parallel.dp", (mesh.dp * times).to_string(), Price::Nothing);
    }
    let scope = &config.scope;
    add(scope.lora.is_none() && scope.mask.is_none(), "scope.lora", "{ r = 16, alpha = 32 }".into(), Price::Training);
    changes
}

/// The configuration with these changes and its mesh, if it is one and fits.
fn try_out(job: &Job, base: &str, changes: &[Change], set: &[usize]) -> Option<(Config, Mesh)> {
    let has = |key: &str| set.iter().find(|&&at| changes[at].key == key);
    let number = |at: &usize| changes[*at].value.parse().expect("invariant: written as a number above");
    let tp: usize = has("parallel.tp").map_or(job.mesh.tp, number);
    // more tensor-parallel ranks: as many ranks as before where they divide
    let dp = match has("parallel.dp") {
        Some(at) => number(at),
        None if tp != job.mesh.tp && job.mesh.world().is_multiple_of(tp) => job.mesh.world() / tp,
        None => job.mesh.dp,
    };
    let mut overrides = overrides(changes, set);
    overrides.retain(|text| !text.starts_with("parallel.dp="));
    overrides.push(format!("parallel.dp={dp}"));
    let config = config::from_str(base, "the configuration", &overrides).ok()?;
    let mesh = Mesh { rank: 0, tp, dp };
    let changed = Job { config: &config, mesh, ..*job };
    let peak = changed.peak(2).ok()?;
    fits(&peak, job.machine).then_some((config, mesh))
}

/// The whole plan of a change: None where it does not fit after all.
fn tell(job: &Job, changes: &[Change], set: &[usize], config: &Config, mesh: Mesh) -> Option<Suggestion> {
    let plan = Job { config, mesh, ..*job }.plan().ok()?;
    let one_micro_batch = config.train.grad_dtype == config::Float::F32 || plan.micro_batches <= 1;
    if !plan.fits() || !one_micro_batch {
        return None;
    }
    let mut set_keys = overrides(changes, set);
    if mesh.dp != job.mesh.dp && !set_keys.iter().any(|text| text.starts_with("parallel.dp=")) {
        set_keys.push(format!("parallel.dp={}", mesh.dp));
    }
    let price = set.iter().map(|&at| changes[at].price).max().unwrap_or(Price::Nothing);
    let price = if mesh.world() > job.mesh.world() { Price::MoreDevices } else { price };
    Some(Suggestion {
        set: set_keys,
        ranks: mesh.world(),
        peak: plan.peak.total(),
        seconds: plan.seconds.total(),
        device_hours: plan.device_hours(),
        price,
    })
}

fn overrides(changes: &[Change], set: &[usize]) -> Vec<String> {
    set.iter().map(|&at| format!("{}={}", changes[at].key, changes[at].value)).collect()
}

impl Suggestion {
    /// A row for people.
    pub fn row(&self) -> Vec<String> {
        let quoted =
            |text: &String| if text.contains(' ') { format!("--set '{text}'") } else { format!("--set {text}") };
        vec![
            self.set.iter().map(quoted).collect::<Vec<_>>().join(" "),
            gib(self.peak),
            super::text::duration(self.seconds),
            self.ranks.to_string(),
            format!("{:.1}", self.device_hours),
            match self.price {
                Price::Nothing => "",
                Price::Rounding => "more rounding",
                Price::Training => "another training",
                Price::MoreDevices => "more devices",
            }
            .to_owned(),
        ]
    }
}
