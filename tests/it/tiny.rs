//! Tiny models whose weights are a function of (seed, tensor name, element index), the same as in `tests/golden/weights.py`.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use dunlearn::dist::World;
use dunlearn::model::init::{self, Stream};
use dunlearn::model::sharding::{self, Piece, Table};
use dunlearn::model::{Architecture, Decoder, LogitsPool, families};
use dunlearn::telemetry::Clock;
use dunlearn::train::{Layout, Parameters};
use tch::{Device, Kind, Tensor};

pub fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

pub fn architecture(case: &str) -> Architecture {
    families::read(&golden(case)).unwrap()
}

/// Test weights of one box of a tensor.
pub fn weights(piece: &Piece, seed: u64) -> Tensor {
    let name = piece.name.as_str();
    let value: &(dyn Fn(Stream, u64) -> f32 + Sync) = if name.ends_with("norm.weight") {
        &|stream, i| 1.0 + 0.25 * stream.symmetric(i)
    } else if name.ends_with(".bias") {
        &|stream, i| 0.5 * stream.symmetric(i)
    } else if name == "model.embed_tokens.weight" {
        &|stream, i| stream.symmetric(i)
    } else {
        &|stream, i| 0.25 * stream.symmetric(i)
    };
    init::fill(piece, value, seed)
}

/// How a test spreads the model.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub sequence_parallel: bool,
    pub zero: bool,
    pub bucket_elements: usize,
}

impl Default for Spread {
    fn default() -> Self {
        Self { sequence_parallel: false, zero: true, bucket_elements: 1 << 20 }
    }
}

/// A decoder and its test weights on one rank.
pub fn model(arch: &Architecture, world: &World, spread: Spread, kind: Kind, seed: u64) -> (Decoder, Parameters) {
    model_from(arch, world, spread, kind, |piece| weights(piece, seed))
}

/// As [`model`] with weights from anywhere.
pub fn model_from(
    arch: &Architecture,
    world: &World,
    spread: Spread,
    kind: Kind,
    source: impl Fn(&Piece) -> Tensor,
) -> (Decoder, Parameters) {
    model_training(arch, world, spread, kind, &["*".to_owned()], source)
}

/// As [`model_from`] with only the tensors trained that match a pattern.
pub fn model_training(
    arch: &Architecture,
    world: &World,
    spread: Spread,
    kind: Kind,
    trained: &[String],
    source: impl Fn(&Piece) -> Tensor,
) -> (Decoder, Parameters) {
    let named = |name: &str| trained.iter().any(|pattern| sharding::matches(pattern, name));
    let narrow = |table: &mut Table| table.freeze(|param| param.pieces.iter().any(|piece| named(&piece.name)));
    model_narrowed(arch, world, spread, kind, narrow, source)
}

/// As [`model_from`] with `narrow` done to the sharding table.
pub fn model_narrowed(
    arch: &Architecture,
    world: &World,
    spread: Spread,
    kind: Kind,
    narrow: impl Fn(&mut Table),
    source: impl Fn(&Piece) -> Tensor,
) -> (Decoder, Parameters) {
    let mut table = Table::new(arch, world.mesh.tp, world.mesh.tp_rank(), spread.sequence_parallel).unwrap();
    narrow(&mut table);
    let (owners, owner) = if spread.zero { (world.mesh.dp, world.mesh.dp_rank()) } else { (1, 0) };
    let layout = Layout::new(&table, spread.bucket_elements, owners, owner);
    let source = |_, piece: &Piece| Ok::<_, std::convert::Infallible>(source(piece));
    let parameters = Parameters::new(&table, layout, kind, Device::Cpu, source).unwrap();
    let decoder = Decoder {
        arch: arch.clone(),
        table,
        tp: Rc::clone(&world.tp),
        sequence_parallel: spread.sequence_parallel,
        device: Device::Cpu,
        clock: Clock::default(),
        logits: LogitsPool::default(),
    };
    (decoder, parameters)
}

/// Largest absolute difference.
pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    f64::try_from((a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max()).unwrap()
}

/// L2 distance relative to the length of `want`.
pub fn relative(got: &Tensor, want: &Tensor) -> f64 {
    let norm = |t: Tensor| f64::try_from(t.to_kind(Kind::Double).norm()).unwrap();
    let distance = norm(got.to_kind(Kind::Double) - want.to_kind(Kind::Double));
    if distance == 0.0 { 0.0 } else { distance / norm(want.shallow_clone()) }
}

/// Tensors of a golden file by name.
pub fn read(path: &Path) -> std::collections::BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}
