//! Quantised weights, in memory: small changes of unlearning may round back (arXiv 2410.16454).
//!
//! Every group of consecutive columns of a row has one scale, its largest magnitude. Where a row is cut over the tensor-parallel ranks
//! the groups are still those of the whole row, and their scales the largest of all ranks: a layout changes no bit. What the model
//! computes with are the numbers that the codes stand for.

use std::fmt;

use tch::{Kind, Tensor};

use crate::dist::Reduce;
use crate::model::sharding::{ParamId, Piece};
use crate::model::{Decoder, Weights};

/// How the matrices of the layers are stored; embedding, head, norms, biases and adapters stay as they are, as in bitsandbytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantisation {
    pub code: Code,
    /// Columns that share a scale; None: whole rows.
    pub group: Option<usize>,
}

/// Numbers that a code can stand for, in units of the group's largest magnitude.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// `i / 127` for i from -127 to 127: round to nearest.
    Int8,
    /// `i / 7` for i from -7 to 7: round to nearest.
    Int4,
    /// The 16 levels of NormalFloat (arXiv 2305.14314, appendix E).
    Nf4,
}

/// Quantiles of a normal distribution, as published and as bitsandbytes has them.
pub const NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

impl Quantisation {
    /// 8 bits, one scale a row.
    pub const INT8: Self = Self { code: Code::Int8, group: None };
    /// 4 bits, one scale for 128 columns of a row.
    pub const INT4: Self = Self { code: Code::Int4, group: Some(128) };
    /// 4 bits, one scale for 64 columns of a row: bitsandbytes' blocks, where 64 divides the columns.
    pub const NF4: Self = Self { code: Code::Nf4, group: Some(64) };
}

impl fmt::Display for Quantisation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self.code {
            Code::Int8 => "int8",
            Code::Int4 => "int4",
            Code::Nf4 => "nf4",
        })
    }
}

/// The model with its layers' matrices quantised, in the kind that they have; other parameters are shared with `weights`.
///
/// All ranks of the tensor-parallel group call it.
pub fn quantise(decoder: &Decoder, weights: &Weights, how: Quantisation) -> Weights {
    let layers = decoder.table.layers.iter();
    let matrices: Vec<ParamId> =
        layers.flat_map(|layer| [layer.qkv, layer.output, layer.gate_up, layer.down]).collect();
    let one = |id: ParamId| {
        let stored = weights.get(id);
        if !matrices.contains(&id) {
            return stored.shallow_clone();
        }
        let target = stored.empty_like();
        for piece in &decoder.table.params[id].pieces {
            let rows = |t: &Tensor| t.narrow(0, piece.row, piece.size[0]);
            rows(&target).copy_(&round(decoder, piece, &rows(stored).to_kind(Kind::Float), how));
        }
        target
    };
    Weights::new((0..decoder.table.params.len()).map(one).collect())
}

/// What the codes of one piece stand for: `[rows, columns]` f32.
fn round(decoder: &Decoder, piece: &Piece, values: &Tensor, how: Quantisation) -> Tensor {
    let (rows, columns) = values.size2().expect("invariant: a matrix has two dimensions");
    let (whole, first) = (piece.shape[1], piece.offset[1]);
    let width = how.group.map_or(whole, |group| (group as i64).min(whole));
    // this rank's columns in the groups of whole rows
    let groups = (first + columns - 1) / width + 1 - first / width;
    let filled = Tensor::zeros([rows, groups * width], (Kind::Float, values.device()));
    filled.narrow(1, first % width, columns).copy_(values);
    let own = filled.abs().view([rows, groups, width]).amax([2i64].as_slice(), false);
    let scale = if columns < whole {
        let mut all = Tensor::zeros([rows, (whole + width - 1) / width], (Kind::Float, values.device()));
        all.narrow(1, first / width, groups).copy_(&own);
        decoder.tp.all_reduce(&mut all, Reduce::Max);
        all.narrow(1, first / width, groups)
    } else {
        own
    };
    // a group of zeros stays zeros
    let scale = scale.unsqueeze(2);
    let units = filled.view([rows, groups, width]) / &scale.clamp_min(f64::from(f32::MIN_POSITIVE));
    let rounded = how.code.nearest(&units) * scale;
    rounded.view([rows, groups * width]).narrow(1, first % width, columns)
}

impl Code {
    /// The number that stands for each of `units`, which are in [-1, 1].
    fn nearest(self, units: &Tensor) -> Tensor {
        match self {
            Self::Int8 => (units * 127.0).round() / 127.0,
            Self::Int4 => (units * 7.0).round() / 7.0,
            Self::Nf4 => {
                let borders: Vec<f32> = NF4_LEVELS.windows(2).map(|pair| 0.5 * (pair[0] + pair[1])).collect();
                let on = |values: &[f32]| Tensor::from_slice(values).to_device(units.device());
                let index = units.bucketize(&on(&borders), false, false);
                on(&NF4_LEVELS).index_select(0, &index.view([-1])).view(units.size().as_slice())
            }
        }
    }
}
