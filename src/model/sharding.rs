//! The one table that says where every parameter lives: its Hugging Face name and shape, the slice of it that a
//! tensor-parallel rank holds, and what its gradient still needs.
//!
//! Loader, optimizer, norm, checkpoint and exporter all read this table; there is no second copy of the knowledge.

use std::ops::Range;

use super::ModelError;
use super::architecture::{Architecture, Packing};
use crate::dist::part;

/// Index of a parameter in the table.
pub type ParamId = usize;

/// A box of one Hugging Face tensor that lies in consecutive rows of a local parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Hugging Face name.
    pub name: String,
    /// Shape of the whole tensor: one or two dimensions.
    pub shape: Vec<i64>,
    /// First index of the box in each dimension.
    pub offset: Vec<i64>,
    /// Size of the box in each dimension.
    pub size: Vec<i64>,
    /// First row of the local parameter that the box fills.
    pub row: i64,
}

/// How a parameter's local gradient becomes the whole one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A matrix cut over the tensor-parallel ranks: its gradient is complete, every rank counts its own shard.
    Matrix,
    /// A vector cut in the same way.
    Bias,
    /// The same on all ranks, with a gradient that is a partial sum on each: added up over TP, counted once.
    PartialVector,
    /// The same on all ranks, gradient included: counted once.
    Vector,
    /// Not trained: no gradient, no optimizer state, no weight decay.
    Frozen,
}

/// One parameter as this rank holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    pub shape: Vec<i64>,
    /// Elements of the largest shard on any rank: the vocabulary may not divide evenly, and what all ranks decide alike must not
    /// depend on their own shard.
    pub largest: i64,
    pub class: Class,
    /// The half block whose backward completes the gradient; see [`Table::num_units`].
    pub unit: usize,
    pub pieces: Vec<Piece>,
}

/// Parameters of one decoder layer.
#[derive(Clone, Debug)]
pub struct LayerParams {
    pub attention_norm: ParamId,
    /// q, k and v rows of this rank, in this order.
    pub qkv: ParamId,
    pub qkv_bias: Option<ParamId>,
    pub q_norm: Option<ParamId>,
    pub k_norm: Option<ParamId>,
    pub output: ParamId,
    pub mlp_norm: ParamId,
    /// gate and up rows of this rank, in this order.
    pub gate_up: ParamId,
    pub down: ParamId,
}

/// All parameters of one rank, in model order.
#[derive(Clone, Debug)]
pub struct Table {
    pub params: Vec<Param>,
    pub embedding: ParamId,
    pub layers: Vec<LayerParams>,
    pub final_norm: ParamId,
    /// The same as `embedding` for tied models.
    pub head: ParamId,
    /// Rows of the vocabulary that this rank holds.
    pub vocab: Range<i64>,
}

impl Param {
    pub fn num_elements(&self) -> i64 {
        self.shape.iter().product()
    }
}

impl Table {
    /// The shards of rank `tp_rank` of `tp`. With `sequence_parallel` the norms see only a part of the tokens.
    pub fn new(arch: &Architecture, tp: usize, tp_rank: usize, sequence_parallel: bool) -> Result<Self, ModelError> {
        check_tp(arch, tp)?;
        let mut builder =
            Builder { arch, tp: tp as i64, tp_rank: tp_rank as i64, sequence_parallel, params: Vec::new() };
        let vocab = part(arch.vocab as usize, tp, tp_rank);
        let vocab = vocab.start as i64..vocab.end as i64;
        let num_units = 2 * arch.num_layers + 2;
        let embedding_unit = 0;
        let embedding = builder.vocabulary("model.embed_tokens.weight", &vocab, embedding_unit);
        let layers = (0..arch.num_layers).map(|layer| builder.layer(layer)).collect();
        let final_norm = builder.vector("model.norm.weight", arch.hidden, Class::Vector, num_units - 1);
        let head = if arch.tied { embedding } else { builder.vocabulary("lm_head.weight", &vocab, num_units - 1) };
        Ok(Self { params: builder.params, embedding, layers, final_norm, head, vocab })
    }

