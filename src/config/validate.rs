//! Refusals that the types cannot express: values out of range, keys without effect, keys that a method needs.

use super::data::Kind;
use super::error::ConfigError;
use super::eval::{Attack, Eval, SuiteName, Training};
use super::method::{Compat, Method, Objective, Positions, Retain};
use super::schema::{Config, Device, Dp, Export, Optimizer, OptimizerName, StateDtype};
use super::scope::{LoraInit, Mask, Score, Unit};
use super::subspace;

/// Checks what one key says against what the others say.
pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    method(config)?;
    data(config)?;
    train(config)?;
    optimizer(config)?;
    scope(config)?;
    before(config)?;
    subspace::validate(config)?;
    let parallel = &config.parallel;
    positive("parallel.tp", parallel.tp as f64)?;
    positive("parallel.bucket_mib", parallel.bucket_mib)?;
    if let Dp::Ranks(0) = parallel.dp {
        return Err(ConfigError::value("parallel.dp", "is 0; write \"auto\" or at least 1"));
    }
    if parallel.sequence_parallel && parallel.tp == 1 {
        return no_effect("parallel.sequence_parallel", "with parallel.tp = 1", "set parallel.tp or remove it");
    }
    positive("run.timeout", config.run.timeout as f64)?;
    if config.run.allow_shared_gpu && config.run.device == Device::Cpu {
        return no_effect("run.allow_shared_gpu", "with run.device = \"cpu\"", "remove it");
    }
    let Export { model, dtype, max_shard_mib } = config.export;
    if !model && (dtype, max_shard_mib) != (Export::default().dtype, Export::default().max_shard_mib) {
        return no_effect("export.dtype or export.max_shard_mib", "with export.model = false", "remove it");
    }
    if !config.eval.happens() && config.eval.max_samples != Eval::default().max_samples {
        return no_effect("eval.max_samples", "without an evaluation", "remove it or set eval.after = true");
    }
    eval(config)?;
    positive("export.max_shard_mib", max_shard_mib)
}

fn method(config: &Config) -> Result<(), ConfigError> {
    let method = &config.method;
    if let Some(key) = method.keys_without_effect().into_iter().next() {
        let takers = Method::takers(&key);
        return no_effect(&format!("method.{key}"), &format!("unless {takers}"), "remove it");
    }
    let numbers = [
        ("beta", method.beta),
        ("alpha", method.alpha),
        ("steering", method.steering),
        ("attack_radius", method.attack_radius),
        ("dual_rate", method.dual_rate),
        ("retain_bound", method.retain_bound),
        ("retain_beta", method.retain_beta),
    ];
    for (key, value) in numbers {
        positive(&format!("method.{key}"), value.unwrap_or(1.0))?;
    }
    for (key, value) in [
        ("beta1", method.beta1),
        ("beta2", method.beta2),
        ("dual_start", method.dual_start),
        ("dual_warmup", method.dual_warmup),
    ] {
        not_negative(&format!("method.{key}"), value.unwrap_or(0.0))?;
    }
    finite("method.delta", method.delta.unwrap_or(0.0))?;
    positive("method.attack_steps", method.attack_steps.unwrap_or(1) as f64)?;
    if method.objective == Objective::Finetune {
        if method.forget_weight.is_some() {
            return no_effect("method.forget_weight", "with method.objective = \"finetune\"", "remove it");
        }
        if method.retain != Retain::None {
            return Err(ConfigError::value(
                "method.retain",
                "objective \"finetune\" trains on data.train alone; write retain = \"none\" or put the samples into data.train",
            ));
        }
    }
    if method.objective == Objective::Pdu {
        if method.retain != Retain::Nll {
            let reason = "objective \"pdu\" bounds the retain samples' negative log-likelihood; write retain = \"nll\"";
            return Err(ConfigError::value("method.retain", reason));
        }
        if method.retain_weight.is_some() {
            let when = "with method.objective = \"pdu\": the weight is the dual variable";
            return no_effect("method.retain_weight", when, "write method.dual_start");
        }
    }
    if method.update.as_ref().is_some_and(Vec::is_empty) {
        return Err(ConfigError::value(
            "method.update",
            "is empty: nothing would be trained; name tensors, or write [\"*\"]",
        ));
    }
    let layer = method.filled().layer;
    if let (Some(attack), Some(layer)) = (method.filled().attack_layer, layer)
        && attack > layer
    {
        let reason = format!(
            "is {attack}, behind the steered layer {layer}: the attack would not be seen; expected at most {layer}"
        );
        return Err(ConfigError::value("method.attack_layer", reason));
    }
    finite("method.forget_weight", method.forget_weight.unwrap_or(Method::WEIGHT))?;
    finite("method.retain_weight", method.retain_weight.unwrap_or(Method::WEIGHT))?;
    if method.retain == Retain::None && method.retain_weight.is_some() {
        return no_effect(
            "method.retain_weight",
            "with method.retain = \"none\"",
            "remove it or write retain = \"nll\" or \"kl\"",
        );
    }
    let differs =
        method.retain == Retain::Kl || method.retain == Retain::Embedding || method.objective == Objective::Undial;
    if method.compat == Some(Compat::OpenUnlearning) && !(differs || method.steers()) {
        let when =
            "unless method.retain = \"kl\" or \"embedding\", or method.objective = \"undial\", \"rmu\" or \"adv_rmu\"";
        return no_effect("method.compat", when, "remove it");
    }
    if method.compat.is_some() && method.steers() && method.positions == Some(Positions::All) {
        return no_effect(
            "method.positions",
            "\"all\" with method.compat = \"openunlearning\", which looks at answers",
            "remove it",
        );
    }
    Ok(())
}

