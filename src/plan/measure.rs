//! The machine at hand: seconds of the very products and collectives that a step has, and rates of its passes over memory.
//!
//! What a step reads has mostly left the cache since it was last used, so calls here take turns among copies that are together more than
//! a cache holds. Ranks that are there measure at the same time: they share the memory's bandwidth, as in a step.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::base::kind;
use super::core::Packed;
use super::layers::Heads;
use super::machine::Measured;
use super::rank::{Rank, Shape};
use super::tally::{Operands, Pass, Product};
use super::{Job, PlanError};
use crate::abi::host::{MAPPED, cpu_seconds};
use crate::config;
use crate::dist::wire::{Call, Op};
use crate::dist::{Group, Reduce, World};
use crate::kernels::attention::{self, Sight};
use crate::kernels::moment::{Codes, Moment};
use crate::kernels::optimizer::{AdamW, Extras, Sgd, adamw, sgd};
use crate::kernels::product::widened_product_into;
use crate::kernels::reduce::sum_of_squares;
use crate::kernels::{product, rms_norm, rotary, softmax, swiglu};
use crate::model::cut_on_host;
use crate::train::{self, Optimizer, StepWork};

/// Times what the first step of a rank is made of, products for about `patience`. All ranks of `world` call it; with a world of one,
/// collectives of a larger mesh are not timed.
///
/// # Errors
/// Nothing can be planned.
pub fn measure(job: &Job, world: &World, patience: Duration) -> Result<Measured, PlanError> {
    let there = world.mesh.world() > 1;
    let mesh = if there { world.mesh } else { job.mesh };
    let walked = job.walk(mesh, 1)?.remove(0);
    let products: Vec<Product> = walked.products.into_keys().filter(|product| product.columns > 1).collect();
    let calls: BTreeSet<Call> = walked.calls.into_iter().filter(|_| there).collect();
    let kinds = (kind(job.config.train.precision), train::kind(job.config.train.grad_dtype));
    world.world.barrier();
    let passes = job.with_rank(mesh, |rank, batches| passes(rank, &batches.step(0, mesh)))?;
    world.world.barrier();
    let each = patience.div_f64(products.len().max(1) as f64);
    let products = products.into_iter().map(|product| (product, time_product(product, kinds, each))).collect();
    world.world.barrier();
    let of = |axis: &str| if axis == "tp" { &*world.tp } else { &*world.dp };
    let calls = calls.into_iter().map(|call| (call, time_call(&call, of(call.axis)))).collect();
    Ok(Measured { products, passes, calls })
}

/// Bytes of copies that are together more than a core's share of a cache.
const CACHE: usize = 64 << 20;

/// Copies that are used in turn.
struct Ring<T> {
    all: Vec<T>,
    next: usize,
}

impl<T> Ring<T> {
    /// `bytes`: of one copy.
    fn new(bytes: usize, make: impl FnMut() -> T) -> Self {
        let copies = CACHE.div_ceil(bytes.max(1)).clamp(1, 64);
        Self { all: std::iter::repeat_with(make).take(copies).collect(), next: 0 }
    }

    /// The copy that was used longest ago.
    fn next(&mut self) -> &mut T {
        self.next = (self.next + 1) % self.all.len();
        &mut self.all[self.next]
    }
}

fn filled(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::full(shape, 0.5, (kind, Device::Cpu))
}

/// `kinds`: of what the model computes with, and of gradients.
fn time_product(product: Product, kinds: (Kind, Kind), patience: Duration) -> f64 {
    // large ones run at the rate of their upper left part
    let cut = |n: u64| n.min(4096);
    let Product { rows, inner, columns, .. } = product;
    let part = Product { rows: cut(rows), inner: cut(inner), columns: cut(columns), ..product };
    seconds(patience, multiply(part, kinds)) * product.operations() / part.operations()
}

