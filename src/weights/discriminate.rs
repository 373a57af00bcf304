//! Discrimination: what a task's matrices have in common with those of similar tasks is taken out of them, so that removing the task
//! leaves the similar ones (UNLEARN, arXiv 2408.04140, step 2).
//!
//! The paper's equations are not known to us. Both modes are our reading: `projection` drops the part of each row (or column) that
//! lies in the leading subspace of the similar tasks' rows (or columns); `frobenius` drops the part of the whole matrix along each
//! similar task's whole matrix.

use serde::Serialize;
use tch::{Kind, Tensor};

use super::WeightsError;
use super::combine::{Output, write_task};
use super::subspace::{Options, Stack, basis, blocks};
use crate::checkpoint::Folder;
use crate::config::{Mode, Side, Subspace};
use crate::dist::World;

/// How the shared part is found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Discrimination {
    pub mode: Mode,
    /// Which sides `projection` looks at.
    pub side: Side,
    pub basis: Options,
}

impl Discrimination {
    /// As a configuration says; `seed`: of the randomised decomposition.
    pub fn of(config: &Subspace, seed: u64) -> Self {
        let Subspace { mode, side, energy, max_rank, exact_limit, oversampling, power_iterations, .. } = *config;
        let basis = Options { energy, max_rank, exact_limit, oversampling, power_iterations, seed };
        Self { mode, side, basis }
    }
}

/// What discrimination did to one matrix.
#[derive(Clone, Debug, Default, PartialEq, Serialize, serde::Deserialize)]
pub struct MatrixReport {
    pub name: String,
    /// Frobenius norms before and after.
    pub norm: f64,
    pub kept: f64,
    /// Directions of the input side (rows) and of the output side (columns) that were taken out; for `frobenius` the similar tasks.
    pub input_rank: usize,
    pub output_rank: usize,
    /// Least share of the similar tasks' squared singular values that the directions hold.
    pub energy: f64,
    /// Largest residual of the decompositions, relative to the first singular value squared; see
    /// [`Basis::error`](super::Basis::error).
    pub error: f64,
    pub exact: bool,
}

/// Writes `task` without what it shares with `similar`, f32, and tells of every matrix in the order of the file. All ranks call it.
///
/// # Errors
/// A tensor that a similar task has not or has in another shape, one that is no matrix, numbers that are not finite.
pub fn discriminate(
    task: &Folder,
    similar: &[&Folder],
    how: &Discrimination,
    output: &Output,
    world: &World,
    progress: impl FnMut(),
) -> Result<Vec<MatrixReport>, WeightsError> {
    let specs = task.specs()?;
    for spec in &specs {
        if spec.shape.len() != 2 {
            let path = task.find(&spec.name).map(|(_, path)| path.to_owned()).unwrap_or_default();
            return Err(WeightsError::NotAMatrix { name: spec.name.clone(), path, dims: spec.shape.len() });
        }
    }
    let names: Vec<String> = specs.into_iter().map(|spec| spec.name).collect();
    let mut reports = Vec::new();
    one_thread(|| {
        write_task(task, similar, &names, output, world, progress, |name, tensors| {
            // a decomposition of what is no number does not end
            if tensors.iter().any(|t| t.isfinite().all().to_kind(Kind::Int64).int64_value(&[]) == 0) {
                return Ok(tensors.iter().fold(tensors[0].zeros_like(), |sum, t| sum + t));
            }
            let (result, report) = discriminate_matrix(name, &tensors[0], &tensors[1..], how);
            reports.push(report);
            Ok(result.to_kind(Kind::Float))
        })
    })?;
    let mine = serde_json::to_vec(&reports).expect("invariant: reports are JSON");
    let all = world.world.gather_bytes(&mine);
    let mut reports: Vec<MatrixReport> =
        all.iter().flat_map(|bytes| serde_json::from_slice::<Vec<_>>(bytes).unwrap_or_default()).collect();
    reports.sort_by_key(|report| names.iter().position(|name| *name == report.name));
    Ok(reports)
}