fn data(config: &Config) -> Result<(), ConfigError> {
    let data = &config.data;
    let learns = config.method.objective.learns();
    match (learns, &data.train, &data.forget) {
        (true, None, _) => {
            return Err(ConfigError::value(
                "data.train",
                "missing; objectives \"finetune\" and \"learn\" need it: write train = { path = \"train.jsonl\", kind = \"qa\" }",
            ));
        }
        (false, Some(_), _) => {
            return no_effect(
                "data.train",
                "unless method.objective = \"finetune\" or \"learn\"",
                "write data.forget instead",
            );
        }
        (false, None, None) => {
            return Err(ConfigError::value(
                "data.forget",
                "missing; every unlearning objective needs it: write forget = { path = \"forget.jsonl\", kind = \"qa\" }",
            ));
        }
        _ => {}
    }
    if config.method.retain != Retain::None && data.retain.is_none() {
        return Err(ConfigError::value(
            "data.retain",
            "missing; method.retain needs it: write retain = { path = \"retain.jsonl\", kind = \"qa\" }",
        ));
    }
    let evaluated = config.eval.happens();
    let unused = if learns { &data.forget } else { &None };
    for (key, source) in [("data.forget", unused), ("data.retain", &data.retain)] {
        let needed = key == "data.retain" && config.method.retain != Retain::None;
        if source.is_some() && !needed && !evaluated {
            return no_effect(
                key,
                "without a retain term and without evaluation",
                "remove it or set eval.after = true",
            );
        }
    }
    for (key, source) in data.sources() {
        if source.limit == Some(0) {
            return Err(ConfigError::value(&format!("{key}.limit"), "is 0; write at least 1 or remove it"));
        }
        let fields = &source.fields;
        for (field, name, kind) in [
            ("question", &fields.question, &[Kind::Qa, Kind::Choice][..]),
            ("answer", &fields.answer, &[Kind::Qa, Kind::Choice]),
            ("messages", &fields.messages, &[Kind::Chat]),
            ("text", &fields.text, &[Kind::Text]),
            ("idk", &fields.idk, &[Kind::Qa, Kind::Choice, Kind::Preference]),
            ("alternates", &fields.alternates, &[Kind::Qa]),
            ("prompt", &fields.prompt, &[Kind::Preference]),
            ("chosen", &fields.chosen, &[Kind::Preference]),
            ("rejected", &fields.rejected, &[Kind::Preference]),
            ("choices", &fields.choices, &[Kind::Choice]),
        ] {
            if name.is_some() && !kind.contains(&source.kind) {
                let when = format!("with kind = {:?}", source.kind.name());
                return no_effect(&format!("{key}.fields.{field}"), &when, "remove it or change kind");
            }
        }
    }
    let any = |kind: Kind| data.sources().any(|(_, source)| source.kind == kind);
    let asked = [Kind::Qa, Kind::Preference, Kind::Choice].into_iter().any(any);
    if data.refusals.is_some() && !config.method.uses_refusals() {
        let when = "unless the method uses refusals (objective idk, idk_dpo, kto or flat, or retain = \"ap\")";
        return no_effect("data.refusals", when, "remove it");
    }
    if data.system.is_some() && !asked {
        return no_effect("data.system", "unless a source has kind = \"qa\"", "write the message into the samples");
    }
    if data.template.is_some() && !asked && !any(Kind::Chat) {
        return no_effect("data.template", "with kind = \"text\" alone", "remove it");
    }
    if data.max_length < 2 {
        return Err(ConfigError::value("data.max_length", format!("is {}; write at least 2", data.max_length)));
    }
    Ok(())
}

