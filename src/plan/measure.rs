//! The machine at hand: times of the very products that a step has, and rates of its passes over memory. Medians, seconds in all.

use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::machine::{Base, Measured};
use super::tally::{Pass, Product};
use crate::abi::host::{cpu_seconds, resident_bytes};
use crate::config::Precision;
use crate::kernels::moment::{Codes, Moment, Storage};
use crate::kernels::optimizer::{AdamW, Extras, adamw};
use crate::kernels::{rms_norm, softmax, swiglu};

/// Times of `products`, cut where they are large, in at most about `patience`.
pub fn measure(products: impl Iterator<Item = Product>, precision: Precision, patience: Duration) -> Measured {
    let kind = kind(precision);
    let mut measured = Measured { passes: passes(kind), ..Measured::default() };
    let (mut operations, mut seconds) = (0.0, 0.0);
    let products: Vec<Product> = products.filter(|product| product.columns > 1).collect();
    let each = patience.div_f64(products.len().max(1) as f64);
    for product in products {
        // large ones run at the rate of their upper left part
        let cut = |n: u64| n.min(4096);
        let part = Product {
            rows: cut(product.rows),
            inner: cut(product.inner),
            columns: cut(product.columns),
            batch: product.batch,
        };
        let time = median(each, multiply(part, kind));
        operations += part.operations();
        seconds += time;
        measured.products.insert(product, time * product.operations() / part.operations());
    }
    measured.rate = if seconds > 0.0 { operations / seconds } else { 1e11 };
    measured
}

/// What this process takes besides tensors: libraries, code and threads once libtorch has multiplied in the kind at hand, and what
/// each further size of a product adds.
pub fn base(precision: Precision) -> Base {
    let random = |rows: i64| Tensor::randn([rows, 512], (Kind::Float, Device::Cpu)).to_kind(kind(precision));
    let (x, w) = (random(1024), random(1024));
    let out = Tensor::zeros([1024, 1024], (kind(precision), Device::Cpu));
    let multiply = |rows: i64| _ = x.narrow(0, 0, rows).mm_out(&out.narrow(0, 0, rows), &w.tr());
    multiply(1024);
    passes_once(&x);
    let process = resident_bytes();
    const MORE: i64 = 12;
    (1..=MORE).for_each(|i| multiply(1024 - 8 * i));
    let product = resident_bytes().saturating_sub(process) / MORE as u64;
    drop((x, w, out));
    Base { process: resident_bytes().saturating_sub(MORE as u64 * product), product }
}

/// Touches the code of the passes.
fn passes_once(x: &Tensor) {
    let (rows, width) = x.size2().expect("invariant: a matrix");
    let weight = x.narrow(0, 0, 1).view([width]).contiguous();
    let (y, _) = rms_norm::forward(x, &weight, 1e-5);
    let _ = swiglu::forward(&y);
    let _ = softmax::statistics(&y, &Tensor::zeros([rows], (Kind::Int64, Device::Cpu)));
}

fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Bf16 => Kind::BFloat16,
        Precision::F32 => Kind::Float,
    }
}

fn multiply(Product { rows, inner, columns, batch }: Product, kind: Kind) -> impl FnMut() {
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
    let (rows, inner, columns, batch) = (rows as i64, inner as i64, columns as i64, batch as i64);
    let (a, b) = match batch {
        1 => (random(&[rows, inner]), random(&[columns, inner])),
        _ => (random(&[batch, rows, inner]), random(&[batch, columns, inner])),
    };
    move || _ = a.matmul(&b.transpose(-1, -2))
}

fn passes(kind: Kind) -> [f64; 3] {
    let patience = Duration::from_millis(150);
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
    let e = kind.elt_size_in_bytes() as f64;
    let (rows, width) = (512i64, 2048i64);
    let (x, weight) = (random(&[rows, width]), random(&[width]));
    let norm = median(patience, || _ = rms_norm::forward(&x, &weight, 1e-5));
    let gate = median(patience, || _ = swiglu::forward(&x));
    let chain = (rows * width) as f64 * e * (3.0 + 1.5) / (norm + gate);
    let (mut logits, target) = (random(&[256, 8192]), Tensor::zeros([256], (Kind::Int64, Device::Cpu)));
    let row = Tensor::ones([256], (Kind::Float, Device::Cpu));
    let read = median(patience, || _ = softmax::statistics(&logits, &target));
    let write = median(patience, || softmax::gradient(&mut logits, &row, &row, &target));
    let exponentials = 2.0 * (256 * 8192) as f64 / (read + write);
    let len = 1i64 << 22;
    let wide = |n: i64| Tensor::zeros([n], (Kind::Float, Device::Cpu));
    let (mut weights, grad, mut copy) = (wide(len), wide(len), random(&[len]).to_kind(Kind::BFloat16));
    let moment = |codes| Moment::zeros(Storage::F32, codes, len, Device::Cpu);
    let (mut first, mut second) = (moment(Codes::Signed), moment(Codes::Unsigned));
    let numbers = AdamW { lr: 1e-5, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };
    let update = median(patience, || {
        let extras = Extras { copy: (kind == Kind::BFloat16).then_some(&mut copy), ..Extras::default() };
        adamw(&mut weights, &grad, &mut first, &mut second, &numbers, extras);
    });
    let mut rates = [0.0; 3];
    rates[Pass::Chain as usize] = chain;
    rates[Pass::Exponentials as usize] = exponentials;
    rates[Pass::Optimizer as usize] = len as f64 / update;
    rates
}

/// Seconds of one call, the first left out: the median of 3 or of as many as `patience` allows up to 15.
///
/// With one thread its own clock is read, which stands still while neighbours have the core.
fn median(patience: Duration, mut call: impl FnMut()) -> f64 {
    call();
    let alone = tch::get_num_threads() == 1;
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < 3 || (start.elapsed() < patience && times.len() < 15) {
        let (begin, used) = (Instant::now(), cpu_seconds());
        call();
        times.push(if alone { cpu_seconds() - used } else { begin.elapsed().as_secs_f64() });
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