fn multiply(product: Product, (kind, gradient): (Kind, Kind)) -> impl FnMut() {
    let [rows, inner, columns, batch] = [product.rows, product.inner, product.columns, product.batch].map(|n| n as i64);
    let turned = |yes: bool, rows, columns| if yes { [batch, columns, rows] } else { [batch, rows, columns] };
    let left = turned(product.operands == Operands::Tn, rows, inner);
    let right = turned(product.operands == Operands::Nt, inner, columns);
    let bytes = (batch * (rows * inner + inner * columns)) as usize * kind.elt_size_in_bytes();
    // scores are cut so that a chunk stays in the cache
    let bytes = if batch > 1 { CACHE } else { bytes };
    let matrix = |shape: [i64; 3]| {
        let whole = filled(&shape, kind);
        if batch == 1 { whole.squeeze_dim(0) } else { whole }
    };
    let result = || filled(&[rows, columns], gradient);
    let mut ring = Ring::new(bytes, || {
        (matrix(left), matrix(right), (product.operands == Operands::Tn && batch == 1).then(result))
    });
    move || {
        let (a, b, gradient) = ring.next();
        let a = if product.operands == Operands::Tn { a.transpose(-1, -2) } else { a.shallow_clone() };
        let b = if product.operands == Operands::Nt { b.transpose(-1, -2) } else { b.shallow_clone() };
        match gradient {
            // a matrix's gradient has a place where it is wanted
            Some(gradient) => widened_product_into(gradient, &a, &b),
            None => _ = product::product(&a, &b),
        }
    }
}

/// Amounts a second, by the unit of [`Pass`], with the sizes of a step's largest micro-batch.
fn passes(rank: &Rank, work: &StepWork) -> BTreeMap<Pass, f64> {
    let largest = work.micro_batches.iter().max_by_key(|micro_batch| micro_batch.tokens.len());
    let (lengths, rows) = largest.map_or((vec![64], 64), |largest| (largest.lengths(), largest.positions.len()));
    let s = rank.shape(&lengths);
    let mut rates = Rates { kind: kind(rank.config.train.precision), all: BTreeMap::new() };
    rates.of_rows(rank, &s);
    rates.of_attention(rank, &s);
    rates.of_logits(rank, rows as i64);
    rates.of_optimizer(&rank.config.optimizer);
    rates.all
}

struct Rates {
    /// Of the numbers that the model computes with.
    kind: Kind,
    all: BTreeMap<Pass, f64>,
}

impl Rates {
    fn add(&mut self, pass: Pass, amount: u64, call: impl FnMut()) {
        self.all.insert(pass, amount as f64 / seconds(Duration::from_millis(100), call));
    }

    fn bytes(&self, shape: &[i64]) -> usize {
        shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }

    /// Tensors of one shape, in turn.
    fn ring<const N: usize>(&self, shape: &[i64]) -> Ring<[Tensor; N]> {
        Ring::new(N * self.bytes(shape), || std::array::from_fn(|_| filled(shape, self.kind)))
    }

