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

/// Bytes that go to a device at once: the size of the page-locked buffer that libtorch keeps for it.
const STAGE: i64 = 64 << 20;

/// Copies a tensor of the host, mapped or computed, or of the device, into `target`, converted on the target's side.
pub fn fill(target: &Tensor, source: &Tensor) {
    let mut target = target.shallow_clone();
    if target.device() == source.device() {
        return target.copy_(source);
    }
    let row = (source.numel() as i64 / source.size()[0].max(1)).max(1) * source.kind().elt_size_in_bytes() as i64;
    let rows = (STAGE / row).max(1);
    for first in (0..source.size()[0]).step_by(rows as usize) {
        let len = rows.min(source.size()[0] - first);
        let part = upload_tensor(&source.narrow(0, first, len).contiguous(), target.device());
        target.narrow(0, first, len).copy_(&part);
    }
}
