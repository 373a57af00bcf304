//! The kernels' own sources, run on the host thread by thread, against the CPU kernels of this room (which have their own
//! tests against autograd). Every case runs with threads in both orders, which must agree to the bit, on tensors with and
//! without alignment, each surrounded by NaN that must neither be read nor written.

use std::sync::OnceLock;

use super::*;
use crate::abi::emulator::Compiled;
use crate::abi::slices::bytes;
use crate::abi::tests::{is_behind_fake_driver, rerun_behind_fake_driver};
use crate::kernels::moment::{Codes, Moment, Storage};
use crate::kernels::optimizer::{AdamW, AdamWFactors, Extras, Sgd};
use crate::kernels::{self as cpu};

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

fn compiled() -> &'static Compiled {
    static COMPILED: OnceLock<Compiled> = OnceLock::new();
    COMPILED.get_or_init(|| {
        let mut text = include_str!("emulator.h").to_owned() + &source();
        text += "namespace emulator {\n\
            template <> inline char letter(bf16**) { return 'B'; }\n\
            template <> inline char letter(const bf16**) { return 'B'; }\n";
        for (index, name) in names().iter().enumerate() {
            text += &format!("static const int added{index} = add(\"{name}\", {name});\n");
        }
        text += "}\n";
        let folder = tempfile::tempdir().unwrap();
        Compiled::new(&text, folder.path()).unwrap_or_else(|error| panic!("{error}"))
    })
}

/// Runs `outputs` in both orders of threads, with and without alignment; gives its tensors for each alignment.
fn each_way(outputs: impl Fn(&Launcher, &dyn Fn(&Tensor) -> Tensor) -> Vec<Tensor>) -> [Vec<Tensor>; 2] {
    [0, 1].map(|offset| {
        let [forwards, backwards] = [false, true].map(|reverse| {
            let on = Launcher::Emulator(Emulator::new(compiled(), reverse, offset));
            let Launcher::Emulator(emulator) = &on else { unreachable!() };
            let outputs = outputs(&on, &|tensor| emulator.guard(tensor));
            emulator.check_guards();
            outputs
        });
        for (a, b) in forwards.iter().zip(&backwards) {
            assert!(bytes(a) == bytes(b), "the result depends on the order of threads");
        }
        forwards
    })
}

/// f32: within a few units in the last place of the largest. bf16: the neighbouring number at worst, and seldom.
fn close(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!((got.size(), got.kind()), (want.size(), want.kind()), "{what}");
    if got.numel() == 0 {
        return;
    }
    let (a, b) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let (error, largest) = ((&a - &b).abs(), b.abs().max());
    let number = |t: Tensor| f64::try_from(t).unwrap();
    if got.kind() == Kind::BFloat16 {
        let beyond = &error - b.abs() / 128.0 - &largest * 1e-5;
        assert!(number(beyond.max()) <= 0.0, "{what}: {}", number(error.max()));
        let differ = number(error.gt(0.0).to_kind(Kind::Double).mean(Kind::Double));
        assert!(differ < 0.01 || got.numel() < 200, "{what}: {differ} of all differ");
    } else {
        let error = number(error.max()) / number(largest).max(1e-30);
        assert!(error < 3e-6, "{what}: {error:e}");
    }
}

