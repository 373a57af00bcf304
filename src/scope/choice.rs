//! From rates to marks: the top fraction, exactly and alike on every layout.

use super::elements::{Elements, each};
use super::names::layer_of;
use super::score::{group, groups, weights_in_group};
use super::top::{Cut, largest};
use crate::config::{Among, Unit};
use crate::dist::World;

/// Marks of this rank's runs, in the order of [`Elements::runs`].
pub type Marks = Vec<Vec<bool>>;

/// Competitors: tensors whose weights are ranked together.
fn pools(elements: &Elements, among: Among) -> Vec<Vec<usize>> {
    let all = 0..elements.tensors.len();
    match among {
        Among::Model => vec![all.collect()],
        Among::Tensor => all.map(|tensor| vec![tensor]).collect(),
        Among::Layer => {
            let mut pools = std::collections::BTreeMap::<Option<usize>, Vec<usize>>::new();
            all.for_each(|tensor| pools.entry(layer_of(&elements.tensors[tensor].name)).or_default().push(tensor));
            pools.into_values().collect()
        }
    }
}

/// Chooses the `fraction` of weights with the largest keys; of equal ones those that come first in the model. All ranks call it.
pub fn weights(elements: &Elements, keys: &[Vec<u32>], fraction: f64, among: Among, world: &World) -> Marks {
    let mut marks: Marks = keys.iter().map(|keys| vec![false; keys.len()]).collect();
    for pool in pools(elements, among) {
        let size: u64 = pool.iter().map(|&t| (elements.tensors[t].rows * elements.tensors[t].columns) as u64).sum();
        let count = (fraction * size as f64).round() as u64;
        let runs = || elements.runs.iter().enumerate().filter(|(_, run)| pool.contains(&run.tensor));
        let ids = |index: usize, visit: &mut dyn FnMut(usize, u64)| {
            let run = &elements.runs[index];
            let columns = elements.tensors[run.tensor].columns;
            each(&run.place, |at, row, column| visit(at, (run.tensor as u64) << 44 | (row * columns + column) as u64));
        };
        let show = |visit: &mut dyn FnMut(u32, u64)| {
            for (index, _) in runs().filter(|(_, run)| run.counts) {
                ids(index, &mut |at, id| visit(keys[index][at], id));
            }
        };
        let cut: Cut = largest(count, &show, world);
        for (index, _) in runs() {
            ids(index, &mut |at, id| marks[index][at] = cut.chooses(keys[index][at], id));
        }
    }
    marks
}

/// Chooses groups from the best down while they hold at most the `fraction` of the weights, but at least one. Rates are the same on all
/// ranks, and so is the choice: for each tensor its groups' marks.
pub fn whole_groups(
    elements: &Elements,
    unit: Unit,
    rates: &[Vec<f64>],
    fraction: f64,
    among: Among,
) -> Vec<Vec<bool>> {
    let mut marks: Vec<Vec<bool>> = elements.tensors.iter().map(|tensor| vec![false; groups(tensor, unit)]).collect();
    for pool in pools(elements, among) {
        let mut order: Vec<(usize, usize)> =
            pool.iter().flat_map(|&tensor| (0..rates[tensor].len()).map(move |group| (tensor, group))).collect();
        order.sort_by(|a, b| rates[b.0][b.1].total_cmp(&rates[a.0][a.1]).then(a.cmp(b)));
        let size: usize = pool.iter().map(|&t| elements.tensors[t].rows * elements.tensors[t].columns).sum();
        let wanted = (fraction * size as f64).round() as usize;
        let mut held = 0;
        for (tensor, group) in order {
            let more = weights_in_group(&elements.tensors[tensor], unit);
            if held > 0 && held + more > wanted {
                break;
            }
            marks[tensor][group] = true;
            held += more;
        }
    }
    marks
}

/// Marks of this rank's runs from those of the groups.
pub fn of_groups(elements: &Elements, unit: Unit, chosen: &[Vec<bool>]) -> Marks {
    let runs = elements.runs.iter().map(|run| {
        let mut marks = vec![false; run.own.len()];
        each(&run.place, |at, row, column| marks[at] = chosen[run.tensor][group(unit, row, column)]);
        marks
    });
    runs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::elements::Tensor;

    fn elements(shapes: &[(usize, usize)]) -> Elements {
        let tensor = |(i, &(rows, columns)): (usize, &(usize, usize))| Tensor {
            name: format!("model.layers.{i}.mlp.down_proj.weight"),
            rows,
            columns,
        };
        Elements { tensors: shapes.iter().enumerate().map(tensor).collect(), runs: Vec::new() }
    }

    #[test]
    fn groups_fill_the_share_from_the_best_down() {
        let elements = elements(&[(2, 4), (2, 2)]);
        let rates = vec![vec![0.1, 0.9, 0.5, 0.5], vec![0.7, 0.2]];
        let chosen = |fraction, among| whole_groups(&elements, Unit::Column, &rates, fraction, among);
        assert_eq!(chosen(0.5, Among::Model), [vec![false, true, true, false], vec![true, false]]);
        assert_eq!(chosen(0.5, Among::Tensor), [vec![false, true, true, false], vec![true, false]]);
        assert_eq!(chosen(0.34, Among::Model), [vec![false, true, false, false], vec![true, false]]);
        assert_eq!(chosen(0.01, Among::Layer), [vec![false, true, false, false], vec![true, false]]);
        assert_eq!(chosen(1.0, Among::Model), [vec![true; 4], vec![true; 2]]);
    }
}
