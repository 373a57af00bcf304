//! Host side of `optimizer.cu`.

use tch::Tensor;

use super::Launcher;
use crate::abi::module::{Argument, Grid};
use crate::kernels::moment::{BLOCK, Book, Codes, Moment, Storage};
use crate::kernels::optimizer::{AdamWFactors, Extras, Sgd};

/// The code books as source text: signed codes, their cuts, unsigned codes, their cuts.
pub(super) fn books() -> String {
    let books = [Codes::Signed, Codes::Unsigned].map(Book::of);
    let numbers = books.iter().flat_map(|book| book.codes.iter().chain(&book.cuts[..255]).chain(&[0.0]));
    let numbers: Vec<String> = numbers.map(|x| format!("{x:e}f")).collect();
    format!("__device__ const float BOOKS[1024] = {{{}}};\n", numbers.join(", "))
}

/// A warp for each block of 256 elements.
fn grid(len: usize) -> Grid {
    Grid { blocks: len.div_ceil(BLOCK).div_ceil(8), threads: 256, shared: 0 }
}

fn arguments(moment: Option<&Moment>) -> [Argument<'_>; 3] {
    let storage = match moment.map(Moment::storage) {
        None | Some(Storage::F32) => 0i64,
        Some(Storage::Bf16) => 1,
        Some(Storage::Block8) => 2,
    };
    [
        moment.map(|moment| &moment.values).into(),
        moment.and_then(|moment| moment.scales.as_ref()).into(),
        storage.into(),
    ]
}

/// The numbers that follow the moments in both kernels.
fn common<'a>(extras: &'a Extras, len: usize) -> [Argument<'a>; 4] {
    [extras.scale.into(), extras.skip.into(), extras.copy.as_deref().into(), (len as i64).into()]
}

pub(in crate::kernels) fn adamw(
    on: &Launcher,
    weights: &mut Tensor,
    grad: &Tensor,
    first: &mut Moment,
    second: &mut Moment,
    by: &AdamWFactors,
    extras: Extras,
) {
    let len = weights.numel();
    if len > 0 {
        let mut all: Vec<Argument> = vec![(&*weights).into(), grad.into()];
        all.extend(arguments(Some(first)));
        all.extend(arguments(Some(second)));
        all.extend(common(&extras, len));
        let numbers = [by.decay, by.new1, by.old2, by.new2, by.step_size, by.root, by.eps];
        all.extend(numbers.map(Argument::Float));
        on.launch("adamw<T, G>", &[weights.kind(), grad.kind()], grid(len), &all);
    }
}

pub(in crate::kernels) fn sgd(
    on: &Launcher,
    weights: &mut Tensor,
    grad: &Tensor,
    first: Option<&mut Moment>,
    sgd: &Sgd,
    extras: Extras,
) {
    let len = weights.numel();
    if len > 0 {
        let mut all: Vec<Argument> = vec![(&*weights).into(), grad.into()];
        all.extend(arguments(first.as_deref()));
        all.extend(common(&extras, len));
        all.extend([sgd.lr, sgd.momentum, sgd.weight_decay].map(|x| Argument::Float(x as f32)));
        on.launch("sgd<T, G>", &[weights.kind(), grad.kind()], grid(len), &all);
    }
}
