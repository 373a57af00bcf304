//! Losses on a whole distribution, row by row: statistics of one rank's part of the vocabulary, and the gradient that they lead to.
//!
//! Plain tensor operations on any device, over one chunk of logits at a time. f64 stays f64, everything else is computed in f32.

use tch::{Kind, Tensor};

/// Numbers per row of [`others`]: maximum, sum of exp(logit - maximum), sum of exp(logit - maximum) * logit, index of the maximum.
pub const OTHERS: i64 = 4;

/// Per row of this part of the vocabulary without the target: `[rows, 4]`, see [`OTHERS`].
///
/// `logits: [rows, width]`; `target: [rows]` i64, index into this part, or negative when the target is elsewhere.
pub fn others(logits: &Tensor, target: &Tensor) -> Tensor {
    let z = wide(logits);
    // far below any logit, and still a number: exp(-inf - -inf) would be none
    let kept = z.scatter_value(1, &index(target), FAR_BELOW);
    let kept = kept.where_self(&here(target), &z);
    let (maximum, at) = kept.max_dim(1, true);
    let each = (&kept - &maximum).exp();
    let sum = each.sum_dim_intlist(1i64, true, z.kind());
    let weighted = (each * &kept).sum_dim_intlist(1i64, true, z.kind());
    Tensor::cat(&[maximum, sum, weighted, at.to_kind(z.kind())], 1)
}

/// Sum of each row, `[rows]`.
pub fn sum(logits: &Tensor) -> Tensor {
    wide(logits).sum_dim_intlist(1i64, false, wide_kind(logits))
}

/// Takes `beta` from the target's logit of each row, in place.
pub fn lower(logits: &mut Tensor, target: &Tensor, beta: f64) {
    let off = here(target).to_kind(logits.kind()) * -beta;
    let _ = logits.scatter_add_(1, &index(target), &off);
}

/// Sum over this part of `exp(reference - shift) * logits` of each row, `[rows]`.
pub fn cross(logits: &Tensor, reference: &Tensor, shift: &Tensor) -> Tensor {
    let q = (wide(reference) - shift.unsqueeze(1)).exp();
    (q * wide(logits)).sum_dim_intlist(1i64, false, wide_kind(logits))
}

/// The gradient of a row's loss by its logits, in the few numbers that it depends on. All `[rows]`.
pub struct Row<'a> {
    /// `scale * exp(logit - shift)` in every column ...
    pub scale: &'a Tensor,
    pub shift: &'a Tensor,
    /// ... plus this ...
    pub constant: &'a Tensor,
    /// ... minus `exp(reference logit - shift)` of another model's logits ...
    pub reference: Option<(&'a Tensor, &'a Tensor)>,
    /// ... and in single columns, by their index here (negative: elsewhere), an addition or a replacement.
    pub add: &'a [(&'a Tensor, &'a Tensor)],
    pub set: Option<(&'a Tensor, &'a Tensor)>,
}

/// Replaces each row of logits by `weight` times the gradient that `row` says.
pub fn gradient(logits: &mut Tensor, row: &Row, weight: &Tensor) {
    let column = |t: &Tensor| t.unsqueeze(1);
    let mut grad = (wide(logits) - column(row.shift)).exp() * column(row.scale) + column(row.constant);
    if let Some((reference, shift)) = row.reference {
        grad -= (wide(reference) - column(shift)).exp();
    }
    for (at, value) in row.add {
        let value = column(value) * here(at).to_kind(grad.kind());
        let _ = grad.scatter_add_(1, &index(at), &value);
    }
    if let Some((at, value)) = row.set {
        let before = grad.gather(1, &index(at), false);
        let value = column(value).where_self(&here(at), &before);
        let _ = grad.scatter_(1, &index(at), &value);
    }
    logits.copy_(&(grad * column(weight)));
}

const FAR_BELOW: f64 = -1e30;

fn wide(x: &Tensor) -> Tensor {
    x.to_kind(wide_kind(x))
}

fn wide_kind(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

fn index(at: &Tensor) -> Tensor {
    at.clamp_min(0).unsqueeze(1)
}

fn here(at: &Tensor) -> Tensor {
    at.ge(0).unsqueeze(1)
}
