//! What an optimizer remembers of each weight, stored as f32, bf16 or blocks of 8-bit codes.
//!
//! 8-bit blocks follow Dettmers et al. 2021 (arXiv 2110.02861, sections 2.1 and 2.2): 256 elements share the f32 scale of
//! their largest absolute value, and each is the nearest of 256 numbers of a dynamic code book. A code book has 7 decades
//! from 1e-6 to 1; decade `i` is cut into `2^i` equal parts (signed; `2^(i + 1)` unsigned), whose middles are the codes, with
//! both signs where signed; 0 and 1 are added. So small numbers keep their order of magnitude and large ones 6 or 7 bits.
//!
//! One departure: a positive second moment never becomes 0. The paper's rounding may do that while the first moment of the
//! same weight survives, and the step would be `first / eps`.

use std::sync::LazyLock;

use tch::{Device, Kind, Tensor};

use super::real::vectorised;

/// Elements that share a scale.
pub const BLOCK: usize = 256;

/// How a moment is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    F32,
    Bf16,
    /// 8 bits and 1/64 f32 of scale for each element.
    Block8,
}

/// What a moment may be, which decides on its code book.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// A mean of gradients.
    Signed,
    /// A mean of squares.
    Unsigned,
}

/// One moment of a flat run of weights.
#[derive(Debug)]
pub struct Moment {
    /// `[len]` f32, bf16, or u8 codes.
    pub values: Tensor,
    /// `[len / 256, rounded up]` f32 for codes: the largest absolute value of each block, cut from the first element on.
    pub scales: Option<Tensor>,
    pub codes: Codes,
}

/// A code book in ascending order, and the numbers halfway between neighbours.
pub(super) struct Book {
    pub codes: [f32; 256],
    /// `cuts[i]` lies between codes i and i + 1; the last is no cut.
    pub cuts: [f32; 256],
    /// The code of the least number whose upper 16 bits are the index. No two cuts share these bits, so the code of any
    /// other such number is this one or the next.
    table: Box<[u8; 1 << 16]>,
}

static BOOKS: LazyLock<[Book; 2]> = LazyLock::new(|| [Book::new(Codes::Signed), Book::new(Codes::Unsigned)]);

impl Book {
    pub fn of(codes: Codes) -> &'static Self {
        &BOOKS[usize::from(codes == Codes::Unsigned)]
    }

    fn new(kind: Codes) -> Self {
        let mut codes = vec![0.0, 1.0];
        for decade in 0..7i32 {
            let parts = 1 << (decade + i32::from(kind == Codes::Unsigned));
            for part in 0..parts {
                let middle = 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
                let code = (10f64.powi(decade - 6) * middle) as f32;
                codes.push(code);
                if kind == Codes::Signed {
                    codes.push(-code);
                }
            }
        }
        codes.sort_by(f32::total_cmp);
        let codes: [f32; 256] = codes.try_into().expect("invariant: 256 codes");
        let cuts = std::array::from_fn(|i| codes.get(i + 1).map_or(f32::INFINITY, |next| (codes[i] + next) / 2.0));
        let mut table = vec![0u8; 1 << 16];
        for (upper, code) in (0u32..).zip(&mut table) {
            let least = f32::from_bits(if upper < 1 << 15 { upper << 16 } else { upper << 16 | 0xffff });
            *code = cuts.iter().filter(|cut| **cut < least).count() as u8;
        }
        let table = table.into_boxed_slice().try_into().expect("invariant: as many entries as made");
        Self { codes, cuts, table }
    }

    /// Number of the nearest code; of two, the smaller. NaN gives 0.
    #[inline(always)]
    fn nearest(&self, x: f32) -> u8 {
        let code = self.table[(x.to_bits() >> 16) as usize];
        code + u8::from(x > self.cuts[usize::from(code)])
    }
}

/// The number, between -1 and 1, that a code stands for.
pub fn code(codes: Codes, code: u8) -> f32 {
    Book::of(codes).codes[usize::from(code)]
}

