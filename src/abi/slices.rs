//! Tensor memory as Rust slices.

use tch::{Device, Kind, Tensor};

/// A bfloat16 number as its 16 bits. tch's own `half::bf16` element is silently wrong (tch-rs issue 995).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Bf16 {
    /// Rounds to nearest, ties to even; NaN stays NaN.
    #[inline(always)]
    pub fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        // A NaN whose rounding would overflow into the sign keeps its sign and quiet bit instead.
        let bits = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
        Self((bits >> 16) as u16)
    }

    /// Exact.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for i64 {}
    impl Sealed for i32 {}
    impl Sealed for u8 {}
    impl Sealed for super::Bf16 {}
}

/// A Rust type with the memory layout of a tensor's elements.
pub trait Element: Copy + Send + Sync + sealed::Sealed + 'static {
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}
impl Element for f64 {
    const KIND: Kind = Kind::Double;
}
impl Element for i64 {
    const KIND: Kind = Kind::Int64;
}
impl Element for i32 {
    const KIND: Kind = Kind::Int;
}
impl Element for u8 {
    const KIND: Kind = Kind::Uint8;
}
impl Element for Bf16 {
    const KIND: Kind = Kind::BFloat16;
}

/// The elements of a contiguous CPU tensor, in row-major order.
///
/// Panics unless the tensor is contiguous, on the CPU and of `T`'s kind.
pub fn slice<T: Element>(tensor: &Tensor) -> &[T] {
    check::<T>(tensor);
    if tensor.numel() == 0 {
        return &[];
    }
    // SAFETY: `check` made sure of kind, device and contiguity, so `numel` elements of T start at `data_ptr`; the tensor,
    // borrowed for the slice's lifetime, keeps the storage alive.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), tensor.numel()) }
}

/// As [`slice`], to write. The caller passes the only handle that is in use; views of the same storage must not be read
/// meanwhile.
pub fn slice_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    check::<T>(tensor);
    if tensor.numel() == 0 {
        return &mut [];
    }
    // SAFETY: as in `slice`; `&mut` makes this handle the only one used for the slice's lifetime.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), tensor.numel()) }
}

/// The bytes of a contiguous CPU tensor of any kind.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    assert!(tensor.is_contiguous() && tensor.device() == Device::Cpu, "invariant: contiguous and on the CPU");
    let size = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if size == 0 {
        return &[];
    }
    // SAFETY: a contiguous CPU tensor's storage holds `size` bytes from `data_ptr`, alive as long as the borrow.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), size) }
}

/// As [`bytes`], to write.
pub fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    assert!(tensor.is_contiguous() && tensor.device() == Device::Cpu, "invariant: contiguous and on the CPU");
    let size = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if size == 0 {
        return &mut [];
    }
    // SAFETY: as in `bytes`; `&mut` makes this handle the only one used for the slice's lifetime.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), size) }
}

/// Numbers as the bytes that files hold of them.
pub fn number_bytes_mut(numbers: &mut [f32]) -> &mut [u8] {
    // SAFETY: every byte of an f32 may be read and written as a byte, and every four bytes are an f32; the borrow is handed on.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast::<u8>(), size_of_val(numbers)) }
}

fn check<T: Element>(tensor: &Tensor) {
    assert!(
        tensor.kind() == T::KIND && tensor.is_contiguous() && tensor.device() == Device::Cpu,
        "invariant: a contiguous CPU tensor of {:?}, got {:?} on {:?} with strides {:?} for {:?}",
        T::KIND,
        tensor.kind(),
        tensor.device(),
        tensor.stride(),
        tensor.size(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_libtorch_does() {
        let values = [0.0f32, -0.0, 1.0, -2.5, 1.003_906_3, 1.011_718_8, 3.0e38, f32::INFINITY, 1e-40, 0.1, -7.7e-3];
        let tensor = Tensor::from_slice(&values).to_kind(Kind::BFloat16);
        for (&bits, &value) in slice::<Bf16>(&tensor).iter().zip(&values) {
            assert_eq!(bits, Bf16::from_f32(value), "{value}");
        }
        assert!(Bf16::from_f32(f32::NAN).to_f32().is_nan());
        assert!(Bf16::from_f32(f32::from_bits(0x7fff_ffff)).to_f32().is_nan());
    }

    #[test]
    #[should_panic(expected = "contiguous CPU tensor")]
    fn a_transposed_view_is_refused() {
        let tensor = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        slice::<f32>(&tensor.tr());
    }

    #[test]
    fn writes_reach_the_tensor() {
        let mut tensor = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        slice_mut::<f32>(&mut tensor)[2] = 5.0;
        assert_eq!(tensor.double_value(&[2]), 5.0);
    }
}
