//! Values of parameters as they leave a training: masters gathered over their owners, adapters multiplied into their matrices.

use tch::{Device, Tensor};

use crate::dist::World;
use crate::model::sharding::ParamId;
use crate::train::Trainer;

/// This rank's f32 values of what a trainer has trained, complete over the data-parallel ranks.
pub(super) struct Trained<'a> {
    trainer: &'a Trainer,
    world: &'a World,
    /// The bucket that was gathered last.
    open: Option<(usize, Tensor)>,
}

impl<'a> Trained<'a> {
    pub(super) fn new(trainer: &'a Trainer, world: &'a World) -> Self {
        Self { trainer, world, open: None }
    }

    /// A parameter that was trained. All data-parallel ranks call it, parameter by parameter in the same order.
    pub(super) fn own(&mut self, id: ParamId) -> Tensor {
        let Trainer { parameters, decoder, .. } = self.trainer;
        let (bucket, start) = parameters.layout.places[id].expect("invariant: it is trained");
        if self.open.as_ref().is_none_or(|(index, _)| *index != bucket) {
            self.open = None;
            self.open = Some((bucket, parameters.gather_masters(bucket, &self.world.dp)));
        }
        let (_, flat) = self.open.as_ref().expect("invariant: just set");
        let param = &decoder.table.params[id];
        flat.narrow(0, start as i64, param.num_elements()).view(param.shape.as_slice())
    }

    /// Adds to `values` of a matrix, on the host, what its adapters add. As [`Self::own`].
    pub(super) fn merge(&mut self, id: ParamId, values: &Tensor) {
        let table = &self.trainer.decoder.table;
        for adapter in table.layers.iter().flat_map(|layer| &layer.adapters).filter(|adapter| adapter.of == id) {
            let (a, b) = (self.own(adapter.a).copy(), self.own(adapter.b));
            let product = (b.matmul(&a) * table.adapter_scale).to_device(Device::Cpu);
            let mut rows = values.narrow(0, adapter.rows.start, adapter.rows.end - adapter.rows.start);
            let _ = rows.g_add_(&product);
        }
    }
}
