//! UWC's calibration (arXiv 2406.09179): an unlearned model is mixed with the one before until it has kept enough, so that methods are
//! compared by what they forget at the same price.
//!
//! `theta(share) = share x before + (1 - share) x after`. The least share that reaches the bar is found by bisection, on the understanding
//! that more of the model before keeps more.

use serde::Serialize;
use serde_json::Value;

use super::inputs::{Inputs, Loaded};
use super::{Context, RunError, evaluate, forward_options, gradient_options, trainer_options};
use crate::checkpoint::Folder;
use crate::config::Config;
use crate::eval::LikelihoodScores;
use crate::model::sharding::Piece;
use crate::train::{GradientBuffers, Optimizer, Schedule, Trainer};
use crate::unlearn;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// The set that is to be kept, by the name that it has in a summary.
    pub set: String,
    /// Its number, by name; larger is better.
    pub metric: String,
    /// Share of the number before that is to be kept, in (0, 1].
    pub keep: f64,
    /// Models that are evaluated, at least 3.
    pub evaluations: usize,
}

/// One mixture and its numbers.
#[derive(Clone, Debug, Serialize)]
pub struct Mixture {
    /// Of the model before.
    pub share: f64,
    pub sets: Vec<(String, LikelihoodScores)>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Calibrated {
    pub set: String,
    pub metric: String,
    /// The number before, and what had to be reached.
    pub before: f64,
    pub bar: f64,
    /// The least share that reached it, of those that were tried.
    pub share: f64,
    /// In the order in which they were tried.
    pub tried: Vec<Mixture>,
}

impl Calibrated {
    /// The mixture that was found.
    pub fn found(&self) -> &Mixture {
        let found = self.tried.iter().find(|mixture| mixture.share == self.share);
        found.expect("invariant: the share was tried")
    }
}

/// Finds how much of the configuration's model must be mixed into `after`. All ranks call it and get the same.
///
/// # Errors
/// A model that is not of the same shapes, an unknown set or number.
pub fn calibrate(
    config: &Config,
    after: &std::path::Path,
    wish: &Calibration,
    context: &Context,
) -> Result<Calibrated, RunError> {
    let Context { world, console, .. } = context;
    let mut inputs = Inputs::read(config, world)?;
    let known: Vec<&str> = inputs.sets().into_iter().map(|(name, _)| name).collect();
    if !known.contains(&wish.set.as_str()) {
        let known = known.join(", ");
        return Err(RunError::Refused(format!("the configuration has no set {:?}; its sets are {known}", wish.set)));
    }
    let Loaded { decoder, parameters, .. } = inputs.load_still(config, world, context.device, console)?;
    let (before, after) = (Folder::open(&config.model.path)?, Folder::open(after)?);
    after.check(&decoder.table)?;
    let options = gradient_options(config, decoder.device);
    let trainer = Trainer {
        schedule: Schedule::new(&config.schedule, config.optimizer.lr, 1, 1),
        method: unlearn::method(&config.method, config.run.seed, 1),
        options: trainer_options(config),
        broken: Trainer::whole(decoder.device),
        gradients: GradientBuffers::new(&decoder.table, &parameters.layout, &world.tp, &world.dp, options),
        optimizer: Optimizer::none(),
        decoder,
        parameters,
    };
    let evaluated = |share: f64| -> Result<Mixture, RunError> {
        let Trainer { decoder, parameters, .. } = &trainer;
        for id in 0..decoder.table.own {
            let value = |piece: &Piece| -> Result<_, RunError> {
                let wide = |folder: &Folder| Ok::<_, RunError>(folder.slice(piece)?.to_kind(tch::Kind::Float));
                Ok(wide(&after)?.lerp(&wide(&before)?, share))
            };
            parameters.put(&decoder.table, id, value)?;
        }
        let sets = evaluate(config, &inputs, &trainer, forward_options(config), world, console);
        Ok(Mixture { share, sets })
    };
    search(wish, evaluated)
}

/// The bisection alone.
fn search(
    wish: &Calibration,
    mut evaluated: impl FnMut(f64) -> Result<Mixture, RunError>,
) -> Result<Calibrated, RunError> {
    let number = |mixture: &Mixture| number(mixture, wish);
    let mut tried = vec![evaluated(1.0)?];
    let before = number(&tried[0])?;
    let bar = wish.keep * before;
    tried.push(evaluated(0.0)?);
    // the bar lies above `low` and is reached at `high`
    let (mut low, mut high) = (0.0, if number(&tried[1])? >= bar { 0.0 } else { 1.0 });
    while tried.len() < wish.evaluations && high > low {
        let middle = (low + high) / 2.0;
        tried.push(evaluated(middle)?);
        let reached = number(&tried[tried.len() - 1])? >= bar;
        *(if reached { &mut high } else { &mut low }) = middle;
    }
    Ok(Calibrated { set: wish.set.clone(), metric: wish.metric.clone(), before, bar, share: high, tried })
}

fn number(mixture: &Mixture, wish: &Calibration) -> Result<f64, RunError> {
    let set = mixture.sets.iter().find(|(name, _)| *name == wish.set);
    let (_, scores) = set.expect("invariant: the set is one of the configuration's");
    let all = serde_json::to_value(scores).expect("invariant: scores are JSON");
    // counts are no scores, and of the likelihood a smaller one is better
    let known = |(name, value): (&String, &Value)| {
        (value.is_f64() && name != "nll").then(|| (name.clone(), value.as_f64().unwrap_or(f64::NAN)))
    };
    let known: Vec<(String, f64)> = all.as_object().into_iter().flatten().filter_map(known).collect();
    let found = known.iter().find(|(name, _)| *name == wish.metric);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
        let names = names.join(", ");
        RunError::Refused(format!("there is no number {:?} of which more is better; there are {names}", wish.metric))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(keep: f64, evaluations: usize) -> Calibration {
        Calibration { set: "retain".into(), metric: "probability".into(), keep, evaluations }
    }

    /// A model whose retain number is a known function of the share.
    fn model(keeps: impl Fn(f64) -> f64) -> impl FnMut(f64) -> Result<Mixture, RunError> {
        move |share| {
            let scores = LikelihoodScores { probability: keeps(share), ..Default::default() };
            Ok(Mixture { share, sets: vec![("retain".to_owned(), scores)] })
        }
    }

    #[test]
    fn the_least_share_that_reaches_the_bar_is_found() {
        let found = search(&wish(0.95, 10), model(|share| 0.2 + 0.6 * share * share)).unwrap();
        // 0.2 + 0.6 x^2 = 0.95 * 0.8
        let exact = (0.56f64 / 0.6).sqrt();
        assert_eq!(found.tried.len(), 10);
        assert!(found.share >= exact && found.share - exact <= 1.0 / 256.0, "{} {exact}", found.share);
        assert_eq!(found.found().share, found.share);
        assert!((found.before - 0.8).abs() < 1e-12 && (found.bar - 0.76).abs() < 1e-12);
    }

    #[test]
    fn what_has_kept_enough_is_not_mixed_and_what_keeps_nothing_is_the_model_before() {
        let found = search(&wish(0.5, 10), model(|share| 0.6 + 0.2 * share)).unwrap();
        assert_eq!((found.share, found.tried.len()), (0.0, 2));
        let cliff = search(&wish(0.9, 8), model(|share| if share < 1.0 { 0.0 } else { 1.0 })).unwrap();
        assert_eq!((cliff.share, cliff.tried.len()), (1.0, 8));
    }

    #[test]
    fn unknown_numbers_are_refused() {
        for metric in ["nll", "samples", "es"] {
            let wish = Calibration { metric: metric.into(), ..wish(0.9, 5) };
            let words = search(&wish, model(|_| 1.0)).unwrap_err().to_string();
            assert!(words.contains("there are probability, token_accuracy"), "{words}");
        }
    }
}
