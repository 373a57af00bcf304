//! The leading subspace of the rows of several matrices: by an exact singular value decomposition where they are small, by a
//! randomised one where they are large, in f64, with its error measured.
//!
//! Randomised range finder with power iterations: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1. The random
//! numbers are a function of (seed, name, index).

use tch::{Device, Kind, Tensor};

use crate::model::init::Stream;

/// How a basis is chosen and computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Least share of the squared singular values that the basis holds, in (0, 1].
    pub energy: f64,
    /// Most directions.
    pub max_rank: usize,
    /// Matrices whose smaller side is at most this are decomposed exactly.
    pub exact_limit: usize,
    /// Directions that the randomised decomposition takes besides `max_rank`.
    pub oversampling: usize,
    /// Passes over the matrix and its transpose that sharpen the randomised decomposition.
    pub power_iterations: usize,
    pub seed: u64,
}

/// Singular values below this share of the largest are noise and never in a basis.
const NOISE: f64 = 1e-6;
/// Rows that are widened to f64 at a time.
const ROWS: i64 = 1024;

/// Matrices stacked on top of each other, or side by side.
pub struct Stack<'a> {
    /// Equal widths; with `transposed`, equal heights.
    pub matrices: &'a [Tensor],
    /// Stack the transposes: what is said of rows then holds for columns.
    pub transposed: bool,
}

/// Orthonormal directions.
#[derive(Debug)]
pub struct Basis {
    /// `[width, rank]` f64.
    pub directions: Tensor,
    /// Of the directions, descending.
    pub singular_values: Vec<f64>,
    /// Share of the squared singular values that the directions hold.
    pub energy: f64,
    /// Largest `|S^T S v - s^2 v| / s_1^2` over the directions v: how far they are from singular vectors.
    pub error: f64,
    pub exact: bool,
}

impl Stack<'_> {
    /// Rows of the whole stack, and their length.
    pub fn shape(&self) -> (i64, i64) {
        let sides = self.matrices.iter().map(|matrix| {
            let (rows, columns) = matrix.size2().expect("invariant: matrices");
            if self.transposed { (columns, rows) } else { (rows, columns) }
        });
        sides.fold((0, 0), |(height, _), (rows, columns)| (height + rows, columns))
    }

    /// `S x`, f64. `x: [width, k]` f64.
    fn times(&self, x: &Tensor) -> Tensor {
        let parts: Vec<Tensor> = self
            .matrices
            .iter()
            .map(|matrix| {
                if self.transposed {
                    let zeros = Tensor::zeros([matrix.size()[1], x.size()[1]], (Kind::Double, Device::Cpu));
                    blocks(matrix)
                        .fold(zeros, |sum, (at, block)| sum + block.tr().mm(&x.narrow(0, at, block.size()[0])))
                } else {
                    Tensor::cat(&blocks(matrix).map(|(_, block)| block.mm(x)).collect::<Vec<_>>(), 0)
                }
            })
            .collect();
        Tensor::cat(&parts, 0)
    }

    /// `S^T y`, f64. `y: [height, k]` f64.
    fn transposed_times(&self, y: &Tensor) -> Tensor {
        let mut row = 0;
        let mut sum = Tensor::zeros([self.shape().1, y.size()[1]], (Kind::Double, Device::Cpu));
        for matrix in self.matrices {
            let height = matrix.size()[usize::from(self.transposed)];
            let y = y.narrow(0, row, height);
            if self.transposed {
                for (at, block) in blocks(matrix) {
                    let _ = sum.narrow(0, at, block.size()[0]).g_add_(&block.mm(&y));
                }
            } else {
                for (at, block) in blocks(matrix) {
                    let _ = sum.g_add_(&block.tr().mm(&y.narrow(0, at, block.size()[0])));
                }
            }
            row += height;
        }
        sum
    }

    /// Sum of all squared singular values.
    fn square(&self) -> f64 {
        self.matrices
            .iter()
            .flat_map(blocks)
            .map(|(_, block)| (&block * &block).sum(Kind::Double).double_value(&[]))
            .sum()
    }

    fn dense(&self) -> Tensor {
        let wide = |matrix: &Tensor| {
            let wide = matrix.to_kind(Kind::Double);
            if self.transposed { wide.tr() } else { wide }
        };
        Tensor::cat(&self.matrices.iter().map(wide).collect::<Vec<_>>(), 0)
    }
}