/// One matrix, f64. `task: [rows, columns]`, `similar`: of the same shape.
pub fn discriminate_matrix(
    name: &str,
    task: &Tensor,
    similar: &[Tensor],
    how: &Discrimination,
) -> (Tensor, MatrixReport) {
    let mut result = task.to_kind(Kind::Double).copy();
    let norm = |t: &Tensor| t.norm().double_value(&[]);
    let mut report =
        MatrixReport { name: name.to_owned(), norm: norm(&result), energy: 1.0, exact: true, ..Default::default() };
    if !similar.is_empty() {
        match how.mode {
            Mode::Frobenius => report.input_rank = frobenius(&mut result, similar),
            Mode::Projection => {
                for transposed in [false, true] {
                    let asked = if transposed { Side::Output } else { Side::Input };
                    if how.side != asked && how.side != Side::Both {
                        continue;
                    }
                    let found = basis(&Stack { matrices: similar, transposed }, name, &how.basis);
                    let rank = found.singular_values.len();
                    *(if transposed { &mut report.output_rank } else { &mut report.input_rank }) = rank;
                    report.energy = report.energy.min(found.energy);
                    report.error = report.error.max(found.error);
                    report.exact &= found.exact;
                    // twice: the second pass takes the rounding of the first
                    for _ in 0..2 {
                        project_out(&mut result, &found.directions, transposed);
                    }
                }
            }
        }
    }
    report.kept = norm(&result);
    (result, report)
}

/// `T <- T - T Q Q^T`, or with `transposed` `T <- T - Q Q^T T`.
fn project_out(matrix: &mut Tensor, directions: &Tensor, transposed: bool) {
    if directions.size()[1] == 0 {
        return;
    }
    if transposed {
        let inner = directions.tr().mm(matrix);
        let _ = matrix.g_sub_(&directions.mm(&inner));
        return;
    }
    let parts: Vec<(i64, Tensor)> = blocks(matrix).collect();
    for (at, block) in parts {
        let shared = block.mm(directions).mm(&directions.tr());
        let _ = matrix.narrow(0, at, block.size()[0]).g_sub_(&shared);
    }
}

/// Takes out of `matrix` its parts along the similar matrices, as Gram and Schmidt would: by the inner products of whole matrices.
/// Gives the number of independent ones.
fn frobenius(matrix: &mut Tensor, similar: &[Tensor]) -> usize {
    let product = |a: &Tensor, b: &Tensor| -> f64 {
        let pairs = blocks(a).zip(blocks(b));
        pairs.map(|((_, a), (_, b))| (a * b).sum(Kind::Double).double_value(&[])).sum()
    };
    let mut orthogonal = Vec::<Tensor>::new();
    for other in similar {
        let mut rest = other.to_kind(Kind::Double).copy();
        let before = product(&rest, &rest).sqrt();
        for _ in 0..2 {
            for direction in &orthogonal {
                let _ = rest.g_sub_(&(direction * product(&rest, direction)));
            }
        }
        let after = product(&rest, &rest).sqrt();
        // what is left of a dependent matrix is rounding
        if after > 1e-6 * before {
            orthogonal.push(rest / after);
        }
    }
    for _ in 0..2 {
        for direction in &orthogonal {
            let _ = matrix.g_sub_(&(direction * product(matrix, direction)));
        }
    }
    orthogonal.len()
}

/// Runs `body` on one thread: products rounded in another order on another number of threads would be other bytes.
fn one_thread<T>(body: impl FnOnce() -> T) -> T {
    let threads = tch::get_num_threads();
    tch::set_num_threads(1);
    let result = body();
    tch::set_num_threads(threads);
    result
}

#[cfg(test)]
mod tests {
    use super::super::subspace::tests::{EXACT, normal};
    use super::*;

    const SIDES: [Side; 3] = [Side::Input, Side::Output, Side::Both];

    fn projection(side: Side) -> Discrimination {
        Discrimination { mode: Mode::Projection, side, basis: EXACT }
    }

    const FROBENIUS: Discrimination = Discrimination { mode: Mode::Frobenius, side: Side::Input, basis: EXACT };

    fn norm(t: &Tensor) -> f64 {
        t.norm().double_value(&[])
    }

    /// Similar tasks of rank 3 each, so that their subspaces leave room.
    fn similar() -> Vec<Tensor> {
        [(1, 2), (3, 4)].map(|(a, b)| normal([20, 3], a).mm(&normal([3, 30], b))).into()
    }

    fn unique(task: &Tensor, similar: &[Tensor], how: &Discrimination) -> Tensor {
        discriminate_matrix("w", task, similar, how).0
    }