fn train(config: &Config) -> Result<(), ConfigError> {
    let train = &config.train;
    match (train.epochs, train.steps) {
        (None, None) => {
            return Err(ConfigError::value("train.epochs", "missing; write either epochs or steps"));
        }
        (Some(_), Some(_)) => {
            return Err(ConfigError::value("train.steps", "given together with train.epochs; write only one of them"));
        }
        _ => {}
    }
    positive("train.epochs", train.epochs.unwrap_or(1) as f64)?;
    positive("train.steps", train.steps.unwrap_or(1) as f64)?;
    positive("train.global_batch", train.global_batch as f64)?;
    positive("train.micro_batch_tokens", train.micro_batch_tokens as f64)?;
    positive("train.logits_mib", train.logits_mib)
}

fn optimizer(config: &Config) -> Result<(), ConfigError> {
    let optimizer = &config.optimizer;
    not_negative("optimizer.lr", optimizer.lr)?;
    not_negative("optimizer.weight_decay", optimizer.weight_decay)?;
    not_negative("optimizer.max_grad_norm", optimizer.max_grad_norm)?;
    match optimizer.name {
        OptimizerName::Adamw if optimizer.momentum.is_some() => {
            no_effect("optimizer.momentum", "with name = \"adamw\"", "remove it or write betas")
        }
        OptimizerName::Sgd if optimizer.betas.is_some() => {
            no_effect("optimizer.betas", "with name = \"sgd\"", "remove it or write momentum")
        }
        OptimizerName::Sgd if optimizer.state_dtype.is_some() => {
            no_effect("optimizer.state_dtype", "with name = \"sgd\"", "remove it")
        }
        OptimizerName::Sgd if optimizer.eps.is_some() => no_effect("optimizer.eps", "with name = \"sgd\"", "remove it"),
        OptimizerName::Adamw => {
            for beta in optimizer.betas.unwrap_or(Optimizer::BETAS) {
                fraction("optimizer.betas", beta)?;
            }
            positive("optimizer.eps", optimizer.eps.unwrap_or(Optimizer::EPS))
        }
        OptimizerName::Sgd => fraction("optimizer.momentum", optimizer.momentum.unwrap_or(Optimizer::MOMENTUM)),
    }
}

fn scope(config: &Config) -> Result<(), ConfigError> {
    let scope = &config.scope;
    for (key, empty) in [
        ("scope.tensors", scope.tensors.as_ref().is_some_and(Vec::is_empty)),
        ("scope.layers", scope.layers.as_ref().is_some_and(Vec::is_empty)),
        ("scope.lora.targets", scope.lora.iter().any(|lora| lora.targets.as_ref().is_some_and(Vec::is_empty))),
    ] {
        if empty {
            return Err(ConfigError::value(key, "is empty: nothing would be trained; name something or remove it"));
        }
    }
    if let Some(lora) = &scope.lora {
        positive("scope.lora.r", lora.r as f64)?;
        positive("scope.lora.alpha", lora.alpha)?;
        if lora.init == LoraInit::Fila {
            needs_both_sets(config, "scope.lora.init = \"fila\"")?;
            positive("scope.lora.fila_batch", lora.fila_batch.unwrap_or(1) as f64)?;
        } else if lora.fila_batch.is_some() {
            return no_effect("scope.lora.fila_batch", "unless scope.lora.init = \"fila\"", "remove it");
        }
        if scope.mask.is_some() {
            return Err(ConfigError::value(
                "scope.mask",
                "given together with scope.lora: a mask chooses weights of the matrices, which stay as they are; write one of them",
            ));
        }
    }
    if scope.mask.is_some() && config.optimizer.state_dtype == Some(StateDtype::Int8) {
        let reason = "is \"int8\" with scope.mask: the moments of what is chosen are few, and codes of theirs could not be resumed \
                      exactly; write \"f32\" or \"bf16\"";
        return Err(ConfigError::value("optimizer.state_dtype", reason));
    }
    scope.mask.as_ref().map_or(Ok(()), |given| mask(config, given))
}