    /// Leaves only the parameters trainable whose Hugging Face names match one of `patterns` (`*` stands for anything).
    ///
    /// # Errors
    /// A pattern that matches nothing, or only a part of what is held as one parameter (q, k and v; gate and up).
    pub fn train_only(&mut self, patterns: &[String]) -> Result<(), ModelError> {
        let mut used = vec![false; patterns.len()];
        for param in &mut self.params {
            let mut names: Vec<&str> = param.pieces.iter().map(|piece| piece.name.as_str()).collect();
            names.dedup();
            let hits = |name: &&str| patterns.iter().any(|pattern| matches(pattern, name));
            let hit = names.iter().filter(|name| hits(name)).count();
            for (used, pattern) in used.iter_mut().zip(patterns) {
                *used |= names.iter().any(|name| matches(pattern, name));
            }
            if hit == 0 {
                param.class = Class::Frozen;
            } else if hit < names.len() {
                let names = names.join(", ");
                return Err(ModelError::Layout(format!(
                    "method.update names only a part of {names}; they are trained together"
                )));
            }
        }
        match used.iter().position(|used| !used) {
            Some(at) => Err(ModelError::Layout(format!(
                "method.update: {:?} matches no tensor of the model; names are like {:?}",
                patterns[at], self.params[self.layers[0].down].pieces[0].name
            ))),
            None => Ok(()),
        }
    }

    /// The first layer that backward must come to: in those before it, and in the embedding, nothing is trained.
    pub fn first_trained_layer(&self) -> usize {
        let trained = self.params.iter().filter(|param| param.class != Class::Frozen);
        // unit 0 is the embedding, then two units a layer
        trained.map(|param| param.unit.saturating_sub(1) / 2).min().unwrap_or(self.layers.len()).min(self.layers.len())
    }

    /// Units of backward in forward order: embedding, then attention and MLP of each layer, then the head with the final
    /// norm. A unit's gradients are complete when its backward is done (a tied head's with the embedding).
    pub fn num_units(&self) -> usize {
        2 * self.layers.len() + 2
    }

    /// Every Hugging Face tensor with its shape, in model order.
    pub fn tensors(&self) -> Vec<(&str, &[i64])> {
        let mut seen = Vec::<(&str, &[i64])>::new();
        for piece in self.params.iter().flat_map(|param| &param.pieces) {
            if seen.last().is_none_or(|(name, _)| *name != piece.name) {
                seen.push((&piece.name, &piece.shape));
            }
        }
        seen
    }
}

/// Unit of a layer's attention half block.
pub fn attention_unit(layer: usize) -> usize {
    1 + 2 * layer
}

/// Unit of a layer's MLP half block.
pub fn mlp_unit(layer: usize) -> usize {
    2 + 2 * layer
}

/// Whether `name` is `pattern`, in which `*` stands for anything.
pub fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    loop {
        if matches(rest, name) {
            return true;
        }
        let mut letters = name.chars();
        match letters.next() {
            Some(_) => name = letters.as_str(),
            None => return false,
        }
    }
}

fn check_tp(arch: &Architecture, tp: usize) -> Result<(), ModelError> {
    let legal = arch.legal_tp();
    if legal.contains(&tp) {
        return Ok(());
    }
    let Architecture { num_heads, num_kv_heads, intermediate, .. } = arch;
    let legal: Vec<String> = legal.iter().map(usize::to_string).collect();
    Err(ModelError::Layout(format!(
        "parallel.tp = {tp} does not divide the model's {num_heads} attention heads, {num_kv_heads} key/value heads and MLP \
         width {intermediate}; legal sizes are {}",
        legal.join(", ")
    )))
}

struct Builder<'a> {
    arch: &'a Architecture,
    tp: i64,
    tp_rank: i64,
    sequence_parallel: bool,
    params: Vec<Param>,
}