/// Row blocks in f64 with their first rows.
pub(super) fn blocks(matrix: &Tensor) -> impl Iterator<Item = (i64, Tensor)> {
    let rows = matrix.size()[0];
    (0..rows).step_by(ROWS as usize).map(move |at| {
        // a mapped file may start anywhere: a copy of its own is aligned, and products of it always round alike
        let block = matrix.narrow(0, at, ROWS.min(rows - at));
        (at, if block.kind() == Kind::Double { block.copy() } else { block.to_kind(Kind::Double) })
    })
}

/// The directions in which the rows of `stack` lie: as few as hold `energy`, at most `max_rank`. `name` keys the random numbers.
pub fn basis(stack: &Stack, name: &str, options: &Options) -> Basis {
    let (height, width) = stack.shape();
    let exact = height.min(width) <= options.exact_limit as i64;
    let total = stack.square();
    let (values, vectors) = if total == 0.0 {
        (Vec::new(), Tensor::zeros([width, 0], (Kind::Double, Device::Cpu)))
    } else if exact {
        let (_, values, vectors) = stack.dense().svd(true, true);
        (numbers(&values), vectors)
    } else {
        randomised(stack, name, options)
    };
    let first = values.first().copied().unwrap_or(0.0);
    let mut held = 0.0;
    let mut rank = 0;
    for value in values.iter().take(options.max_rank).take_while(|&&value| value > NOISE * first) {
        // the last singular values round to a sum just below the whole
        if held >= options.energy * total * (1.0 - 1e-12) {
            break;
        }
        held += value * value;
        rank += 1;
    }
    let directions = vectors.narrow(1, 0, rank as i64).contiguous();
    let singular_values = values[..rank].to_vec();
    let error = residual(stack, &directions, &singular_values);
    Basis { directions, energy: if total > 0.0 { held / total } else { 0.0 }, singular_values, error, exact }
}

/// Leading singular values and right singular vectors.
fn randomised(stack: &Stack, name: &str, options: &Options) -> (Vec<f64>, Tensor) {
    let (height, width) = stack.shape();
    let count = (options.max_rank + options.oversampling).min(height.min(width) as usize) as i64;
    let stream = Stream::new(options.seed, name);
    let random: Vec<f64> = (0..(width * count) as u64).map(|index| stream.normal(index)).collect();
    let start = Tensor::from_slice(&random).view([width, count]);
    let mut range = orthonormal(&stack.times(&start));
    for _ in 0..options.power_iterations {
        let rows = orthonormal(&stack.transposed_times(&range));
        range = orthonormal(&stack.times(&rows));
    }
    // S ~ Q Q^T S: the small factor's right singular vectors are those of S
    let (vectors, values, _) = stack.transposed_times(&range).svd(true, true);
    (numbers(&values), vectors)
}

fn orthonormal(columns: &Tensor) -> Tensor {
    Tensor::linalg_qr(columns, "reduced").0
}

/// See [`Basis::error`].
fn residual(stack: &Stack, directions: &Tensor, values: &[f64]) -> f64 {
    let Some(first) = values.first().filter(|&&value| value > 0.0) else { return 0.0 };
    let squares = Tensor::from_slice(&values.iter().map(|value| value * value).collect::<Vec<_>>());
    let image = stack.transposed_times(&stack.times(directions));
    let off = image - directions * squares.unsqueeze(0);
    let norms = off.square().sum_dim_intlist(0, false, Kind::Double).sqrt();
    norms.max().double_value(&[]) / (first * first)
}