fn mask(config: &Config, mask: &Mask) -> Result<(), ConfigError> {
    let key = |name: &str| format!("scope.mask.{name}");
    let Mask { score, file, fraction, unit, among, eps, mu, max_cosine, min_gradient, samples, .. } = mask;
    let score = match (score, file) {
        (None, None) => return Err(ConfigError::value("scope.mask.score", "missing; write a score or a file")),
        (Some(_), Some(_)) => {
            return Err(ConfigError::value("scope.mask.file", "given together with scope.mask.score; write only one"));
        }
        (None, Some(_)) => None,
        (Some(score), None) => Some(*score),
    };
    let unit_or_default = unit.unwrap_or_default();
    for (name, given, when, takes) in [
        ("fraction", fraction.is_some(), "with scope.mask.file", score.is_some()),
        ("unit", unit.is_some(), "with scope.mask.file", score.is_some()),
        ("among", among.is_some(), "with scope.mask.file", score.is_some()),
        ("eps", eps.is_some(), "unless score is \"gri\" or \"fila\"", matches!(score, Some(Score::Gri | Score::Fila))),
        ("mu", mu.is_some(), "unless score = \"wagle\"", score == Some(Score::Wagle)),
        ("max_cosine", max_cosine.is_some(), "unless score = \"memflex\"", score == Some(Score::Memflex)),
        ("min_gradient", min_gradient.is_some(), "unless score = \"memflex\"", score == Some(Score::Memflex)),
        (
            "samples",
            samples.is_some(),
            "unless the score looks at samples",
            score.is_some_and(|score| score != Score::Random),
        ),
    ] {
        if given && !takes {
            return no_effect(&key(name), when, "remove it");
        }
    }
    let share = fraction.unwrap_or(Mask::FRACTION);
    check(&key("fraction"), share, share > 0.0 && share <= 1.0, "a number in (0, 1]")?;
    not_negative(&key("eps"), eps.unwrap_or(0.0))?;
    positive(&key("mu"), mu.unwrap_or(Mask::MU))?;
    finite(&key("max_cosine"), max_cosine.unwrap_or(Mask::MAX_COSINE))?;
    not_negative(&key("min_gradient"), min_gradient.unwrap_or(Mask::MIN_GRADIENT))?;
    match score {
        Some(Score::Memflex) if unit_or_default == Unit::Weight => {
            let reason = "is \"weight\" with score = \"memflex\", which compares directions; write \"row\", \"column\" or \"tensor\"";
            return Err(ConfigError::value(&key("unit"), reason));
        }
        Some(Score::Activations) if unit_or_default != Unit::Column => {
            let reason =
                "is not \"column\" with score = \"activations\", which rates value vectors; write unit = \"column\"";
            return Err(ConfigError::value(&key("unit"), reason));
        }
        Some(Score::Gri | Score::Fila | Score::Wagle | Score::Memflex) => needs_both_sets(config, "scope.mask.score")?,
        _ => {}
    }
    Ok(())
}

fn needs_both_sets(config: &Config, what: &str) -> Result<(), ConfigError> {
    match config.data.retain {
        Some(_) => Ok(()),
        None => Err(ConfigError::value("data.retain", format!("missing; {what} compares forget and retain samples"))),
    }
}

fn before(config: &Config) -> Result<(), ConfigError> {
    let before = &config.before;
    let asks = before.reset || before.blend.is_some();
    if asks && before.other.is_none() {
        return Err(ConfigError::value(
            "before.other",
            "missing; before.reset and before.blend need another checkpoint",
        ));
    }
    if !asks && before.other.is_some() {
        return no_effect("before.other", "without before.reset or before.blend", "remove it");
    }
    if let Some(blend) = before.blend {
        finite("before.blend", blend)?;
    }
    if let Some(noise) = before.noise {
        positive("before.noise", noise)?;
    } else if before.noise_relative {
        return no_effect("before.noise_relative", "without before.noise", "remove it");
    }
    if config.scope.lora.is_some() && (before.reset || before.noise.is_some()) {
        let key = if before.reset { "before.reset" } else { "before.noise" };
        return no_effect(key, "with scope.lora: the matrices do not change", "remove one of them");
    }
    Ok(())
}