    /// (a) Nothing of what is left lies in the similar tasks' subspace.
    #[test]
    fn what_is_left_is_orthogonal_to_the_similar_tasks() {
        let task = normal([20, 30], 9);
        for side in SIDES {
            let (left, report) = discriminate_matrix("w", &task, &similar(), &projection(side));
            let both = side == Side::Both;
            if side == Side::Input || both {
                let rows = basis(&Stack { matrices: &similar(), transposed: false }, "w", &EXACT);
                assert_eq!((rows.directions.size(), report.input_rank), (vec![30, 6], 6));
                assert!(norm(&left.mm(&rows.directions)) < 1e-12 * norm(&task));
                assert!(norm(&left.mm(&similar()[0].tr())) < 1e-10);
            }
            if side == Side::Output || both {
                assert_eq!(report.output_rank, 6);
                assert!(norm(&similar()[1].tr().mm(&left)) < 1e-10);
            }
            assert!(report.kept < report.norm && report.kept > 0.5 * report.norm && report.error < 1e-12);
        }
        let left = unique(&task, &similar(), &FROBENIUS);
        for other in similar() {
            assert!((&left * &other).sum(Kind::Double).double_value(&[]).abs() < 1e-10);
        }
        // control: an energy below 1 leaves directions in
        let how = Discrimination { basis: Options { energy: 0.5, ..EXACT }, ..projection(Side::Input) };
        assert!(norm(&unique(&task, &similar(), &how).mm(&similar()[0].tr())) > 1.0);
    }

    /// (b) A task in the similar tasks' subspace has nothing of its own.
    #[test]
    fn a_task_that_is_shared_vanishes() {
        let rows = normal([20, 20], 5).mm(&similar()[0]) + normal([20, 20], 6).mm(&similar()[1]);
        assert!(norm(&unique(&rows, &similar(), &projection(Side::Input))) < 1e-10 * norm(&rows));
        let columns = similar()[0].mm(&normal([30, 30], 7));
        assert!(norm(&unique(&columns, &similar(), &projection(Side::Output))) < 1e-10 * norm(&columns));
        let sum = &similar()[0] * 2.0 - &similar()[1];
        assert!(norm(&unique(&sum, &similar(), &FROBENIUS)) < 1e-10 * norm(&sum));
    }

    /// (c) A task orthogonal to the similar ones stays as it is.
    #[test]
    fn a_task_of_its_own_stays() {
        for (how, task) in [
            (projection(Side::Input), {
                let rows = basis(&Stack { matrices: &similar(), transposed: false }, "w", &EXACT).directions;
                let task = normal([20, 30], 8);
                &task - task.mm(&rows).mm(&rows.tr())
            }),
            (FROBENIUS, unique(&normal([20, 30], 8), &similar(), &FROBENIUS)),
        ] {
            assert!(norm(&(unique(&task, &similar(), &how) - &task)) < 1e-12 * norm(&task), "{how:?}");
        }
    }

    /// (d) A second time changes nothing.
    #[test]
    fn discrimination_is_idempotent() {
        let task = normal([20, 30], 9);
        for how in SIDES.map(projection).into_iter().chain([FROBENIUS]) {
            let once = unique(&task, &similar(), &how);
            assert!(norm(&(unique(&once, &similar(), &how) - &once)) < 1e-12 * norm(&once), "{how:?}");
        }
        let few = Options { energy: 0.7, max_rank: 4, exact_limit: 5, ..EXACT };
        let how = Discrimination { basis: few, ..projection(Side::Both) };
        let once = unique(&task, &similar(), &how);
        assert!(norm(&(unique(&once, &similar(), &how) - &once)) < 1e-12 * norm(&once));
    }

    /// (f) Without similar tasks all of it is the task's own.
    #[test]
    fn without_similar_tasks_nothing_is_taken() {
        let task = normal([20, 30], 9);
        for how in [projection(Side::Both), FROBENIUS] {
            assert!(unique(&task, &[], &how).equal(&task));
        }
    }

    /// A trained matrix has full rank: with the whole energy and no limit nothing is left (why the limits are there).
    #[test]
    fn a_full_rank_takes_everything() {
        let full = [normal([40, 30], 1)];
        let left = unique(&normal([40, 30], 2), &full, &projection(Side::Input));
        assert!(norm(&left) < 1e-9);
        let limited = Discrimination { basis: Options { max_rank: 8, ..EXACT }, ..projection(Side::Input) };
        let (left, report) = discriminate_matrix("w", &normal([40, 30], 2), &full, &limited);
        assert!(report.input_rank == 8 && norm(&left) > 10.0);
    }

    #[test]
    fn a_dependent_similar_task_counts_once() {
        let twice = [&similar()[0] * 1.0, &similar()[0] * -3.0];
        let (_, report) = discriminate_matrix("w", &normal([20, 30], 9), &twice, &FROBENIUS);
        assert_eq!(report.input_rank, 1);
    }
}
