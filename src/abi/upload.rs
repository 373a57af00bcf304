//! Numbers of the host as tensors of a device.

use tch::{Device, Kind, Tensor};

use super::slices::{self, Element};
use super::torch_cuda;

/// A tensor `[values]` on `device`.
///
/// To a GPU the copy goes through page-locked memory and runs beside the host: nothing waits for the device's queue. libtorch
/// keeps the page-locked block from being used again until the copy is done.
pub fn upload<T: Element + tch::kind::Element>(values: &[T], device: Device) -> Tensor {
    upload_tensor(&Tensor::from_slice(values), device)
}

/// As [`upload`] for a contiguous CPU tensor of any kind and shape.
pub fn upload_tensor(tensor: &Tensor, device: Device) -> Tensor {
    if device == Device::Cpu || tensor.numel() == 0 {
        return tensor.to_device(device);
    }
    let bytes = slices::bytes(tensor);
    let mut pinned = torch_cuda::pinned(bytes.len());
    slices::bytes_mut(&mut pinned).copy_from_slice(bytes);
    let (kind, shape) = (tensor.kind(), tensor.size());
    let pinned = if kind == Kind::Uint8 { pinned } else { pinned.view_dtype(kind) };
    pinned.view(shape.as_slice()).to_device_(device, kind, true, false)
}
