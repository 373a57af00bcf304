//! `[subspace]`: how objectives `unlearn` and `learn` find a task's matrices, tell them apart from those of similar tasks, and use them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::data::Source;
use super::error::ConfigError;
use super::method::{Objective, Retain};
use super::schema::{Checkpoint, Config, Init};
use super::scope::LoraInit;

/// UNLEARN and LEARN (arXiv 2408.04140). A task is learnt by fine-tuning the matrices of attention and MLP, or those that `[scope]` names,
/// with everything else frozen; what training has moved is the task's matrices. They lose what they share with the matrices of the
/// similar tasks, and are then subtracted from the model (`unlearn`) or added (`learn`). `[train]`, `[optimizer]` and `[schedule]` are those
/// of each stage. The source's equations and settings are not known to us: every default is ours.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Subspace {
    /// Tasks whose knowledge is to stay although it is like the target's; each is learnt in the same way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub similar: Vec<Source>,
    /// Factor of the matrices that are subtracted or added.
    pub strength: f64,
    /// `layers`: one layer after the other, from the input up, each with what the layers below have learnt; `together`: all at once.
    pub order: StageOrder,
    /// What the matrices are trained from: those of the `pretrained` model, or `random` ones drawn from `run.seed` with its
    /// `initializer_range`.
    pub start: StartFrom,
    /// What counts as shared with the similar tasks.
    pub mode: Mode,
    /// Of which side `projection` takes the subspace.
    pub side: Side,
    /// Least share of the similar tasks' squared singular values that the subspace holds, in (0, 1].
    pub energy: f64,
    /// Most directions of the subspace; trained matrices have full rank, and without a limit nothing would be left.
    pub max_rank: usize,
    /// Matrices whose smaller side is at most this are decomposed exactly, larger ones by a randomised method.
    pub exact_limit: usize,
    /// Directions that the randomised method computes besides.
    pub oversampling: usize,
    /// Power iterations of the randomised method.
    pub power_iterations: usize,
}