/// The code that stands for 0.
pub fn zero(codes: Codes) -> u8 {
    Book::of(codes).codes.iter().position(|&number| number == 0.0).expect("invariant: 0 is in every book") as u8
}

impl Moment {
    /// A moment that is 0 for `len` weights.
    pub fn zeros(storage: Storage, codes: Codes, len: i64, device: Device) -> Self {
        let kind = match storage {
            Storage::F32 => Kind::Float,
            Storage::Bf16 => Kind::BFloat16,
            Storage::Block8 => Kind::Uint8,
        };
        let blocks = (len as usize).div_ceil(BLOCK) as i64;
        let scales = (storage == Storage::Block8).then(|| Tensor::zeros([blocks], (Kind::Float, device)));
        Self { values: Tensor::zeros([len], (kind, device)), scales, codes }
    }

    pub fn storage(&self) -> Storage {
        match self.values.kind() {
            Kind::Float => Storage::F32,
            Kind::BFloat16 => Storage::Bf16,
            Kind::Uint8 => Storage::Block8,
            other => panic!("invariant: moments are f32, bf16 or codes, got {other:?}"),
        }
    }

    /// Bytes that the moment takes.
    pub fn bytes(&self) -> usize {
        let size = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        size(&self.values) + self.scales.as_ref().map_or(0, size)
    }

    /// The moment's numbers, `[len]` f32: to keep in a checkpoint, or to cut anew for another layout.
    pub fn read(&self) -> Tensor {
        let Some(scales) = &self.scales else { return self.values.to_kind(Kind::Float) };
        let book = Tensor::from_slice(&Book::of(self.codes).codes).to_device(self.values.device());
        let numbers = book.index_select(0, &self.values.to_kind(Kind::Int64));
        numbers * scales.repeat_interleave_self_int(BLOCK as i64, 0, None).narrow(0, 0, self.values.size()[0])
    }

    /// Another handle on the same memory.
    pub fn shallow_clone(&self) -> Self {
        Self {
            values: self.values.shallow_clone(),
            scales: self.scales.as_ref().map(Tensor::shallow_clone),
            codes: self.codes,
        }
    }

    /// The moment of `len` elements, f32, that is this one's at `indices` (i64) and 0 elsewhere.
    pub fn spread(&self, indices: &Tensor, len: i64) -> Self {
        let mut values = Tensor::zeros([len], (Kind::Float, self.values.device()));
        let _ = values.index_copy_(0, indices, &self.read());
        Self { values, scales: None, codes: self.codes }
    }

    /// The scale of each element's block at `indices` (i64) of `len` elements and 0 elsewhere, f32; None where there are no codes.
    pub fn spread_scales(&self, indices: &Tensor, len: i64) -> Option<Self> {
        let each = self.scales.as_ref()?.repeat_interleave_self_int(BLOCK as i64, 0, None);
        let mut values = Tensor::zeros([len], (Kind::Float, self.values.device()));
        let _ = values.index_copy_(0, indices, &each.narrow(0, 0, self.values.size()[0]));
        Some(Self { values, scales: None, codes: self.codes })
    }

    /// Takes numbers that were read from codes back to the same codes, given the scale of each: both `[len]` f32. False, and nothing
    /// changes, where the scales are not those of this moment's blocks.
    pub fn write_with_scales(&mut self, numbers: &Tensor, scales: &Tensor) -> bool {
        let Some(old) = &mut self.scales else { return false };
        let len = numbers.size()[0];
        let padding = old.size()[0] * BLOCK as i64 - len;
        let blocks = |x: &Tensor, with: f64| {
            let rest = Tensor::full([padding], with, (Kind::Float, x.device()));
            Tensor::cat(&[x, &rest], 0).view([-1, BLOCK as i64])
        };
        let (lowest, scales) =
            (blocks(scales, f64::INFINITY).amin([1i64], true), blocks(scales, -1.0).amax([1i64], true));
        if !lowest.equal(&scales) {
            return false;
        }
        let inverse = scales.reciprocal().where_scalarother(&scales.gt(0.0), 0.0);
        let cuts = Tensor::from_slice(&Book::of(self.codes).cuts[..255]).to_device(numbers.device());
        let codes = (blocks(numbers, 0.0) * inverse).bucketize(&cuts, false, false);
        self.values.copy_(&codes.view([-1]).narrow(0, 0, len));
        old.copy_(&scales.view([-1]));
        true
    }

