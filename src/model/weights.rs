//! The parameters' values and where their gradients go.

use tch::Tensor;

use super::sharding::ParamId;

/// One tensor for each parameter of the table, in the kind that the model computes in.
pub struct Weights {
    tensors: Vec<Tensor>,
}

impl Weights {
    /// `tensors`: in the order and shapes of the table.
    pub fn new(tensors: Vec<Tensor>) -> Self {
        Self { tensors }
    }

    pub fn get(&self, param: ParamId) -> &Tensor {
        &self.tensors[param]
    }
}

/// Takes the gradients as backward produces them, one half block after the other from the last to the first.
///
/// All ranks of a tensor-parallel group make the same calls in the same order.
pub trait Gradients {
    /// `dy^T x` for a matrix: `dy: [tokens, rows]`, `x: [tokens, columns]`.
    fn product(&mut self, param: ParamId, dy: &Tensor, x: &Tensor);
    /// The gradient of a vector, f32.
    fn vector(&mut self, param: ParamId, grad: &Tensor);
    /// Gradients of single rows: row `rows[i]` gets `grad[i]`; indices may repeat.
    fn rows(&mut self, param: ParamId, rows: &Tensor, grad: &Tensor);
    /// All gradients of a unit (see [`super::sharding::Table::num_units`]) have been given.
    fn complete(&mut self, unit: usize);
}