fn randn(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

#[test]
fn rms_norm() {
    tch::manual_seed(21);
    let cases = [(0, 8), (1, 1), (5, 7), (37, 128), (20, 129), (9, 512), (3, 520), (37, 1000), (2, 4104)];
    for kind in KINDS {
        // more than 8192 rows give the blocks of backward more than 16 rows each
        let long = (kind == Kind::Float).then_some((8200, 8));
        for (rows, width) in cases.into_iter().chain(long) {
            let what = format!("{kind:?} {rows}x{width}");
            let (x, dy, before) =
                (randn(&[rows, width], kind), randn(&[rows, width], kind), randn(&[rows, width], kind));
            let weight = randn(&[width], kind);
            let (y, rstd) = cpu::rms_norm::forward(&x, &weight, 1e-5);
            let mut grad = before.copy();
            let dweight = cpu::rms_norm::backward(&mut grad, &dy, &x, &weight, &rstd);
            let want = [&y, &rstd, &y, &grad, &dweight];
            for got in each_way(|on, guard| {
                let (x, weight, dy, mut grad) = (guard(&x), guard(&weight), guard(&dy), guard(&before));
                let (y, rstd) = super::rms_norm::forward(on, &x, &weight, 1e-5);
                let again = super::rms_norm::apply(on, &x, &weight, &rstd);
                let dweight = super::rms_norm::backward(on, &mut grad, &dy, &x, &weight, &rstd);
                vec![y, rstd, again, grad, dweight]
            }) {
                for ((got, want), name) in got.iter().zip(want).zip(["y", "rstd", "apply", "grad", "dweight"]) {
                    close(got, want, &format!("{what} {name}"));
                }
            }
        }
    }
}

#[test]
fn rotary() {
    tch::manual_seed(22);
    // rows, width, heads, head_dim, half
    let cases = [(0, 8, 1, 8, 4), (1, 2, 1, 2, 1), (9, 40, 3, 10, 4), (37, 320, 4, 64, 32), (5, 96, 1, 96, 24)];
    for kind in KINDS {
        for (rows, width, heads, head_dim, half) in cases {
            let x = randn(&[rows, width], kind);
            let angle = Tensor::rand([rows, half], (Kind::Float, Device::Cpu)) * 6.0;
            let (cos, sin) = (angle.cos(), angle.sin());
            for inverse in [false, true] {
                let mut want = x.copy();
                cpu::rotary::rotate(&mut want, heads, head_dim, &cos, &sin, inverse);
                for got in each_way(|on, guard| {
                    let mut x = guard(&x);
                    super::rotary::rotate(on, &mut x, heads, head_dim, &guard(&cos), &guard(&sin), inverse);
                    vec![x]
                }) {
                    close(&got[0], &want, &format!("{kind:?} {rows}x{width}"));
                }
            }
        }
    }
}

#[test]
fn swiglu() {
    tch::manual_seed(23);
    for kind in KINDS {
        for (rows, width) in [(0, 8), (1, 1), (5, 7), (37, 129), (20, 1000), (2, 4104)] {
            let (gate_up, grad) = (randn(&[rows, 2 * width], kind) * 3.0, randn(&[rows, width], kind));
            let out = cpu::swiglu::forward(&gate_up);
            let (d_gate_up, activation) = cpu::swiglu::backward(&grad, &gate_up);
            for got in each_way(|on, guard| {
                let (gate_up, grad) = (guard(&gate_up), guard(&grad));
                let (d_gate_up, activation) = super::swiglu::backward(on, &grad, &gate_up);
                vec![super::swiglu::forward(on, &gate_up), d_gate_up, activation]
            }) {
                for (got, want) in got.iter().zip([&out, &d_gate_up, &activation]) {
                    close(got, want, &format!("{kind:?} {rows}x{width}"));
                }
            }
        }
    }
}

#[test]
fn softmax() {
    tch::manual_seed(24);
    for kind in KINDS {
        for (rows, width) in [(0, 8), (1, 1), (5, 7), (23, 129), (9, 1000), (3, 8200)] {
            let what = format!("{kind:?} {rows}x{width}");
            let (z, reference) = (randn(&[rows, width], kind) * 4.0, randn(&[rows, width], kind) * 4.0);
            let target = Tensor::randint_low(-1, width, [rows], (Kind::Int64, Device::Cpu));
            let weight = randn(&[rows], Kind::Float);
            let stats = cpu::softmax::statistics(&z, &target);
            let log_sum = stats.select(1, 0) + stats.select(1, 1).log();
            let ref_stats = cpu::softmax::statistics(&reference, &target);
            let ref_log_sum = ref_stats.select(1, 0) + ref_stats.select(1, 1).log();
            let cross = cpu::softmax::cross_difference(&z, &reference, &ref_log_sum);
            let (mut gradient, mut divergence) = (z.copy(), z.copy());
            cpu::softmax::gradient(&mut gradient, &log_sum, &weight, &target);
            cpu::softmax::divergence_gradient(&mut divergence, &log_sum, &reference, &ref_log_sum, &weight);
            for got in each_way(|on, guard| {
                let (target, weight, reference) = (guard(&target), guard(&weight), guard(&reference));
                let (log_sum, ref_log_sum) = (guard(&log_sum), guard(&ref_log_sum));
                let (z, mut gradient, mut divergence) = (guard(&z), guard(&z), guard(&z));
                super::softmax::gradient(on, &mut gradient, &log_sum, &weight, &target);
                super::softmax::divergence_gradient(on, &mut divergence, &log_sum, &reference, &ref_log_sum, &weight);
                let cross = super::softmax::cross_difference(on, &z, &reference, &ref_log_sum);
                vec![super::softmax::statistics(on, &z, &target), cross, gradient, divergence]
            }) {
                for column in 0..4 {
                    close(&got[0].select(1, column), &stats.select(1, column), &format!("{what} statistic {column}"));
                }
                for ((got, want), name) in
                    got[1..].iter().zip([&cross, &gradient, &divergence]).zip(["cross", "g", "d"])
                {
                    close(got, want, &format!("{what} {name}"));
                }
            }
        }
    }
}

/// Infinities, NaN and equal maxima: what a row of logits may hold when a run goes wrong.
#[test]
fn softmax_statistics_of_odd_rows() {
    let width = 300;
    let rows = |kind| {
        let z = Tensor::full([5, width], -3.0, (Kind::Float, Device::Cpu));
        let _ = z.get(0).narrow(0, 4, 280).fill_(f64::NEG_INFINITY); // most are impossible
        let _ = z.get(1).fill_(f64::NEG_INFINITY); // all are
        let _ = z.get(2).get(77).fill_(f64::NAN);
        let _ = z.get(3).narrow(0, 130, 9).fill_(2.0); // nine equal maxima
        let _ = z.get(4).get(299).fill_(f64::INFINITY);
        z.to_kind(kind)
    };
    let target = Tensor::from_slice(&[0i64, 0, 5, 130, -1]);
    for kind in KINDS {
        let z = rows(kind);
        for got in each_way(|on, guard| vec![super::softmax::statistics(on, &guard(&z), &guard(&target))]) {
            let at = |row, column| got[0].double_value(&[row, column]);
            assert_eq!((at(0, 0), at(0, 2), at(0, 3)), (-3.0, -3.0, 0.0));
            assert!((at(0, 1) - 20.0).abs() < 1e-5, "{}", at(0, 1));
            assert!(at(1, 1).is_nan() && at(2, 1).is_nan() && at(4, 1).is_nan(), "{:?}", got[0]);
            assert_eq!((at(3, 0), at(3, 2), at(3, 3), at(4, 2), at(4, 3)), (2.0, 2.0, 130.0, 0.0, 299.0));
        }
    }
}

#[test]
fn sum_of_squares() {
    tch::manual_seed(25);
    for kind in KINDS {
        for len in [0, 1, 7, 1000, 65_536, 140_003] {
            let x = randn(&[len], kind);
            let want = cpu::reduce::sum_of_squares(&x).double_value(&[0]);
            for got in each_way(|on, guard| vec![super::reduce::sum_of_squares(on, &guard(&x))]) {
                let got = f64::try_from(&got[0]).unwrap();
                assert!((got - want).abs() <= 1e-13 * want, "{kind:?} {len}: {got} {want}");
            }
        }
    }
}

const STORAGES: [Storage; 3] = [Storage::F32, Storage::Bf16, Storage::Block8];

fn guarded(moment: &Moment, guard: &dyn Fn(&Tensor) -> Tensor) -> Moment {
    Moment { values: guard(&moment.values), scales: moment.scales.as_ref().map(guard), codes: moment.codes }
}

fn copied(moment: &Moment) -> Moment {
    guarded(moment, &Tensor::copy)
}

fn tensors(moment: Moment) -> impl Iterator<Item = Tensor> {
    std::iter::once(moment.values).chain(moment.scales)
}

/// Two steps by the CPU kernel and by the CUDA kernel: the same bits, codes and scales included.
#[test]
fn adamw() {
    tch::manual_seed(26);
    for (kind, grad_kind) in [(Kind::Float, Kind::Float), (Kind::Float, Kind::BFloat16), (Kind::BFloat16, Kind::Float)]
    {
        for (storage1, storage2) in STORAGES.iter().flat_map(|a| STORAGES.map(|b| (*a, b))) {
            for len in [1, 255, 256, 3000] {
                let what = format!("{kind:?} {grad_kind:?} {storage1:?} {storage2:?} {len}");
                let (weights, grads) = (randn(&[len], kind), [randn(&[len], grad_kind), randn(&[len], grad_kind)]);
                let first = Moment::zeros(storage1, Codes::Signed, len, Device::Cpu);
                let second = Moment::zeros(storage2, Codes::Unsigned, len, Device::Cpu);
                let copy = Tensor::zeros([len], (Kind::BFloat16, Device::Cpu));
                let (scale, zero, one) = (Tensor::from(0.5f32), Tensor::from(0.0f32), Tensor::from(1.0f32));
                let hyper = |step| AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step };

                let (mut w, mut m, mut v, mut c) = (weights.copy(), copied(&first), copied(&second), copy.copy());
                for (grad, step) in grads.iter().zip(1..) {
                    let extras = Extras { scale: Some(&scale), skip: Some(&zero), copy: Some(&mut c) };
                    cpu::optimizer::adamw(&mut w, grad, &mut m, &mut v, &hyper(step), extras);
                }
                let want: Vec<Tensor> = [w, c].into_iter().chain(tensors(m)).chain(tensors(v)).collect();
                for got in each_way(|on, guard| {
                    let (mut w, mut c, scale, zero) = (guard(&weights), guard(&copy), guard(&scale), guard(&zero));
                    let (mut m, mut v) = (guarded(&first, guard), guarded(&second, guard));
                    for (step, skip) in [(1, &zero), (9, &guard(&one)), (2, &zero)] {
                        let grad = guard(&grads[usize::from(step == 2)]);
                        let extras = Extras { scale: Some(&scale), skip: Some(skip), copy: Some(&mut c) };
                        let factors = AdamWFactors::from(&hyper(step));
                        super::optimizer::adamw(on, &mut w, &grad, &mut m, &mut v, &factors, extras);
                    }
                    [w, c].into_iter().chain(tensors(m)).chain(tensors(v)).collect()
                }) {
                    assert_eq!(got.len(), want.len());
                    for (index, (got, want)) in got.iter().zip(&want).enumerate() {
                        assert!(bytes(got) == bytes(want), "{what}: output {index}");
                    }
                }
            }
        }
    }
}

