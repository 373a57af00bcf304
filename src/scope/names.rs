//! Which tensors may change, by name, layer and module: what `[scope]` and `method.update` leave of the sharding table.

use super::ScopeError;
use crate::config::{Config, Score};
use crate::model::sharding::{Class, ParamId, Table, matches};

/// Freezes what may not change, or everything but new adapters.
///
/// Gives the names of the tensors that may change. Where they are only a part of what is held as one parameter (q of q, k and v), the
/// rest must be held by a mask: see [`super::Scoped`].
///
/// # Errors
/// Patterns, layers and modules that the model has not; nothing left.
pub fn narrow(table: &mut Table, config: &Config) -> Result<Vec<String>, ScopeError> {
    check(table, config)?;
    let scope = &config.scope;
    let in_layers: Vec<ParamId> =
        table.layers.iter().flat_map(|layer| [layer.qkv, layer.output, layer.gate_up, layer.down]).collect();
    let value_vectors = scope.mask.as_ref().is_some_and(|mask| mask.score == Some(Score::Activations));
    let mut names = Vec::new();
    for (id, param) in table.params.iter().enumerate() {
        let in_weight_space = config.method.objective.is_weight_space();
        let masked = scope.mask.is_some() || scope.lora.is_some() || in_weight_space;
        let fits = match (masked, &scope.tensors) {
            (true, _) if in_weight_space => in_layers.contains(&id),
            (true, None) => in_layers.contains(&id),
            (true, Some(_)) => param.class == Class::Matrix,
            (false, _) => true,
        };
        let fits = fits && (!value_vectors || table.layers.iter().any(|layer| layer.down == id));
        let named = param.pieces.iter().map(|piece| &piece.name).filter(|name| fits && is_wanted(config, name));
        named.for_each(|name| {
            if names.last() != Some(name) {
                names.push(name.clone());
            }
        });
    }
    if names.is_empty() {
        return Err(ScopeError::Nothing(describe(config)));
    }
    match &scope.lora {
        Some(lora) => {
            let adapted = |name: &str| names.iter().any(|known| known == name);
            table.adapt(adapted, lora.r as i64, lora.scale());
            if table.params.len() == table.own {
                return Err(ScopeError::Nothing(describe(config)));
            }
        }
        None => table.freeze(|param| param.pieces.iter().any(|piece| names.contains(&piece.name))),
    }
    Ok(names)
}

/// Whether names alone cannot say what is trained: of some parameter only a part may change.
pub fn is_partial(table: &Table, names: &[String]) -> bool {
    let trained = table.params[..table.own].iter().filter(|param| param.class != Class::Frozen);
    trained.flat_map(|param| &param.pieces).any(|piece| !names.contains(&piece.name))
}

fn is_wanted(config: &Config, name: &str) -> bool {
    let scope = &config.scope;
    let any = |patterns: &Vec<String>| patterns.iter().any(|pattern| matches(pattern, name));
    let layer = layer_of(name);
    config.method.update.as_ref().is_none_or(any)
        && scope.tensors.as_ref().is_none_or(any)
        && scope.layers.as_ref().is_none_or(|layers| layer.is_some_and(|layer| layers.contains(&layer)))
        && scope
            .lora
            .as_ref()
            .and_then(|lora| lora.targets.as_ref())
            .is_none_or(|targets| targets.iter().any(|target| target == module_of(name)))
}

fn check(table: &Table, config: &Config) -> Result<(), ScopeError> {
    let scope = &config.scope;
    let names: Vec<&str> = table.tensors().into_iter().map(|(name, _)| name).collect();
    for (key, patterns) in [("method.update", &config.method.update), ("scope.tensors", &scope.tensors)] {
        for pattern in patterns.iter().flatten() {
            if !names.iter().any(|name| matches(pattern, name)) {
                let example = table.params[table.layers[0].down].pieces[0].name.clone();
                return Err(ScopeError::NoTensor { key, pattern: pattern.clone(), example });
            }
        }
    }
    let layers = table.layers.len();
    if let Some(&layer) = scope.layers.iter().flatten().find(|&&layer| layer >= layers) {
        return Err(ScopeError::NoLayer { layer, last: layers - 1 });
    }
    let modules: Vec<&str> =
        names.iter().filter(|name| layer_of(name) == Some(0)).map(|name| module_of(name)).collect();
    let targets = scope.lora.iter().filter_map(|lora| lora.targets.as_ref()).flatten();
    for target in targets {
        if !modules.contains(&target.as_str()) || target.contains("norm") {
            let known: Vec<&str> = modules.iter().copied().filter(|module| !module.contains("norm")).collect();
            return Err(ScopeError::NoModule { target: target.clone(), known: known.join(", ") });
        }
    }
    Ok(())
}

/// The decoder layer that a Hugging Face name belongs to.
pub fn layer_of(name: &str) -> Option<usize> {
    name.split_once(".layers.")?.1.split('.').next()?.parse().ok()
}

/// `q_proj` of `model.layers.0.self_attn.q_proj.weight`.
fn module_of(name: &str) -> &str {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    stem.rsplit('.').next().unwrap_or(stem)
}

fn describe(config: &Config) -> String {
    let mut words = Vec::new();
    for (key, list) in [("method.update", &config.method.update), ("scope.tensors", &config.scope.tensors)] {
        words.extend(list.as_ref().map(|list| format!("{key} = {list:?}")));
    }
    words.extend(config.scope.layers.as_ref().map(|layers| format!("scope.layers = {layers:?}")));
    if let Some(lora) = &config.scope.lora {
        words.push(lora.targets.as_ref().map_or("scope.lora".to_owned(), |t| format!("scope.lora.targets = {t:?}")));
    }
    words.join(", ")
}
