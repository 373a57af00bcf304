//! Tensors over memory that Rust owns: a memory-mapped file without a copy.

use std::ffi::c_void;
use std::sync::Arc;

use memmap2::Mmap;
use tch::{Kind, Tensor};

unsafe extern "C" {
    fn aoti_torch_layout_strided() -> i32;
    fn torch_from_blob(
        data: *mut c_void,
        num_dims: i64,
        sizes: *const i64,
        strides: *const i64,
        storage_offset: i64,
        dtype: i32,
        device_type: i32,
        device_index: i32,
        out: *mut *mut c_void,
        layout: i32,
        opaque_metadata: *const u8,
        opaque_metadata_size: i64,
        deleter: extern "C" fn(*mut c_void, *mut c_void),
        deleter_ctx: *mut c_void,
    ) -> i32;
}

extern "C" fn drop_map(_data: *mut c_void, ctx: *mut c_void) {
    // SAFETY: `ctx` is the box that `map_tensor` leaked, handed back once.
    drop(unsafe { Box::from_raw(ctx.cast::<Arc<Mmap>>()) });
}

/// A read-only tensor over `shape` elements of `kind` that start at byte `offset` of a mapped file; nothing is copied or read.
///
/// The tensor keeps the map alive. Writing to it is a fault of the process: copy first. Panics when the bytes are not all
/// inside the map or not aligned to the element.
pub fn map_tensor(map: &Arc<Mmap>, offset: usize, shape: &[i64], kind: Kind) -> Tensor {
    let size = kind.elt_size_in_bytes();
    let bytes = shape.iter().try_fold(size, |bytes, &n| bytes.checked_mul(usize::try_from(n).ok()?));
    assert!(
        bytes.and_then(|bytes| offset.checked_add(bytes)).is_some_and(|end| end <= map.len()),
        "invariant: the tensor lies inside the file"
    );
    assert!(offset.is_multiple_of(size), "invariant: the tensor is aligned");
    let mut strides = vec![1i64; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim] * shape[dim];
    }
    let context = Box::into_raw(Box::new(Arc::clone(map)));
    let mut out = std::ptr::null_mut();
    // SAFETY: the bytes are inside the map (checked), which the leaked Arc keeps alive until `drop_map`; device -1 is the
    // CPU's index; the result is a new tensor handle owned by us, and a handle is an `at::Tensor*`.
    unsafe {
        let code = torch_from_blob(
            map.as_ptr().add(offset).cast_mut().cast(),
            shape.len() as i64,
            shape.as_ptr(),
            strides.as_ptr(),
            0,
            scalar_type(kind),
            0,
            -1,
            &raw mut out,
            aoti_torch_layout_strided(),
            std::ptr::null(),
            0,
            drop_map,
            context.cast(),
        );
        assert_eq!(code, 0, "invariant: libtorch can look at mapped memory");
        Tensor::from_ptr(out.cast())
    }
}

/// libtorch's number of an element type (`c10::ScalarType`), for the types that weight files hold.
fn scalar_type(kind: Kind) -> i32 {
    match kind {
        Kind::Uint8 => 0,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::BFloat16 => 15,
        other => panic!("invariant: weights are not stored as {other:?}"),
    }
}

/// Maps a file for reading.
///
/// A file that another program cuts while it is mapped faults this process; model folders are not edited while they are read.
pub fn map_file(file: &std::fs::File) -> std::io::Result<Mmap> {
    // SAFETY: the map is only read; the remaining hazard, truncation by others, is documented above.
    unsafe { Mmap::map(file) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_mapped_tensor_outlives_the_map_handle() {
        let mut file = tempfile::tempfile().unwrap();
        let values: Vec<u8> = (0..12).flat_map(|i| (i as f32).to_le_bytes()).collect();
        file.write_all(&[7u8; 8]).unwrap();
        file.write_all(&values).unwrap();
        let map = Arc::new(map_file(&file).unwrap());
        let tensor = map_tensor(&map, 8, &[3, 4], Kind::Float);
        drop(map);
        assert_eq!(tensor.size(), [3, 4]);
        assert_eq!(tensor.double_value(&[2, 1]), 9.0);
        assert_eq!(tensor.narrow(1, 1, 2).sum(Kind::Float).double_value(&[]), 33.0);
    }
}