    /// Replaces the moment's numbers by `numbers: [len]` f32, rounded to its storage.
    ///
    /// Codes that were read and are written again may differ: the signed book has no -1, so a block whose largest number is
    /// negative gets a smaller scale. To keep a moment exactly, keep `values` and `scales`.
    pub fn write(&mut self, numbers: &Tensor) {
        self.write_unless(numbers, None);
    }

    /// As [`Moment::write`], where `skip` (one f32) is 0 or absent; else nothing changes.
    pub(super) fn write_unless(&mut self, numbers: &Tensor, skip: Option<&Tensor>) {
        let put = |old: &mut Tensor, new: &Tensor| match skip {
            Some(skip) => old.copy_(&new.to_kind(old.kind()).where_self(&skip.eq(0.0), old)),
            None => old.copy_(new),
        };
        let Some(scales) = &mut self.scales else { return put(&mut self.values, numbers) };
        let len = numbers.size()[0];
        let padding = scales.size()[0] * BLOCK as i64 - len;
        let blocks = numbers.constant_pad_nd([0, padding]).view([-1, BLOCK as i64]);
        let largest = blocks.abs().amax([1i64], true);
        let largest = largest.where_scalarother(&largest.ge(f64::from(f32::MIN_POSITIVE)), 0.0);
        let inverse = largest.reciprocal().where_scalarother(&largest.gt(0.0), 0.0);
        let cuts = Tensor::from_slice(&Book::of(self.codes).cuts[..255]).to_device(numbers.device());
        let mut codes = (&blocks * inverse).bucketize(&cuts, false, false);
        if self.codes == Codes::Unsigned {
            codes = codes.maximum(&(blocks.gt(0.0) * largest.gt(0.0)).to_kind(Kind::Int64));
        }
        put(&mut self.values, &codes.view([-1]).narrow(0, 0, len));
        put(scales, &largest.view([-1]));
    }
}