    fn of_rows(&mut self, rank: &Rank, s: &Shape) {
        let (kind, wide) = (self.kind, (Kind::Float, Device::Cpu));
        let rows = [s.own as i64, rank.hidden() as i64];
        let bytes = self.bytes(&rows) as u64;
        let mut ring = self.ring::<2>(&rows);
        self.add(Pass::Copy, 3 * bytes, || {
            let [x, y] = ring.next();
            let _ = y.g_add_(x);
        });
        let mut ring = Ring::new(4 * (rows[0] * rows[1]) as usize, || filled(&rows, Kind::Float));
        // down and up again
        self.add(Pass::Cast, 12 * (rows[0] * rows[1]) as u64, || {
            let _ = ring.next().to_kind(Kind::BFloat16).to_kind(Kind::Float);
        });
        let weight = filled(&rows[1..], kind);
        let mut ring = self.ring::<1>(&rows);
        self.add(Pass::Norm, 3 * bytes, || {
            let [x] = ring.next();
            let _ = rms_norm::forward(x, &weight, 1e-5);
        });
        let mut ring = self.ring::<3>(&rows);
        let rstd = Tensor::ones([rows[0]], wide);
        self.add(Pass::NormBackward, 4 * bytes, || {
            let [grad, dy, x] = ring.next();
            let _ = rms_norm::backward(grad, dy, x, &weight, &rstd);
        });
        let (tokens, width) = (s.tokens as i64, (rank.arch.intermediate as u64 / rank.tp()) as i64);
        let out = self.bytes(&[tokens, width]) as u64;
        let mut ring = self.ring::<1>(&[tokens, 2 * width]);
        self.add(Pass::Activation, 3 * out, || {
            let [gate_up] = ring.next();
            let _ = swiglu::forward(gate_up);
        });
        let grad = filled(&[tokens, width], kind);
        self.add(Pass::ActivationBackward, 6 * out, || {
            let [gate_up] = ring.next();
            let _ = swiglu::backward(&grad, gate_up);
        });
    }

    fn of_attention(&mut self, rank: &Rank, s: &Shape) {
        let (kind, heads) = (self.kind, Heads::of(rank));
        let e = kind.elt_size_in_bytes() as u64;
        let (tokens, turned) = (s.tokens as i64, (heads.q + heads.kv) * heads.dim);
        let half = rank.arch.rope.dim / 2;
        let angles = Tensor::zeros([tokens, half], (Kind::Float, Device::Cpu));
        let mut ring = self.ring::<2>(&[tokens, heads.row() as i64]);
        self.add(Pass::Rotation, 2 * s.tokens * turned * e, || {
            let [qkv, _] = ring.next();
            rotary::rotate(qkv, (heads.q + heads.kv) as i64, heads.dim as i64, &angles, &angles, false);
        });
        let (groups, _) = cut_on_host(&s.spans);
        let Some(group) = groups.first() else { return };
        let share = (heads.q / heads.kv) as usize;
        let place = |first: u64, share| attention::Heads {
            row: heads.row() as usize,
            first: first as usize,
            kv_heads: heads.kv as usize,
            share,
            dim: heads.dim as usize,
        };
        let q_end = heads.q * heads.dim;
        let places = [(0, share), (q_end, 1), (q_end + heads.kv * heads.dim, 1)].map(|(at, share)| place(at, share));
        let amount = groups.iter().map(|group| Packed::new(group, heads, e)).map(|packed| 4 * packed.q + 4 * packed.kv);
        self.add(Pass::Packing, amount.sum(), || {
            let [qkv, out] = ring.next();
            for group in &groups {
                let [q, _, _] = places.map(|place| attention::pack(qkv, group, place, share));
                attention::unpack(&q, group, places[0], out);
            }
        });
        // a chunk comes out of a product and stays in the cache
        let packed = Packed::new(group, heads, e);
        let (chunk, rows, width) = (packed.chunk as i64, packed.rows as i64, packed.width as i64);
        let fresh = filled(&[chunk, rows, width], kind);
        let sight = Sight { window: None, scale: 0.125 };
        let (mut scores, mut grad, kv) = (fresh.copy(), fresh.copy(), heads.kv as usize);
        let amount = packed.chunk * packed.rows * packed.width;
        self.add(Pass::Scores, amount, || _ = attention::softmax(&mut scores, group, 0, kv, sight));
        let log_sums = attention::softmax(&mut scores, group, 0, kv, sight);
        self.add(Pass::ScoresBackward, amount, || {
            attention::probabilities(&mut scores, &log_sums, group, 0, kv, sight);
            grad.copy_(&fresh);
            attention::softmax_backward(&mut grad, &scores, 1.0);
        });
    }