#[test]
fn sgd() {
    tch::manual_seed(27);
    let storages = [None, Some(Storage::F32), Some(Storage::Bf16), Some(Storage::Block8)];
    for (kind, grad_kind, storage) in KINDS.iter().flat_map(|k| storages.map(|s| (*k, Kind::Float, s))) {
        let len = 700;
        let (weights, grad) = (randn(&[len], kind), randn(&[len], grad_kind));
        let first = storage.map(|storage| Moment::zeros(storage, Codes::Signed, len, Device::Cpu));
        let by = Sgd { lr: 0.1, momentum: if first.is_some() { 0.9 } else { 0.0 }, weight_decay: 0.01 };
        let (mut w, mut m) = (weights.copy(), first.as_ref().map(copied));
        for _ in 0..2 {
            cpu::optimizer::sgd(&mut w, &grad, m.as_mut(), &by, Extras::default());
        }
        let want: Vec<Tensor> = std::iter::once(w).chain(m.into_iter().flat_map(tensors)).collect();
        for got in each_way(|on, guard| {
            let (mut w, mut m, grad) = (guard(&weights), first.as_ref().map(|m| guarded(m, guard)), guard(&grad));
            for _ in 0..2 {
                super::optimizer::sgd(on, &mut w, &grad, m.as_mut(), &by, Extras::default());
            }
            std::iter::once(w).chain(m.into_iter().flat_map(tensors)).collect()
        }) {
            for (got, want) in got.iter().zip(&want) {
                assert!(bytes(got) == bytes(want), "{kind:?} {storage:?}");
            }
        }
    }
}