fn eval(config: &Config) -> Result<(), ConfigError> {
    let eval = &config.eval;
    let given = |suite: &SuiteName| Eval { suites: None, ..eval.clone() }.runs(*suite);
    if let Some(suite) = eval.suites.iter().flatten().find(|suite| !given(suite)) {
        let reason = format!("lists {:?}, which has no table; write [eval.{0}] or remove it", suite.name());
        return Err(ConfigError::value("eval.suites", reason));
    }
    let runs = |suite| eval.runs(suite);
    if eval.retrained.is_some() && !(runs(SuiteName::Tofu) || runs(SuiteName::Mia) || eval.attack.is_some()) {
        let when = "without [eval.tofu], [eval.mia] or [eval.attack]";
        return no_effect("eval.retrained", when, "remove it or add such a table");
    }
    if eval.reference.is_some() && !runs(SuiteName::Mia) {
        return no_effect("eval.reference", "without [eval.mia]", "remove it or add that table");
    }
    if eval.cache.is_some() && eval.retrained.is_none() && eval.original.is_none() && eval.reference.is_none() {
        let when = "without eval.retrained, eval.original or eval.reference";
        return no_effect("eval.cache", when, "remove it or name such a model");
    }
    if let Some(tofu) = &eval.tofu {
        positive("eval.tofu.max_new_tokens", tofu.max_new_tokens as f64)?;
        if !tofu.forget.starts_with("forget") {
            let reason = format!("is {:?}; expected forget01, forget05 or forget10", tofu.forget);
            return Err(ConfigError::value("eval.tofu.forget", reason));
        }
    }
    if let Some(choice) = &eval.choice {
        match (choice.shots, &choice.examples) {
            (0, Some(_)) => return no_effect("eval.choice.examples", "with shots = 0", "remove it or set shots"),
            (n, None) if n > 0 => {
                return Err(ConfigError::value("eval.choice.examples", format!("missing; shots = {n} needs examples")));
            }
            _ => {}
        }
    }
    if let Some(perplexity) = &eval.perplexity
        && perplexity.source.kind != Kind::Text
    {
        let reason = format!("is {:?}; perplexity is of running text, write \"text\"", perplexity.source.kind.name());
        return Err(ConfigError::value("eval.perplexity.source.kind", reason));
    }
    if let Some(settings) = &eval.attack {
        attack(settings, config)?;
    }
    if let Some(mia) = &eval.mia {
        check("eval.mia.k", mia.k, mia.k > 0.0 && mia.k <= 1.0, "a number in (0, 1]")?;
        let muse = eval.muse.as_ref().is_some_and(|muse| muse.path.is_some());
        if mia.holdout.is_none() && !muse {
            let reason = "missing; write texts that no model has seen, or eval.muse.path";
            return Err(ConfigError::value("eval.mia.holdout", reason));
        }
        if mia.holdout.is_some() && mia.forget.is_none() && config.data.forget.is_none() {
            let reason = "missing; write the texts that were to be forgotten, or data.forget";
            return Err(ConfigError::value("eval.mia.forget", reason));
        }
    }
    if let Some(muse) = &eval.muse {
        for (key, examples, questions) in [
            ("eval.muse.knowmem_forget_icl", &muse.knowmem_forget_icl, &muse.knowmem_forget),
            ("eval.muse.knowmem_retain_icl", &muse.knowmem_retain_icl, &muse.knowmem_retain),
        ] {
            if examples.is_some() && questions.is_none() && muse.path.is_none() {
                return no_effect(key, "without the questions", "remove it");
            }
        }
        let none = [&muse.path, &muse.verbmem, &muse.knowmem_forget, &muse.knowmem_retain];
        if none.iter().all(|set| set.is_none()) {
            let reason = "names no set; write path, or verbmem, knowmem_forget or knowmem_retain";
            return Err(ConfigError::value("eval.muse", reason));
        }
    }
    Ok(())
}

