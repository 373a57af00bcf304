//! Knowledge recovery by patching (arXiv 2410.06606): values of the original model are put into the unlearned one in a window of layers.
//! `KRS = 1 - MSE(patched, original) / MSE(unlearned, original)` of the logits over the last answer tokens: 1 says that what was
//! changed lies in what was put back, 0 that nothing of it does.

use tch::Tensor;

use super::{alone, square_distance};
use crate::data::Sample;
use crate::dist::{Reduce, World};
use crate::model::{Decoder, Site, Weights};

/// What is put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// The coefficients of the value vectors: what enters the down products.
    Mlp,
    /// What attention adds.
    Attention,
    /// The value vectors themselves: the weights of the down products.
    Values,
}

impl Component {
    pub const ALL: [Self; 3] = [Self::Mlp, Self::Attention, Self::Values];

    pub fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::Attention => "attention",
            Self::Values => "values",
        }
    }
}

/// One window and component.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Krs {
    pub first_layer: usize,
    pub component: Component,
    /// None where the two models have the same logits.
    pub score: Option<f64>,
}

/// Answer tokens that count, from the end.
const TOKENS: usize = 30;

/// The score of every window of `window` layers and every component. All ranks call it and get the same.
///
/// `progress` is called for each sample that this rank has done.
pub fn krs(
    decoder: &Decoder,
    unlearned: &Weights,
    original: &Weights,
    samples: &[Sample],
    window: usize,
    world: &World,
    mut progress: impl FnMut(),
) -> Vec<Krs> {
    let window = window.clamp(1, decoder.arch.num_layers);
    let firsts = 0..=decoder.arch.num_layers - window;
    let cases: Vec<(usize, Component)> =
        firsts.flat_map(|first| Component::ALL.map(|component| (first, component))).collect();
    // of the unlearned model, then of each case
    let mut distances = vec![0.0; 1 + cases.len()];
    for sample in samples.iter().skip(world.mesh.dp_rank()).step_by(world.mesh.dp) {
        let last = &sample.scored[sample.scored.len().saturating_sub(TOKENS)..];
        let (batch, positions) = alone(decoder, sample, last);
        let logits =
            |weights: &Weights, hidden: &Tensor| decoder.all_logits(weights, &hidden.index_select(0, &positions));
        let mut kept: Vec<[Tensor; 2]> = Vec::new();
        let mut attention = None;
        let hidden = decoder.forward_changed(original, &batch, &mut |_, site, value| {
            match site {
                Site::Attention => attention = Some(value.shallow_clone()),
                Site::MlpActivation => {
                    let attention = attention.take().expect("invariant: attention comes before the MLP");
                    kept.push([attention, value.shallow_clone()]);
                }
                Site::Layer => {}
            }
            value
        });
        let want = logits(original, &hidden);
        let plain = decoder.forward_changed(unlearned, &batch, &mut |_, _, value| value);
        distances[0] += square_distance(&logits(unlearned, &plain), &want);
        for (index, &(first, component)) in cases.iter().enumerate() {
            let inside = first..first + window;
            let (weights, site, at) = match component {
                Component::Attention => (None, Some(Site::Attention), 0),
                Component::Mlp => (None, Some(Site::MlpActivation), 1),
                Component::Values => (Some(with_values(decoder, unlearned, original, inside.clone())), None, 0),
            };
            let weights = weights.as_ref().unwrap_or(unlearned);
            let hidden = decoder.forward_changed(weights, &batch, &mut |layer, here, value| {
                if site == Some(here) && inside.contains(&layer) { kept[layer][at].shallow_clone() } else { value }
            });
            distances[1 + index] += square_distance(&logits(weights, &hidden), &want);
        }
        progress();
    }
    world.dp.all_reduce_f64(&mut distances, Reduce::Sum);
    let score = |patched: f64| (distances[0] > 0.0).then(|| 1.0 - patched / distances[0]);
    let all = cases.iter().zip(&distances[1..]);
    all.map(|(&(first_layer, component), &patched)| Krs { first_layer, component, score: score(patched) }).collect()
}

/// The unlearned model with the original's down products in some layers.
fn with_values(decoder: &Decoder, unlearned: &Weights, original: &Weights, layers: std::ops::Range<usize>) -> Weights {
    let restored: Vec<usize> = layers.map(|layer| decoder.table.layers[layer].down).collect();
    let one = |id: usize| if restored.contains(&id) { original.get(id) } else { unlearned.get(id) }.shallow_clone();
    Weights::new((0..decoder.table.params.len()).map(one).collect())
}