/// The comparison can fail: arguments in the wrong order, a wrong type, a write beside a tensor, threads that do not meet.
#[test]
fn the_emulator_catches_mistakes() {
    let refusal = |run: &dyn Fn(&Launcher)| {
        let on = Launcher::Emulator(Emulator::new(compiled(), false, 0));
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(&on);
            let Launcher::Emulator(emulator) = &on else { unreachable!() };
            emulator.check_guards();
        }));
        *caught.expect_err("a mistake that nobody saw").downcast::<String>().unwrap()
    };
    let x = randn(&[4, 40], Kind::Float);
    let grid = Grid { blocks: 4, threads: 32, shared: 0 };
    let direct = |on: &Launcher, kernel: &str, arguments: &[Argument]| {
        let Launcher::Emulator(emulator) = on else { unreachable!() };
        emulator.launch(kernel, grid, arguments);
    };
    let half = x.to_kind(Kind::BFloat16);
    let table = refusal(&|on| {
        on.launch("swiglu_forward<T>", &[Kind::Float], grid, &[(&x).into(), (&half).into(), 20i64.into()]);
    });
    assert!(table.contains("swiglu_forward<T> for [Float] takes TTi"), "{table}");
    let short = refusal(&|on| {
        let _ = super::rms_norm::forward(on, &x, &x.get(0).narrow(0, 0, 39), 1e-5);
    });
    assert!(short.contains("40 elements, got [39]"), "{short}");
    let swapped = refusal(&|on| direct(on, "swiglu_forward<float>", &[(&x).into(), 20i64.into(), (&x).into()]));
    assert!(swapped.contains("takes FFi, got FiF"), "{swapped}");
    let wide = refusal(&|on| direct(on, "swiglu_forward<bf16>", &[(&x).into(), (&x).into(), 20i64.into()]));
    assert!(wide.contains("takes BBi, got FFi"), "{wide}");
    let few = refusal(&|on| direct(on, "swiglu_forward<float>", &[(&x).into(), (&x).into()]));
    assert!(few.contains("got FF"), "{few}");
    let beside = refusal(&|on| {
        let out = on.empty(&[4, 19], Kind::Float, &x);
        direct(on, "swiglu_forward<float>", &[(&x).into(), (&out).into(), 20i64.into()]);
    });
    assert!(beside.contains("wrote beside a tensor of 76 elements"), "{beside}");
    let strided = refusal(&|on| {
        let _ = super::swiglu::forward(on, &x.narrow(1, 0, 20));
    });
    assert!(strided.contains("contiguous"), "{strided}");
    let shared = refusal(&|on| {
        let sums = Tensor::zeros([1, 40], (Kind::Float, Device::Cpu));
        let grid = Grid { blocks: 1, threads: 32, shared: 39 * 4 };
        let (x, one) = ((&x).into(), 1i64.into());
        let arguments = [x, x, x, x, x, (&sums).into(), one, 40i64.into(), one, 0i64.into()];
        on.launch("rms_norm_backward<T>", &[Kind::Float], grid, &arguments);
    });
    assert!(shared.contains("shared memory overrun"), "{shared}");
}