impl Builder<'_> {
    fn layer(&mut self, layer: usize) -> LayerParams {
        let arch = self.arch;
        let (attention, mlp) = (attention_unit(layer), mlp_unit(layer));
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let (q, kv) = (arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim);
        let norm = if self.sequence_parallel { Class::PartialVector } else { Class::Vector };

        let attention_norm = self.vector(&name("input_layernorm.weight"), arch.hidden, norm, attention);
        let qkv = match arch.packing {
            Packing::Separate => {
                let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
                let parts = parts.map(|(part, rows)| (name(&format!("self_attn.{part}.weight")), rows, 0, rows));
                self.rows(&parts, Some(arch.hidden), Class::Matrix, attention)
            }
            Packing::Fused => {
                let (fused, all) = (name("self_attn.qkv_proj.weight"), q + 2 * kv);
                let parts = [(fused.clone(), all, 0, q), (fused.clone(), all, q, kv), (fused, all, q + kv, kv)];
                self.rows(&parts, Some(arch.hidden), Class::Matrix, attention)
            }
        };
        let qkv_bias = arch.qkv_bias.then(|| {
            let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
            let parts = parts.map(|(part, rows)| (name(&format!("self_attn.{part}.bias")), rows, 0, rows));
            self.rows(&parts, None, Class::Bias, attention)
        });
        // applied to this rank's heads only, so its gradient is a partial sum whatever happens to the tokens
        let head_norm = |builder: &mut Self, which: &str| {
            let full = name(&format!("self_attn.{which}.weight"));
            arch.qk_norm.then(|| builder.vector(&full, arch.head_dim, Class::PartialVector, attention))
        };
        let q_norm = head_norm(self, "q_norm");
        let k_norm = head_norm(self, "k_norm");
        let output = self.columns(&name("self_attn.o_proj.weight"), arch.hidden, q, attention);

        let mlp_norm = self.vector(&name("post_attention_layernorm.weight"), arch.hidden, norm, mlp);
        let width = arch.intermediate;
        let gate_up = match arch.packing {
            Packing::Separate => {
                let parts = ["gate_proj", "up_proj"].map(|part| (name(&format!("mlp.{part}.weight")), width, 0, width));
                self.rows(&parts, Some(arch.hidden), Class::Matrix, mlp)
            }
            Packing::Fused => {
                let fused = name("mlp.gate_up_proj.weight");
                let parts = [(fused.clone(), 2 * width, 0, width), (fused, 2 * width, width, width)];
                self.rows(&parts, Some(arch.hidden), Class::Matrix, mlp)
            }
        };
        let down = self.columns(&name("mlp.down_proj.weight"), arch.hidden, width, mlp);
        LayerParams { attention_norm, qkv, qkv_bias, q_norm, k_norm, output, mlp_norm, gate_up, down }
    }

    fn push(&mut self, shape: Vec<i64>, class: Class, unit: usize, pieces: Vec<Piece>) -> ParamId {
        let largest = shape.iter().product();
        self.params.push(Param { shape, largest, class, unit, pieces });
        self.params.len() - 1
    }

    /// Rows of the vocabulary, cut unevenly where it does not divide.
    fn vocabulary(&mut self, name: &str, vocab: &Range<i64>, unit: usize) -> ParamId {
        let size = vec![vocab.end - vocab.start, self.arch.hidden];
        let shape = vec![self.arch.vocab, self.arch.hidden];
        let piece = Piece { name: name.to_owned(), shape, offset: vec![vocab.start, 0], size: size.clone(), row: 0 };
        let id = self.push(size, Class::Matrix, unit, vec![piece]);
        self.params[id].largest = part(self.arch.vocab as usize, self.tp as usize, 0).len() as i64 * self.arch.hidden;
        id
    }

    /// A vector that every rank holds whole.
    fn vector(&mut self, name: &str, len: i64, class: Class, unit: usize) -> ParamId {
        let piece = Piece { name: name.to_owned(), shape: vec![len], offset: vec![0], size: vec![len], row: 0 };
        self.push(vec![len], class, unit, vec![piece])
    }

    /// Row blocks `(tensor, its rows, first row, number of rows)`, each cut over the ranks, stacked. `width`: None for vectors.
    fn rows(&mut self, blocks: &[(String, i64, i64, i64)], width: Option<i64>, class: Class, unit: usize) -> ParamId {
        let mut pieces = Vec::new();
        let mut row = 0;
        for (name, rows, first, count) in blocks {
            let each = count / self.tp;
            let boxed = |n: i64| std::iter::once(n).chain(width).collect::<Vec<_>>();
            let mut offset = boxed(first + self.tp_rank * each);
            if let Some(column) = offset.get_mut(1) {
                *column = 0;
            }
            pieces.push(Piece { name: name.clone(), shape: boxed(*rows), offset, size: boxed(each), row });
            row += each;
        }
        let shape = std::iter::once(row).chain(width).collect();
        self.push(shape, class, unit, pieces)
    }

    /// All rows, columns cut over the ranks.
    fn columns(&mut self, name: &str, rows: i64, columns: i64, unit: usize) -> ParamId {
        let each = columns / self.tp;
        let (shape, offset) = (vec![rows, columns], vec![0, self.tp_rank * each]);
        let piece = Piece { name: name.to_owned(), shape, offset, size: vec![rows, each], row: 0 };
        self.push(vec![rows, each], Class::Matrix, unit, vec![piece])
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::rope::{Rope, Scaling};

    /// A small architecture with everything that has a class of its own.
    pub(crate) fn arch(packing: Packing, tied: bool) -> Architecture {
        Architecture {
            family: "test",
            hidden: 16,
            num_layers: 2,
            num_heads: 8,
            num_kv_heads: 4,
            head_dim: 6,
            intermediate: 20,
            vocab: 37,
            norm_eps: 1e-6,
            rope: Rope { theta: 1e4, dim: 6, scaling: Scaling::None },
            tied,
            qkv_bias: true,
            qk_norm: true,
            windows: vec![None; 2],
            packing,
            max_positions: 64,
            initializer_range: 0.02,
        }
    }

    /// Over the ranks the pieces of each cut tensor tile it: volumes add up and no two boxes overlap.
    #[test]
    fn pieces_tile_every_tensor() {
        for packing in [Packing::Separate, Packing::Fused] {
            for tp in [1, 2, 4] {
                let mut boxes = BTreeMap::<String, Vec<Piece>>::new();
                let mut total = 0;
                for rank in 0..tp {
                    let table = Table::new(&arch(packing, false), tp, rank, false).unwrap();
                    for param in &table.params {
                        let replicated = matches!(param.class, Class::Vector | Class::PartialVector);
                        let rows: i64 = param.pieces.iter().map(|piece| piece.size[0]).sum();
                        assert_eq!(rows, param.shape[0]);
                        for piece in param.pieces.iter().filter(|_| !replicated || rank == 0) {
                            total += piece.size.iter().product::<i64>();
                            boxes.entry(piece.name.clone()).or_default().push(piece.clone());
                        }
                    }
                }
                assert_eq!(total, arch(packing, false).num_parameters());
                for (name, pieces) in boxes {
                    let volume: i64 = pieces.iter().map(|piece| piece.size.iter().product::<i64>()).sum();
                    assert_eq!(volume, pieces[0].shape.iter().product::<i64>(), "{name}");
                    for (i, a) in pieces.iter().enumerate() {
                        for b in &pieces[i + 1..] {
                            let apart = (0..a.shape.len()).any(|d| {
                                a.offset[d] + a.size[d] <= b.offset[d] || b.offset[d] + b.size[d] <= a.offset[d]
                            });
                            assert!(apart, "{name}: {a:?} overlaps {b:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn illegal_sizes_list_the_legal_ones() {
        let message = Table::new(&arch(Packing::Separate, false), 3, 0, false).unwrap_err().to_string();
        assert!(message.ends_with("legal sizes are 1, 2, 4"), "{message}");
        assert!(Table::new(&arch(Packing::Separate, false), 8, 0, false).is_err());
    }

    #[test]
    fn a_tied_head_is_one_parameter() {
        let table = Table::new(&arch(Packing::Separate, true), 2, 1, true).unwrap();
        assert_eq!(table.head, table.embedding);
        assert!(table.tensors().iter().all(|(name, _)| *name != "lm_head.weight"));
        assert_eq!(table.vocab, 19..37);
        assert_eq!(table.params[table.layers[0].attention_norm].class, Class::PartialVector);
        assert_eq!(table.params[table.final_norm].class, Class::Vector);
    }
}