vectorised! {
    /// Numbers of one block.
    pub(super) fn decode(codes: &[u8], scale: f32, book: &[f32; 256], out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = book[usize::from(*code)] * scale;
        }
    }

    /// Codes of one block; gives its scale. `least`: the smallest code for a positive number.
    pub(super) fn encode(numbers: &[f32], book: &Book, least: u8, out: &mut [u8]) -> f32 {
        let mut lanes = [0.0f32; 16];
        for numbers in numbers.chunks(16) {
            for (largest, x) in lanes.iter_mut().zip(numbers) {
                let size = x.abs();
                *largest = if size > *largest { size } else { *largest };
            }
        }
        let largest = lanes.into_iter().fold(0.0, |a, b| if b > a { b } else { a });
        // the inverse of a smaller one would overflow
        let scale = if largest < f32::MIN_POSITIVE { 0.0 } else { largest };
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let least = if scale > 0.0 { least } else { 0 };
        for (out, x) in out.iter_mut().zip(numbers) {
            let floor = if *x > 0.0 { least } else { 0 };
            *out = book.nearest(x * inverse).max(floor);
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that follow from the paper's definition by hand.
    #[test]
    fn the_code_books_are_the_papers() {
        let signed = &Book::of(Codes::Signed).codes;
        let unsigned = &Book::of(Codes::Unsigned).codes;
        assert_eq!((signed[127], signed[255], unsigned[0], unsigned[255]), (0.0, 1.0, 0.0, 1.0));
        assert_eq!((signed[128], unsigned[1], unsigned[2]), (5.5e-7, 3.25e-7, 7.75e-7));
        assert_eq!((signed[0], signed[254]), (-0.992_968_75, 0.992_968_75));
        assert_eq!(unsigned[254], 0.996_484_4);
        for book in [signed, unsigned] {
            assert!(book.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    /// The table against counting the cuts, around every cut and at odd numbers.
    #[test]
    fn the_table_finds_the_nearest_code() {
        for codes in [Codes::Signed, Codes::Unsigned] {
            let book = Book::of(codes);
            let slow = |x: f32| book.cuts.iter().filter(|cut| x > **cut).count();
            let around = book.cuts[..255].iter().flat_map(|cut| [cut.next_down(), *cut, cut.next_up()]);
            let odd = [0.0, -0.0, 1.0, -1.0, 1.0f32.next_up(), 1e-38, -1e-38, f32::NAN, f32::INFINITY, -f32::INFINITY];
            let fine = (-70_000..70_000).map(|i| i as f32 / 65_536.0);
            for x in around.chain(odd).chain(fine) {
                assert_eq!(usize::from(book.nearest(x)), slow(x), "{x:e}");
            }
        }
    }

    #[test]
    fn encoding_takes_the_nearest_code() {
        tch::manual_seed(11);
        for (codes, least) in [(Codes::Signed, 0), (Codes::Unsigned, 1)] {
            let book = Book::of(codes);
            for len in [1usize, 7, 255, 256] {
                let mut x = Tensor::randn([len as i64], (Kind::Float, Device::Cpu)).pow_tensor_scalar(3);
                if codes == Codes::Unsigned {
                    x = x.abs();
                }
                let x = Vec::<f32>::try_from(x).unwrap();
                let (mut out, mut back) = (vec![0u8; len], vec![0.0; len]);
                let scale = encode(&x, book, least, &mut out);
                assert_eq!(scale, x.iter().fold(0.0, |a, x| x.abs().max(a)));
                decode(&out, scale, &book.codes, &mut back);
                for (x, back) in x.iter().zip(&back) {
                    let best = book.codes.iter().map(|code| (code * scale - x).abs()).fold(f32::INFINITY, f32::min);
                    let zero_avoided = least == 1 && *x > 0.0 && *x < 3e-7 * scale;
                    assert!((back - x).abs() <= best * 1.0001 || zero_avoided, "{x} became {back}");
                    assert!(least == 0 || (*x > 0.0) == (*back > 0.0), "{x} became {back}");
                }
            }
        }
    }

    /// Plain tensor operations and the loop over a block agree to the bit.
    #[test]
    fn read_and_write_agree_with_the_blocks() {
        tch::manual_seed(12);
        let len = 1000;
        let x = Tensor::randn([len], (Kind::Float, Device::Cpu)) * 1e-3;
        let _ = x.narrow(0, 256, 256).zero_();
        for codes in [Codes::Signed, Codes::Unsigned] {
            let x = if codes == Codes::Unsigned { x.square() } else { x.copy() };
            let mut moment = Moment::zeros(Storage::Block8, codes, len, Device::Cpu);
            assert_eq!(moment.bytes(), 1000 + 4 * 4);
            assert_eq!(f64::try_from(moment.read().abs().sum(Kind::Float)).unwrap(), 0.0);
            moment.write(&x);
            let (numbers, book) = (Vec::<f32>::try_from(&x).unwrap(), Book::of(codes));
            let stored = Vec::<u8>::try_from(&moment.values).unwrap();
            for (block, numbers) in numbers.chunks(BLOCK).enumerate() {
                let mut out = vec![0; numbers.len()];
                let scale = encode(numbers, book, u8::from(codes == Codes::Unsigned), &mut out);
                assert_eq!(stored[block * BLOCK..][..numbers.len()], out);
                assert_eq!(f64::from(scale), moment.scales.as_ref().unwrap().double_value(&[block as i64]));
            }
            let read = moment.read();
            let error = f64::try_from((&read - &x).abs().max() / x.abs().max()).unwrap();
            assert!(error < 0.0075, "{error}");
        }
        let mut exact = Moment::zeros(Storage::F32, Codes::Signed, len, Device::Cpu);
        exact.write(&x);
        assert!(exact.read().equal(&x));
    }
}