/// From the sources to functions of a module, with a driver that has no GPU.
#[test]
fn loading_finds_every_kernel() {
    if !is_behind_fake_driver() {
        rerun_behind_fake_driver("kernels::cuda::tests::loading_finds_every_kernel");
        return;
    }
    let error = load(7).unwrap_err().to_string();
    assert_eq!(error, "CUDA device 7 does not exist; this process sees 2");
    match load(0) {
        Ok(line) => {
            assert!(line.starts_with("32 kernels for sm_90 by ") && line.contains("libnvrtc.so.1"), "{line}");
            assert_eq!(load(1), Err(Error::OtherDevice { loaded: 0, device: 1 }));
        }
        Err(error) => assert!(error.to_string().contains("no run-time compiler"), "{error}"),
    }
}

/// The run-time compiler takes the sources for the devices in use, without a register spilled to memory.
#[test]
#[expect(clippy::print_stderr, reason = "a test that does not run says why")]
fn nvrtc_compiles_every_kernel() {
    let compiler = match Nvrtc::open(&nvrtc::candidates()) {
        Ok(compiler) => compiler,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let names = names();
    for (capability, architecture) in [((8, 0), "sm_80"), ((9, 0), "sm_90")] {
        let image = compiler.compile(&source(), &names, capability, &["--ptxas-options=-v"]).unwrap();
        assert_eq!((image.architecture.as_str(), image.names.len()), (architecture, names.len()));
        assert!(image.bytes.starts_with(b"\x7fELF"), "machine code");
        let spills: Vec<&str> = image.log.lines().filter(|line| line.contains("spill stores")).collect();
        assert_eq!(spills.len(), names.len(), "{}", image.log);
        assert!(spills.iter().all(|line| line.contains(" 0 bytes spill stores")), "{}", image.log);
    }
    let newer = compiler.compile("__global__ void nothing() {}", &["nothing".to_owned()], (99, 0), &[]).unwrap();
    assert!(newer.architecture.starts_with("compute_") && newer.bytes.ends_with(b"\0"), "{}", newer.architecture);
    let error = compiler.compile("__global__ void broken() { oops; }", &[], (9, 0), &[]).unwrap_err().to_string();
    assert!(error.contains("dunlearn.cu(1)") && error.contains("oops"), "{error}");
    let error = compiler.compile("", &[], (3, 5), &[]).unwrap_err().to_string();
    assert!(error.contains("as old as compute capability 3.5"), "{error}");
}