impl Default for Subspace {
    fn default() -> Self {
        Self {
            similar: Vec::new(),
            strength: 1.0,
            order: StageOrder::Layers,
            start: StartFrom::Pretrained,
            mode: Mode::Projection,
            side: Side::Input,
            energy: 0.9,
            max_rank: 32,
            exact_limit: 1024,
            oversampling: 8,
            power_iterations: 2,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StageOrder {
    /// One layer after the other.
    Layers,
    /// All layers in one training: a task vector (arXiv 2212.04089).
    Together,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartFrom {
    Pretrained,
    Random,
}

/// What of a task counts as shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The part in the leading subspace of the similar tasks' rows or columns.
    Projection,
    /// The part along each similar task's whole matrix.
    Frobenius,
}

/// Of which side [`Mode::Projection`] takes the subspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Directions of the rows: what a matrix reads.
    Input,
    /// Directions of the columns: what a matrix writes.
    Output,
    Both,
}

/// Checks `[subspace]`, and what else the objectives `unlearn` and `learn` exclude.
pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    let refuse = |key: &str, reason: String| Err(ConfigError::value(key, reason));
    let objective = config.method.objective;
    if !objective.is_weight_space() {
        return match config.subspace {
            None => Ok(()),
            Some(_) => {
                refuse("subspace", "has no effect unless method.objective = \"unlearn\" or \"learn\"; remove it".into())
            }
        };
    }
    let name = if objective == Objective::Unlearn { "unlearn" } else { "learn" };
    let with = format!("with method.objective = {name:?}");
    let other = |what: &str| format!("has no effect {with}, which {what}");
    if config.method.retain != Retain::None {
        let reason =
            other("trains on each task alone; write retain = \"none\" and name what is to stay in subspace.similar");
        return refuse("method.retain", reason);
    }
    if config.method.forget_weight.is_some() {
        return refuse("method.forget_weight", other("has one loss; write subspace.strength"));
    }
    if config.model.init != Init::Pretrained {
        return refuse("model.init", format!("is \"random\" {with}: there is no model to change; remove it"));
    }
    if config.scope.mask.is_some() {
        return refuse("scope.mask", other("takes whole matrices; write scope.tensors, scope.layers or scope.lora"));
    }
    if config.scope.lora.as_ref().is_some_and(|lora| lora.init == LoraInit::Fila) {
        return refuse("scope.lora.init", format!("is \"fila\" {with}: it would change the base; remove it"));
    }
    if !config.before.is_nothing() {
        return refuse("before", other("counts a task from the model as it is; remove it"));
    }
    if !config.export.model {
        return refuse("export.model", format!("is false {with}: the written model is all that the run makes"));
    }
    if config.eval.every > 0 {
        return refuse("eval.every", other("has a model at its end only; remove it"));
    }
    let Checkpoint { every, keep_last, keep_every, .. } = Checkpoint::default();
    let given = &config.checkpoint;
    if (given.every, given.keep_last, given.keep_every) != (every, keep_last, keep_every) {
        return refuse("checkpoint", other("keeps each trained layer by itself; remove it"));
    }
    let default = Subspace::default();
    let subspace = config.subspace.as_ref().unwrap_or(&default);
    if !subspace.strength.is_finite() || subspace.strength == 0.0 {
        return refuse("subspace.strength", format!("is {}; expected a number that is not 0", subspace.strength));
    }
    if let Some(at) = subspace.similar.iter().position(|source| source.limit == Some(0)) {
        return refuse(&format!("subspace.similar[{at}].limit"), "is 0; write at least 1 or remove it".into());
    }
    if !(subspace.energy > 0.0 && subspace.energy <= 1.0) {
        return refuse("subspace.energy", format!("is {}; expected a number above 0 and at most 1", subspace.energy));
    }
    if subspace.max_rank == 0 {
        return refuse("subspace.max_rank", "is 0; expected at least 1".into());
    }
    let how = |s: &Subspace| (s.mode, s.side, s.energy, s.max_rank, s.exact_limit, s.oversampling, s.power_iterations);
    if subspace.similar.is_empty() && how(subspace) != how(&default) {
        let reason = "mode, side, energy, max_rank and those of the decomposition have no effect without subspace.similar; remove them";
        return refuse("subspace", reason.into());
    }
    if subspace.mode == Mode::Frobenius && subspace.side != default.side {
        return refuse("subspace.side", "has no effect with subspace.mode = \"frobenius\"; remove it".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::config::from_str;

    const UNLEARN: &str = r#"
[run]
dir = "runs/x"
[model]
path = "m"
[data]
forget = { path = "f.jsonl", kind = "qa" }
retain = { path = "r.jsonl", kind = "qa" }
[method]
objective = "unlearn"
[subspace]
similar = [{ path = "s.jsonl", kind = "qa" }]
[train]
epochs = 2
[optimizer]
lr = 1e-5
"#;

    fn refused(overrides: &[&str], expected: &str) {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        let message = from_str(UNLEARN, "a.toml", &overrides).unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }

    #[test]
    fn what_the_weight_space_excludes_is_refused() {
        refused(&["method.retain=nll"], "method.retain: has no effect with method.objective = \"unlearn\"");
        refused(&["method.forget_weight=2"], "method.forget_weight: has no effect");
        refused(&["model.init=random"], "model.init: is \"random\"");
        refused(&["scope.mask.score=random"], "scope.mask: has no effect");
        refused(&["scope.lora={r=2, alpha=4, init='fila'}"], "scope.lora.init: is \"fila\"");
        refused(&["before.noise=0.1"], "before: has no effect");
        refused(&["export.model=false"], "export.model: is false");
        refused(&["eval.every=3"], "eval.every: has no effect");
        refused(&["checkpoint.every=3"], "checkpoint: has no effect");
        refused(&["subspace.strength=0"], "subspace.strength: is 0");
        refused(&["subspace.energy=1.5"], "subspace.energy: is 1.5");
        refused(&["subspace.max_rank=0"], "subspace.max_rank: is 0");
        refused(&["subspace.mode=frobenius", "subspace.side=both"], "subspace.side: has no effect");
        refused(&["subspace={max_rank=3}"], "subspace: mode, side");
        refused(&["method.objective=ga"], "subspace: has no effect unless");
        refused(&["method.objective=learn"], "data.train: missing");
        refused(&["method.beta=1"], "method.beta: has no effect");
    }

    #[test]
    fn the_defaults_are_filled_in() {
        let plain = UNLEARN.replace("[subspace]\nsimilar = [{ path = \"s.jsonl\", kind = \"qa\" }]\n", "");
        let config = from_str(&plain, "a.toml", &[]).unwrap();
        assert_eq!(config.subspace, Some(super::Subspace::default()));
        assert_eq!(config.method.forget_weight, None);
    }
}
