//! `[method]`: objective, retain term, and the keys that each of them takes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is minimised: `forget_weight` x objective + `retain_weight` x retain term. A key that the objective does not take is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Method {
    /// What is done to the forget samples; `dunlearn methods` lists all. Required.
    pub objective: Objective,
    /// Inverse temperature of `npo`, `simnpo`, `dpo`, `idk_dpo`, `altpo`, `kto`, `adv_npo` (unit: 1/nat); exponent of `wga`, `tnpo`; what
    /// `undial` takes from a logit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// Exponent of p in `satimp`'s weight. Default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// Exponent of 1 - p in `satimp`'s weight. Default 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// Further exponent of `tnpo`'s numerator; 1.5 makes it WTNPO. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// `simnpo`'s margin a token, inside the factor beta. Unit: nats. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta: Option<f64>,
    /// `kto` as the `paper` writes it, or as its `code` computes it. Default `paper`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<Form>,
    /// `flat`'s f-divergence: `tv`, `kl`, `js` or `pearson`. Default `tv`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<Divergence>,
    /// `flat` takes the mean probability of each `sample`, or of all tokens of the global `batch`. Default `sample`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean: Option<Mean>,
    /// Tokens at the start of each answer that `ce_u` leaves out. Unit: tokens. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_tokens: Option<usize>,
    /// Positions that `me`, `rmu`, `adv_rmu` and retain `embedding` look at: `all`, or those of the `answer`. Default `all`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
    /// Layer (from 0) whose output `rmu` and `adv_rmu` steer and retain `embedding` holds. Default 7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// Length of `rmu`'s and `adv_rmu`'s target; with `adaptive` a factor of the reference row's own length. Default 20, adaptive 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steering: Option<f64>,
    /// Steer each row to a length that goes with its length in the reference. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adaptive: Option<bool>,
    /// Tensors that `rmu` and `adv_rmu` train, by Hugging Face name, `*` standing for anything. Default: the down projections of `layer`
    /// and of the two before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<Vec<String>>,
    /// Layer (from 0) at whose input `adv_npo` and `adv_rmu` perturb the hidden states. Default 4, and 6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attack_layer: Option<usize>,
    /// Largest L2 norm of a sample's perturbation. Default 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attack_radius: Option<f64>,
    /// Steps of the attack, a forward and a backward pass each. Default 6, and 3 for `adv_rmu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attack_steps: Option<usize>,
    /// `pdu`'s weight of the retain term at the start. Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dual_start: Option<f64>,
    /// How fast `pdu`'s weight follows the retain loss above its bound, a step. Default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dual_rate: Option<f64>,
    /// Epochs before `pdu`'s weight moves. Default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dual_warmup: Option<f64>,
    /// Largest retain loss that `pdu` accepts; choose it slightly above the model's own. Unit: nats a token. Default 0.3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain_bound: Option<f64>,
    /// Factor of the forget objective. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forget_weight: Option<f64>,
    /// `none`, `nll`, `kl`, `embedding` or `ap`. Default `none`.
    #[serde(default)]
    pub retain: Retain,
    /// Factor of the retain term. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain_weight: Option<f64>,
    /// Inverse temperature of retain `ap`. Unit: 1/nat. Default 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain_beta: Option<f64>,
    /// `openunlearning` averages as that framework does where it differs: KL and `undial` over padded positions, `rmu` and `embedding` over
    /// each answer first (docs/methods.md).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
}

/// Each with its own keys and their defaults in [`own`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Mean negative log-likelihood of the scored tokens of `data.train`.
    Finetune,
    /// Gradient ascent: minus the mean negative log-likelihood of the scored tokens of `data.forget`.
    Ga,
    /// Refusal tuning: mean negative log-likelihood of refusals of the forget questions.
    Idk,
    /// Direct preference optimization on `preference` samples.
    Dpo,
    /// DPO with a refusal preferred to the answer.
    IdkDpo,
    /// Alternate preference optimization: DPO with other answers, read from the data, preferred to the true one.
    Altpo,
    /// KTO on undesired answers.
    Kto,
    /// Negative preference optimization (arXiv 2404.05868, eq. 3).
    Npo,
    /// NPO without a reference, normalised by length.
    Simnpo,
    /// Weighted gradient ascent.
    Wga,
    /// Token-wise NPO.
    Tnpo,
    /// Ascent weighted by saturation and importance.
    Satimp,
    /// Cross-entropy to the model's own distribution without the answer.
    CeU,
    /// Self-distillation with the answer's logit lowered.
    Undial,
    /// Maximising entropy.
    Me,
    /// Inverted hinge loss (LoKU).
    Ihl,
    /// f-divergence between refusals and forget answers.
    Flat,
    /// Representation misdirection.
    Rmu,
    /// NPO under a latent attack.
    AdvNpo,
    /// RMU under a latent attack.
    AdvRmu,
    /// Flat logits under a bound on the retain loss, primal-dual.
    Pdu,
    /// Subtracts what is the task's own in weight space; see `[subspace]`.
    Unlearn,
    /// Adds what is the own of the task in `data.train`; see `[subspace]`.
    Learn,
}

