//! Random initial weights: a function of seed, Hugging Face tensor name and element index alone, so that every layout
//! starts from the same model.

use tch::{Device, Kind, Tensor};

use super::sharding::{Class, Param, Piece};
use crate::abi::parallel;
use crate::abi::slices::slice_mut;

/// 64 random bits for each element of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of one tensor.
    pub fn new(seed: u64, name: &str) -> Self {
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, byte| (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        Self { key: hash ^ mix(seed.wrapping_add(GOLDEN)) }
    }

    /// Bits of element `index`, in row-major order of the whole tensor.
    #[inline]
    pub fn bits(self, index: u64) -> u64 {
        mix(self.key.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN)))
    }

    /// Uniform in [-1, 1), exact in f32.
    #[inline]
    pub fn symmetric(self, index: u64) -> f32 {
        (self.bits(index) >> 40) as f32 * (2.0 / 16_777_216.0) - 1.0
    }

    /// Standard normal (Box-Muller on the two halves of the bits).
    #[inline]
    pub fn normal(self, index: u64) -> f64 {
        let bits = self.bits(index);
        let radius = ((bits >> 32) as f64 + 1.0) / 4_294_967_296.0;
        let angle = (bits & 0xffff_ffff) as f64 / 4_294_967_296.0;
        (-2.0 * radius.ln()).sqrt() * (2.0 * std::f64::consts::PI * angle).cos()
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Initial values of one piece, `piece.size` f32: normal with standard deviation `std` for matrices, 1 for norms, 0 for biases.
pub fn initial(param: &Param, piece: &Piece, seed: u64, std: f64) -> Tensor {
    let options = (Kind::Float, Device::Cpu);
    match param.class {
        Class::Vector | Class::PartialVector => Tensor::ones(&piece.size, options),
        Class::Bias => Tensor::zeros(&piece.size, options),
        Class::Matrix | Class::PartialMatrix => fill(piece, &|stream, index| (stream.normal(index) * std) as f32, seed),
        Class::Frozen => unreachable!("invariant: values are drawn for a table in which nothing is frozen"),
    }
}

/// Initial values of one piece of an adapter, as in PEFT: A uniform in `[-1/sqrt(columns), 1/sqrt(columns))`, B zero.
pub fn adapter(piece: &Piece, seed: u64) -> Tensor {
    if piece.name.ends_with("lora_B.weight") {
        return Tensor::zeros(&piece.size, (Kind::Float, Device::Cpu));
    }
    let bound = 1.0 / (piece.shape[1] as f32).sqrt();
    fill(piece, &|stream, index| bound * stream.symmetric(index), seed)
}

/// `value(stream, index)` for every element of a piece, by its index in the whole tensor.
pub fn fill(piece: &Piece, value: &(dyn Fn(Stream, u64) -> f32 + Sync), seed: u64) -> Tensor {
    let stream = Stream::new(seed, &piece.name);
    let columns = piece.size.get(1).copied().unwrap_or(1);
    let (row_length, first_column) =
        (piece.shape.get(1).copied().unwrap_or(1), piece.offset.get(1).copied().unwrap_or(0));
    let mut tensor = Tensor::empty(&piece.size, (Kind::Float, Device::Cpu));
    parallel::for_chunks(slice_mut::<f32>(&mut tensor), columns as usize, 1, |row, out| {
        let first = (piece.offset[0] + row as i64) * row_length + first_column;
        for (column, out) in out.iter_mut().enumerate() {
            *out = value(stream, first as u64 + column as u64);
        }
    });
    tensor
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::slices::slice;

    fn piece(offset: [i64; 2], size: [i64; 2]) -> Piece {
        Piece { name: "a.weight".into(), shape: vec![300, 200], offset: offset.into(), size: size.into(), row: 0 }
    }

    #[test]
    fn a_box_holds_what_the_whole_tensor_holds_there() {
        let normal = |stream: Stream, index| stream.normal(index) as f32;
        let whole = fill(&piece([0, 0], [300, 200]), &normal, 7);
        let part = fill(&piece([17, 40], [100, 60]), &normal, 7);
        assert!(whole.narrow(0, 17, 100).narrow(1, 40, 60).equal(&part));
        assert!(!fill(&piece([17, 40], [100, 60]), &normal, 8).equal(&part));
    }

    #[test]
    fn the_values_are_standard_normal() {
        let sample = fill(&piece([0, 0], [300, 200]), &|stream, index| stream.normal(index) as f32, 1);
        let values: Vec<f64> = slice::<f32>(&sample).iter().map(|&x| f64::from(x)).collect();
        let moment = |k: i32| values.iter().map(|x| x.powi(k)).sum::<f64>() / values.len() as f64;
        // standard errors at n = 60,000: 0.004, 0.006, 0.016, 0.04
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.03);
        assert!(moment(3).abs() < 0.08 && (moment(4) - 3.0).abs() < 0.2);
    }
}