fn attack(attack: &Attack, config: &Config) -> Result<(), ConfigError> {
    let forget = config.data.forget.as_ref();
    let needs = |key: &str| {
        Err(ConfigError::value(&format!("eval.attack.{key}"), "needs data.forget, of kind \"qa\"".to_owned()))
    };
    let qa = forget.is_some_and(|source| source.kind == Kind::Qa);
    if attack.paraphrase.is_some() && !qa {
        return needs("paraphrase");
    }
    if attack.in_context > 0 && !qa {
        return needs("in_context");
    }
    if forget.is_none() {
        return Err(ConfigError::value("eval.attack", "needs data.forget: what is to be brought back".to_owned()));
    }
    if attack.depth.is_some() && !qa {
        return needs("depth");
    }
    if attack.depth.is_some() && config.eval.retrained.is_none() {
        let reason = "needs eval.retrained, a model that never saw the forget data".to_owned();
        return Err(ConfigError::value("eval.attack.depth", reason));
    }
    positive("eval.attack.krs", attack.krs.unwrap_or(1) as f64)?;
    if let Some(latent) = &attack.latent {
        positive("eval.attack.latent.radius", latent.radius)?;
        positive("eval.attack.latent.steps", latent.steps as f64)?;
    }
    let training = |key: &str, training: &Training| {
        for (name, value) in [
            ("steps", training.steps as f64),
            ("batch", training.batch as f64),
            ("lr", training.lr),
            ("every", training.every as f64),
        ] {
            positive(&format!("eval.attack.{key}.training.{name}"), value)?;
        }
        Ok(())
    };
    if let Some(relearn) = &attack.relearn {
        let fraction = relearn.fraction;
        check("eval.attack.relearn.fraction", fraction, fraction > 0.0 && fraction <= 1.0, "a number in (0, 1]")?;
        training("relearn", &relearn.training)?;
    }
    if let Some(benign) = &attack.benign {
        training("benign", &benign.training)?;
    }
    if let Some(rtt) = &attack.rtt {
        check("eval.attack.rtt.folds", rtt.folds as f64, rtt.folds >= 2, "at least 2")?;
        for (name, value) in [("epochs", rtt.epochs as f64), ("batch", rtt.batch as f64), ("lr", rtt.lr)] {
            positive(&format!("eval.attack.rtt.{name}"), value)?;
        }
    }
    Ok(())
}

/// As [`validate`] for an evaluation alone, which needs neither a method nor an optimizer.
pub(super) fn validate_evaluation(config: &Config) -> Result<(), ConfigError> {
    let has_data = config.data.sources().next().is_some();
    if !has_data && !SuiteName::ALL.iter().any(|&suite| config.eval.runs(suite)) {
        let reason = "names nothing to measure; write a table such as [eval.tofu], or data.forget or data.retain";
        return Err(ConfigError::value("eval", reason));
    }
    positive("parallel.tp", config.parallel.tp as f64)?;
    positive("run.timeout", config.run.timeout as f64)?;
    positive("train.micro_batch_tokens", config.train.micro_batch_tokens as f64)?;
    positive("train.logits_mib", config.train.logits_mib)?;
    eval(config)
}

fn no_effect(key: &str, when: &str, instead: &str) -> Result<(), ConfigError> {
    Err(ConfigError::value(key, format!("has no effect {when}; {instead}")))
}

fn positive(key: &str, value: f64) -> Result<(), ConfigError> {
    check(key, value, value.is_finite() && value > 0.0, "a number above 0")
}

fn not_negative(key: &str, value: f64) -> Result<(), ConfigError> {
    check(key, value, value.is_finite() && value >= 0.0, "a number not below 0")
}

fn fraction(key: &str, value: f64) -> Result<(), ConfigError> {
    check(key, value, (0.0..1.0).contains(&value), "a number in [0, 1)")
}

fn finite(key: &str, value: f64) -> Result<(), ConfigError> {
    check(key, value, value.is_finite(), "a finite number")
}

fn check(key: &str, value: f64, good: bool, expected: &str) -> Result<(), ConfigError> {
    if good { Ok(()) } else { Err(ConfigError::value(key, format!("is {value}; expected {expected}"))) }
}

#[cfg(test)]
mod tests {
    use crate::config::from_str;

    const NPO: &str = r#"
[run]
dir = "runs/x"
[model]
path = "m"
[data]
forget = { path = "f.jsonl", kind = "qa" }
retain = { path = "r.jsonl", kind = "qa" }
[method]
objective = "npo"
retain = "nll"
[train]
epochs = 2
[optimizer]
lr = 1e-5
"#;