impl Objective {
    /// Trains on `data.train` instead of forgetting `data.forget`.
    pub fn learns(self) -> bool {
        matches!(self, Self::Finetune | Self::Learn)
    }

    /// Changes the model by arithmetic on matrices that were trained for it.
    pub fn is_weight_space(self) -> bool {
        matches!(self, Self::Unlearn | Self::Learn)
    }
}

/// All of them.
pub const OBJECTIVES: [Objective; 23] = {
    use Objective::*;
    [
        Finetune, Ga, Idk, Dpo, IdkDpo, Altpo, Kto, Npo, Simnpo, Wga, Tnpo, Satimp, CeU, Undial, Me, Ihl, Flat, Rmu,
        AdvNpo, AdvRmu, Pdu, Unlearn, Learn,
    ]
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Retain {
    #[default]
    None,
    /// Mean negative log-likelihood of the retain samples' scored tokens.
    Nll,
    /// Mean over the retain samples' tokens of KL(reference || model), the reference being the model before training.
    Kl,
    /// Mean squared difference of the hidden states behind `layer` from those of the model before training.
    Embedding,
    /// Answer preservation: the answer stays likelier than a refusal (arXiv 2410.08109).
    Ap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compat {
    #[serde(rename = "openunlearning")]
    OpenUnlearning,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    Paper,
    Code,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// Total variation.
    Tv,
    Kl,
    /// Jensen-Shannon.
    Js,
    Pearson,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mean {
    Sample,
    Batch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    All,
    Answer,
}

/// Keys that an objective takes, with their defaults. docs/methods.md has the source of each.
fn own(objective: Objective) -> &'static str {
    match objective {
        Objective::Finetune
        | Objective::Ga
        | Objective::Idk
        | Objective::Ihl
        | Objective::Unlearn
        | Objective::Learn => "",
        Objective::Npo | Objective::Dpo | Objective::IdkDpo | Objective::Altpo => "beta = 0.1",
        Objective::Kto => "beta = 0.1\nform = 'paper'",
        Objective::Simnpo => "beta = 4.5\ndelta = 0.0",
        Objective::Wga => "beta = 5.0",
        Objective::Tnpo => "beta = 4.0\nalpha = 1.0",
        Objective::Satimp => "beta1 = 5.0\nbeta2 = 0.1",
        Objective::CeU => "skip_tokens = 1",
        Objective::Undial => "beta = 5.0",
        Objective::Me => "positions = 'all'",
        Objective::Flat => "divergence = 'tv'\nmean = 'sample'",
        Objective::Rmu => "layer = 7\nsteering = 20.0\nadaptive = false\npositions = 'all'\nupdate = []",
        Objective::AdvNpo => "beta = 0.1\nattack_layer = 4\nattack_radius = 8.0\nattack_steps = 6",
        Objective::AdvRmu => {
            "layer = 7\nsteering = 20.0\nadaptive = false\npositions = 'all'\nupdate = []\nattack_layer = 6\nattack_radius = 8.0\nattack_steps = 3"
        }
        Objective::Pdu => "dual_start = 100.0\ndual_rate = 5.0\ndual_warmup = 5.0\nretain_bound = 0.3",
    }
}

/// The same for a retain term.
fn own_of_retain(retain: Retain) -> &'static str {
    match retain {
        Retain::None | Retain::Nll | Retain::Kl => "",
        Retain::Embedding => "layer = 7\npositions = 'all'",
        Retain::Ap => "retain_beta = 0.1",
    }
}

/// Keys that any objective may have.
const COMMON: [&str; 5] = ["objective", "forget_weight", "retain", "retain_weight", "compat"];

/// The name of an objective in TOML.
pub fn objective_name(objective: Objective) -> String {
    match toml::Value::try_from(objective) {
        Ok(toml::Value::String(name)) => name,
        _ => unreachable!("invariant: an objective is written as its name"),
    }
}

/// An objective's own keys with their defaults, `key = value`.
pub fn own_keys(objective: Objective) -> Vec<String> {
    own(objective).lines().map(|line| line.replace('\'', "\"")).collect()
}

impl Method {
    pub const WEIGHT: f64 = 1.0;

    /// A method with the defaults of its keys.
    pub fn new(objective: Objective, retain: Retain) -> Self {
        let table = format!("objective = '{}'", objective_name(objective));
        let mut method: Self = toml::from_str(&table).expect("invariant: an objective is a method");
        method.retain = retain;
        method.fill_own_keys();
        method
    }

    /// Gives the keys that the objective and the retain term take, and that are absent, their defaults.
    pub(super) fn fill_own_keys(&mut self) {
        let mut table = self.table();
        for (key, value) in self.own_table() {
            table.entry(key).or_insert(value);
        }
        let adaptive = self.adaptive == Some(true);
        let steering_given = self.steering.is_some();
        *self = table.try_into().expect("invariant: the defaults are of the keys' types");
        if adaptive && !steering_given {
            self.steering = Some(5.0);
        }
        // answers are what the framework looks at
        if self.compat == Some(Compat::OpenUnlearning) && (self.steers() || self.retain == Retain::Embedding) {
            self.positions = Some(Positions::Answer);
        }
        if let (Some([]), Some(layer)) = (self.update.as_deref(), self.layer) {
            let names =
                (layer.saturating_sub(2)..=layer).map(|layer| format!("model.layers.{layer}.mlp.down_proj.weight"));
            self.update = Some(names.collect());
        }
    }

    /// With defaults filled in.
    pub(super) fn filled(&self) -> Self {
        let mut filled = self.clone();
        filled.fill_own_keys();
        filled
    }

    /// Keys that are given and that neither objective nor retain term takes.
    pub(super) fn keys_without_effect(&self) -> Vec<String> {
        let own = self.own_table();
        self.table().keys().filter(|key| !COMMON.contains(&key.as_str()) && !own.contains_key(*key)).cloned().collect()
    }

    /// Who takes a key, in words.
    pub(super) fn takers(key: &str) -> String {
        let takes = |keys: &str| keys.lines().any(|line| line.split(' ').next() == Some(key));
        let objectives: Vec<String> =
            OBJECTIVES.into_iter().filter(|&objective| takes(own(objective))).map(objective_name).collect();
        let retain = match key {
            "layer" | "positions" => " or method.retain = \"embedding\"",
            "retain_beta" => "method.retain = \"ap\"",
            _ => "",
        };
        let objectives = match objectives.len() {
            0 => String::new(),
            _ => format!("method.objective is one of: {}", objectives.join(", ")),
        };
        objectives + retain
    }

    /// Whether the objective is one on hidden states.
    pub(super) fn steers(&self) -> bool {
        matches!(self.objective, Objective::Rmu | Objective::AdvRmu)
    }

    /// Whether refusals are read.
    pub(super) fn uses_refusals(&self) -> bool {
        let objective = matches!(self.objective, Objective::Idk | Objective::IdkDpo | Objective::Kto | Objective::Flat);
        objective || self.retain == Retain::Ap
    }

    fn table(&self) -> toml::Table {
        match toml::Value::try_from(self) {
            Ok(toml::Value::Table(table)) => table,
            _ => unreachable!("invariant: a method is a table"),
        }
    }

    fn own_table(&self) -> toml::Table {
        let parse = |text: &str| toml::from_str::<toml::Table>(text).expect("invariant: the defaults are TOML");
        let mut table = parse(own_of_retain(self.retain));
        table.extend(parse(own(self.objective)));
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_objective_has_its_defaults() {
        for objective in OBJECTIVES {
            for retain in [Retain::None, Retain::Embedding, Retain::Ap] {
                let method = Method::new(objective, retain);
                assert!(method.keys_without_effect().is_empty(), "{objective:?}");
                assert_eq!(method.filled(), method);
            }
        }
        let rmu = Method::new(Objective::Rmu, Retain::Embedding);
        assert_eq!(rmu.update.unwrap()[0], "model.layers.5.mlp.down_proj.weight");
        assert_eq!(Method::takers("delta"), "method.objective is one of: simnpo");
    }
}