fn numbers(values: &Tensor) -> Vec<f64> {
    crate::abi::slices::slice::<f64>(&values.contiguous()).to_vec()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::weights) fn normal(shape: [i64; 2], seed: u64) -> Tensor {
        let stream = Stream::new(seed, "test");
        let values: Vec<f64> = (0..(shape[0] * shape[1]) as u64).map(|index| stream.normal(index)).collect();
        Tensor::from_slice(&values).view(shape)
    }

    /// A matrix with given singular values.
    fn known(rows: i64, columns: i64, values: &[f64]) -> (Tensor, Tensor) {
        let count = values.len() as i64;
        let (left, right) = (orthonormal(&normal([rows, count], 1)), orthonormal(&normal([columns, count], 2)));
        ((&left * Tensor::from_slice(values).unsqueeze(0)).mm(&right.tr()), right)
    }

    pub(in crate::weights) const EXACT: Options =
        Options { energy: 1.0, max_rank: 1000, exact_limit: 10_000, oversampling: 8, power_iterations: 2, seed: 3 };

    fn number(t: &Tensor) -> f64 {
        t.double_value(&[])
    }

    /// How far two subspaces are apart: the largest sine of the angles between them.
    fn angle(a: &Tensor, b: &Tensor) -> f64 {
        number(&(b - a.mm(&a.tr().mm(b))).norm())
    }

    #[test]
    fn the_energy_decides_the_rank() {
        let (matrix, right) = known(30, 20, &[4.0, 3.0, 2.0, 1.0]);
        for (energy, max_rank, rank) in [(0.5, 9, 1), (0.6, 9, 2), (0.84, 9, 3), (1.0, 9, 4), (1.0, 2, 2)] {
            let found = basis(
                &Stack { matrices: &[matrix.shallow_clone()], transposed: false },
                "w",
                &Options { energy, max_rank, ..EXACT },
            );
            assert_eq!(found.singular_values.len(), rank, "{energy} {max_rank}");
            assert!(angle(&found.directions, &right.narrow(1, 0, rank as i64)) < 1e-12);
            assert!(found.error < 1e-14 && found.exact);
        }
    }

    /// Singular values that fall slowly, where a randomised decomposition is hard, and quickly.
    #[test]
    fn the_randomised_decomposition_finds_what_the_exact_one_finds() {
        for (decay, iterations, bound) in [(0.5f64, 1, 1e-6), (0.9, 2, 1e-2), (0.9, 8, 1e-5)] {
            let values: Vec<f64> = (0..150).map(|i| decay.powi(i)).collect();
            for transposed in [false, true] {
                let (matrix, _) = known(300, 200, &values);
                let halves = matrix.tensor_split(2, i64::from(transposed));
                let halves: Vec<Tensor> = halves.iter().map(Tensor::contiguous).collect();
                let stack = Stack { matrices: &halves, transposed };
                let options = Options { energy: 1.0, max_rank: 12, power_iterations: iterations, ..EXACT };
                let exact = basis(&stack, "w", &options);
                let found = basis(&stack, "w", &Options { exact_limit: 10, ..options });
                assert!(exact.exact && !found.exact);
                assert_eq!(found.singular_values.len(), exact.singular_values.len());
                let worst = found.singular_values.iter().zip(&exact.singular_values);
                let worst = worst.map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
                assert!(worst < bound && found.error < 2.0 * bound, "{decay} {worst:e} {:e}", found.error);
                assert!((found.energy - exact.energy).abs() < bound * bound);
                let gram = found.directions.tr().mm(&found.directions);
                assert!(number(&(gram - Tensor::eye(12, (Kind::Double, Device::Cpu))).norm()) < 1e-12);
            }
        }
        // control: without power iterations the error says that a slow spectrum was met badly
        let values: Vec<f64> = (0..150).map(|i| 0.97f64.powi(i)).collect();
        let (matrix, _) = known(300, 200, &values);
        let options = Options { max_rank: 12, exact_limit: 10, oversampling: 0, power_iterations: 0, ..EXACT };
        let found = basis(&Stack { matrices: &[matrix], transposed: false }, "w", &options);
        assert!(found.error > 0.05, "{:e}", found.error);
    }

    #[test]
    fn an_empty_task_has_no_directions() {
        let zeros = Tensor::zeros([5, 4], (Kind::Float, Device::Cpu));
        let found = basis(&Stack { matrices: &[zeros], transposed: false }, "w", &EXACT);
        assert_eq!((found.directions.size(), found.energy, found.error), (vec![4, 0], 0.0, 0.0));
    }

    #[test]
    fn the_random_numbers_are_a_function_of_seed_and_name() {
        let stack = &Stack { matrices: &[normal([60, 50], 4)], transposed: false };
        let options = Options { max_rank: 5, exact_limit: 1, power_iterations: 0, ..EXACT };
        let directions = |name: &str, seed| basis(stack, name, &Options { seed, ..options }).directions;
        assert!(directions("a", 1).equal(&directions("a", 1)));
        assert!(!directions("a", 1).equal(&directions("b", 1)) && !directions("a", 1).equal(&directions("a", 2)));
    }
}