    fn refused(overrides: &[&str], expected: &str) {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        let message = from_str(NPO, "a.toml", &overrides).unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        refused(&["method.objective=ga", "method.beta=0.1"], "method.beta: has no effect unless");
        refused(&["method.retain=none", "method.retain_weight=2"], "method.retain_weight: has no effect");
        refused(&["method.compat=openunlearning"], "method.compat: has no effect unless method.retain = \"kl\"");
        refused(&["method.delta=1"], "method.delta: has no effect unless method.objective is one of: simnpo");
        refused(&["method.layer=1"], "method.layer: has no effect unless");
        refused(&["data.refusals=a"], "data.refusals: has no effect unless");
        refused(&["parallel.sequence_parallel=true"], "parallel.sequence_parallel: has no effect");
        refused(&["optimizer.momentum=0.9"], "optimizer.momentum: has no effect");
        refused(&["optimizer.name=sgd", "optimizer.eps=1e-6"], "optimizer.eps: has no effect");
        refused(&["data.retain.fields.text=body"], "data.retain.fields.text: has no effect with kind = \"qa\"");
        refused(&["data.forget.kind=text", "data.retain.kind=chat", "data.system=Hi"], "data.system: has no effect");
        refused(&["data.forget.kind=text", "data.retain.kind=text", "data.template=chat"], "data.template: has no");
        refused(&["export.model=false", "export.dtype=bf16"], "export.dtype or export.max_shard_mib: has no effect");
        refused(
            &["method.retain=none", "data.retain.limit=3", "eval={before=false, after=false, max_samples=3}"],
            "data.retain: has no effect",
        );
        refused(&["data.train={path='t', kind='qa'}"], "data.train: has no effect unless");
        refused(&["eval.suites=['tofu']"], "eval.suites: lists \"tofu\", which has no table");
        refused(
            &["eval.retrained=r"],
            "eval.retrained: has no effect without [eval.tofu], [eval.mia] or [eval.attack]",
        );
        refused(&["eval.cache=c"], "eval.cache: has no effect without");
        refused(&["eval.reference=r"], "eval.reference: has no effect without [eval.mia]");
        refused(&["eval.choice={path='c', examples='e'}"], "eval.choice.examples: has no effect with shots = 0");
        refused(&["eval.muse={knowmem_retain_icl='e'}"], "eval.muse.knowmem_retain_icl: has no effect without");
        refused(&["method.retain=none", "eval.before=false", "eval.after=false"], "data.retain: has no effect");
    }

    #[test]
    fn what_a_method_needs_is_asked_for() {
        refused(&["method.objective=finetune", "method.retain=none"], "data.train: missing");
        refused(&["method.objective=finetune"], "method.retain: objective \"finetune\"");
        refused(&["method.objective=pdu", "method.retain=kl"], "method.retain: objective \"pdu\" bounds");
        refused(&["method.objective=pdu", "method.retain_weight=2"], "method.retain_weight: has no effect with");
        refused(&["method.objective=adv_rmu", "method.attack_layer=9"], "method.attack_layer: is 9, behind");
        refused(&["method.objective=rmu", "method.update=[]"], "method.update: is empty");
    }

    #[test]
    fn values_out_of_range_are_refused() {
        refused(&["method.beta=0"], "method.beta: is 0; expected a number above 0");
        refused(&["optimizer.lr=-1"], "optimizer.lr: is -1");
        refused(&["optimizer.betas=[0.9, 1.0]"], "optimizer.betas: is 1");
        refused(&["train.steps=3"], "train.steps: given together");
        refused(&["data.max_length=1"], "data.max_length: is 1");
        refused(&["data.forget.limit=0"], "data.forget.limit: is 0");
        refused(&["eval.mia={holdout={path='h', kind='qa'}, k=0}"], "eval.mia.k: is 0");
        refused(
            &["eval.mia={k=0.3}"],
            "eval.mia.holdout: missing; write texts that no model has seen, or eval.muse.path",
        );
        refused(&["eval.muse={limit=3}"], "eval.muse: names no set; write path");
        refused(&["eval.tofu={path='t', forget='retain90'}"], "eval.tofu.forget: is \"retain90\"");
        refused(&["eval.perplexity={source={path='t', kind='qa'}}"], "eval.perplexity.source.kind: is \"qa\"");
        refused(&["eval.muse={}"], "eval.muse: names no set");
        refused(&["eval.every=2 weeks"], "a.toml with --set eval.every=2 weeks: `every = \"2 weeks\"`: invalid value");
    }
}