    fn of_logits(&mut self, rank: &Rank, asked: i64) {
        let width = rank.table.vocab.end - rank.table.vocab.start;
        let most = rank.logits_bytes() as i64 / (width * self.kind.elt_size_in_bytes() as i64);
        let rows = asked.min(most).max(1);
        let target = Tensor::zeros([rows], (Kind::Int64, Device::Cpu));
        let ones = Tensor::ones([rows], (Kind::Float, Device::Cpu));
        let mut ring = self.ring::<1>(&[rows, width]);
        self.add(Pass::Logits, 2 * (rows * width) as u64, || {
            let [logits] = ring.next();
            let _ = softmax::statistics(logits, &target);
            softmax::gradient(logits, &ones, &ones, &target);
        });
    }

    fn of_optimizer(&mut self, config: &config::Optimizer) {
        const LEN: i64 = 1 << 22;
        // codes of blocks cost more where there is something to code
        let wide = || Tensor::randn([LEN], (Kind::Float, Device::Cpu));
        let (mut weights, grad) = (wide(), wide());
        let mut rounded = (self.kind != Kind::Float).then(|| Tensor::zeros([LEN], (self.kind, Device::Cpu)));
        let moment = |codes| Moment::zeros(Optimizer::storage(config), codes, LEN, Device::Cpu);
        let (mut first, mut second) = (moment(Codes::Signed), moment(Codes::Unsigned));
        let fresh = 2 * MAPPED as i64;
        self.add(Pass::Fresh, fresh as u64, || _ = Tensor::zeros([fresh], (Kind::Uint8, Device::Cpu)));
        self.add(Pass::Squares, 4 * LEN as u64, || _ = sum_of_squares(&grad));
        let momentum = config.momentum.unwrap_or(config::Optimizer::MOMENTUM);
        self.add(Pass::Optimizer, LEN as u64, || {
            let extras = Extras { copy: rounded.as_mut(), ..Extras::default() };
            match config.name {
                config::OptimizerName::Adamw => {
                    let numbers = AdamW { lr: 1e-5, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };
                    adamw(&mut weights, &grad, &mut first, &mut second, &numbers, extras);
                }
                config::OptimizerName::Sgd => {
                    let numbers = Sgd { lr: 1e-5, momentum, weight_decay: 0.0 };
                    sgd(&mut weights, &grad, (momentum > 0.0).then_some(&mut first), &numbers, extras);
                }
            }
        });
    }
}

/// As often on every rank: the others wait for each call.
fn time_call(call: &Call, group: &Group) -> f64 {
    const TIMES: usize = 5;
    let numbers = |bytes: u64| filled(&[(bytes.div_ceil(4) as usize).next_multiple_of(call.ranks) as i64], Kind::Float);
    let mut whole = numbers(call.bytes);
    let part = numbers(call.bytes / call.ranks as u64);
    let mut once = || match call.op {
        Op::AllReduce => group.all_reduce(&mut whole, Reduce::Max),
        Op::ReduceScatter => _ = group.reduce_scatter(&whole).wait(),
        Op::AllGather => _ = group.all_gather(&part),
        Op::Broadcast => group.broadcast(&mut whole, 0),
        Op::Barrier => group.barrier(),
    };
    once();
    middle((0..TIMES).map(|_| timed(&mut once)).collect())
}

/// Seconds of one call, the first left out where it is short: the median of 3, or of as many as `patience` allows up to 15.
fn seconds(patience: Duration, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut times = vec![timed(&mut call)];
    if start.elapsed() < patience {
        times.clear();
    }
    while times.len() < 3 || (start.elapsed() < patience && times.len() < 15) {
        times.push(timed(&mut call));
    }
    middle(times)
}

fn middle(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// With one thread its own clock is read, which stands still while neighbours have the core.
fn timed(call: &mut impl FnMut()) -> f64 {
    let (begin, used) = (Instant::now(), cpu_seconds());
    call();
    if tch::get_num_threads() == 1 { cpu_seconds() - used } else { begin.elapsed().as_secs_f64() }
}
