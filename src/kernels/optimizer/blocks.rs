//! The loop over blocks of weights and moments on the CPU, each as f32 whatever its storage.

use tch::{Kind, Tensor};

use super::Extras;
use crate::abi::parallel::{self, Chunks};
use crate::abi::slices::{Bf16, slice, slice_mut};
use crate::kernels::moment::{BLOCK, Book, Codes, Moment, decode, encode};
use crate::kernels::real::{Real, vectorised};

/// Elements of one step of the parallel loop: whole blocks.
const CHUNK: usize = 16 * BLOCK;

type Floats<'a> = (Option<Chunks<'a, f32>>, Option<Chunks<'a, Bf16>>);

fn floats(tensor: Option<&mut Tensor>) -> Floats<'_> {
    match tensor {
        Some(tensor) if tensor.kind() == Kind::Float => (Some(Chunks::new(slice_mut(tensor), CHUNK)), None),
        Some(tensor) if tensor.kind() == Kind::BFloat16 => (None, Some(Chunks::new(slice_mut(tensor), CHUNK))),
        _ => (None, None),
    }
}

type Stored<'a> = (Floats<'a>, Option<(Chunks<'a, u8>, Chunks<'a, f32>)>);

fn stored(moment: Option<&mut Moment>) -> Stored<'_> {
    match moment {
        Some(Moment { values, scales: Some(scales), .. }) => {
            let codes = Chunks::new(slice_mut(values), CHUNK);
            ((None, None), Some((codes, Chunks::new(slice_mut(scales), CHUNK / BLOCK))))
        }
        Some(moment) => (floats(Some(&mut moment.values)), None),
        None => ((None, None), None),
    }
}

/// A chunk of numbers in one of the storages.
enum Part<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [Bf16]),
    Block8 { codes: &'a mut [u8], scales: &'a mut [f32], book: &'static Book, least: u8 },
    Absent,
}

impl<'a> Part<'a> {
    fn of(floats: (Option<&'a mut [f32]>, Option<&'a mut [Bf16]>)) -> Self {
        match floats {
            (Some(part), _) => Self::F32(part),
            (_, Some(part)) => Self::Bf16(part),
            _ => Self::Absent,
        }
    }

    fn of_moment(
        (floats, codes): ((Option<&'a mut [f32]>, Option<&'a mut [Bf16]>), Option<(&'a mut [u8], &'a mut [f32])>),
        kind: Codes,
    ) -> Self {
        let least = u8::from(kind == Codes::Unsigned);
        match codes {
            Some((codes, scales)) => Self::Block8 { codes, scales, book: Book::of(kind), least },
            None => Self::of(floats),
        }
    }

    /// Block `block` of the chunk as f32: itself, or read into `buffer` (0 where there is nothing to read).
    fn open<'b>(&'b mut self, block: usize, len: usize, buffer: &'b mut [f32; BLOCK]) -> &'b mut [f32] {
        let at = block * BLOCK..block * BLOCK + len;
        let buffer = &mut buffer[..len];
        match self {
            Self::F32(part) => return &mut part[at],
            Self::Bf16(part) => widen(&part[at], buffer),
            Self::Block8 { codes, scales, book, .. } => decode(&codes[at], scales[block], &book.codes, buffer),
            Self::Absent => buffer.fill(0.0),
        }
        buffer
    }

    /// Writes back what `open` had read.
    fn close(&mut self, block: usize, len: usize, buffer: &[f32; BLOCK]) {
        let at = block * BLOCK..block * BLOCK + len;
        match self {
            Self::Bf16(part) => narrow(&buffer[..len], &mut part[at]),
            Self::Block8 { codes, scales, book, least } => {
                scales[block] = encode(&buffer[..len], book, *least, &mut codes[at]);
            }
            Self::F32(_) | Self::Absent => {}
        }
    }
}

/// Calls `update(weights, gradient, first, second)` for each block as f32, and stores what it left there.
pub(super) fn each(
    weights: &mut Tensor,
    grad: &Tensor,
    first: Option<&mut Moment>,
    second: Option<&mut Moment>,
    extras: Extras,
    update: impl Fn(&mut [f32], &[f32], &mut [f32], &mut [f32]) + Sync,
) {
    if extras.skip.is_some_and(|skip| slice::<f32>(skip)[0] != 0.0) {
        return;
    }
    let len = weights.numel();
    let (wide, half) = match grad.kind() {
        Kind::Float => (Some(slice::<f32>(grad)), None),
        _ => (None, Some(slice::<Bf16>(grad))),
    };
    let outputs = (floats(Some(weights)), stored(first), stored(second), floats(extras.copy));
    parallel::for_outputs(outputs, 4, |chunk, (w, m, v, copy)| {
        let mut w = Part::of(w);
        let (mut m, mut v) = (Part::of_moment(m, Codes::Signed), Part::of_moment(v, Codes::Unsigned));
        let mut buffers = [[0.0f32; BLOCK]; 4];
        let [w_buffer, g_buffer, m_buffer, v_buffer] = &mut buffers;
        let mut copy = copy.1;
        for (block, at) in (chunk * CHUNK..len.min((chunk + 1) * CHUNK)).step_by(BLOCK).enumerate() {
            let count = BLOCK.min(len - at);
            let g = match (wide, half) {
                (Some(wide), _) => &wide[at..at + count],
                (_, Some(half)) => {
                    widen(&half[at..at + count], &mut g_buffer[..count]);
                    &g_buffer[..count]
                }
                _ => &[],
            };
            let open = w.open(block, count, w_buffer);
            update(open, g, m.open(block, count, m_buffer), v.open(block, count, v_buffer));
            if let Some(copy) = &mut copy {
                narrow(open, &mut copy[block * BLOCK..block * BLOCK + count]);
            }
            w.close(block, count, w_buffer);
            m.close(block, count, m_buffer);
            v.close(block, count, v_buffer);
        }
    });
}

vectorised! {
    fn widen(x: &[Bf16], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x.get();
        }
    }

    fn narrow(x: &[f32], out: &mut [Bf16]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = Bf16::put(*x);
        }
    }
}
