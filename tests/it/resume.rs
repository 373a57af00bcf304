//! Going on from a checkpoint gives what an uninterrupted run gives: bit for bit on the same layout, and within the tolerance of
//! layouts on another. With controls that must fail.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dunlearn::checkpoint::state::{StateFiles, What, write};
use dunlearn::checkpoint::store::FORMAT;
use dunlearn::checkpoint::{Manifest, Saved, StateFile, bytes_of};
use dunlearn::config;
use dunlearn::data::{Dataset, Order};
use dunlearn::dist::{World, run_threads};
use dunlearn::train::{Batches, Cuts, Trainer};
use tch::{Kind, Tensor};

use crate::layouts::{Case, Layout, ONE, Scope, SeedOne, architecture, boxes, case, right, samples, trainer, whole};
use crate::tiny;

const STEPS: usize = 12;

/// What a run that goes on leaves out, to see that the comparison notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forgotten {
    Nothing,
    DataPosition,
    Schedule,
    FirstMoment,
    SecondMoment,
    StepsOfTheOptimizer,
    /// The seed of the streams that order the data: a stream is a function of seed and position, there is nothing else to lose.
    RandomStreams,
}

fn batches<'a>(forget: &'a Dataset, retain: &'a Dataset, budget: usize, seed: u64) -> Batches<'a> {
    Batches {
        order: Order::new(seed, true, forget.samples.len(), retain.samples.len(), 4),
        anchors: forget,
        retain: Some(retain),
        cuts: Cuts::default(),
        budget,
    }
}

/// Runs from step `first`, with the state of `from` where that is given, and keeps the state after every step in `to`.
fn run(
    layout: Layout,
    case: Case,
    (first, from): (usize, Option<&Path>),
    to: Option<&Path>,
    forgotten: Forgotten,
) -> BTreeMap<String, Tensor> {
    let arch = architecture(case.tied);
    let (forget, retain) = (samples("forget", 7), samples("retain", 5));
    let said = run_threads(layout.tp, layout.dp, |world: World| {
        tch::no_grad(|| {
            let mut trainer: Trainer = trainer(layout, case, &arch, &world, right);
            let reference = SeedOne::new(&forget, &retain, &arch, &world, case.kind);
            let seed = if forgotten == Forgotten::RandomStreams { 4 } else { 3 };
            let batches = batches(&forget, &retain, layout.budget, seed);
            if let Some(from) = from {
                let files = StateFiles::open(files_in(from).iter().map(PathBuf::as_path)).unwrap();
                files.check_coverage().unwrap();
                let steps = if forgotten == Forgotten::StepsOfTheOptimizer { 0 } else { first };
                trainer.restore(&files, steps, &world).unwrap();
            }
            for step in first..STEPS {
                let data = if forgotten == Forgotten::DataPosition { step - first } else { step };
                let rate = if forgotten == Forgotten::Schedule { step - first } else { step };
                let work = batches.step(data, world.mesh);
                trainer.step(rate, &work, Some(&reference), &world).unwrap();
                if let Some(to) = to {
                    let folder = to.join(format!("{:02}", step + 1));
                    std::fs::create_dir_all(&folder).unwrap();
                    let path = folder.join(format!("{}.safetensors", world.mesh.rank));
                    let sizes: Vec<usize> = trainer.state_parts(world.mesh, true).map(|part| bytes_of(&part)).collect();
                    assert_eq!(trainer.state_sizes(world.mesh, true), sizes);
                    let mut slices = trainer.state(world.mesh, true);
                    slices.retain(|slice| match forgotten {
                        Forgotten::FirstMoment => slice.what != What::First,
                        Forgotten::SecondMoment => slice.what != What::Second,
                        _ => true,
                    });
                    write(&path, &slices).unwrap();
                }
            }
            boxes(&trainer, |id| trainer.parameters.weights.get(id).to_kind(Kind::Float))
        })
    });
    whole(said.iter().flatten())
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn at(folder: &Path, step: usize) -> PathBuf {
    folder.join(format!("{step:02}"))
}

fn same_bits(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> bool {
    a.keys().eq(b.keys()) && a.iter().all(|(name, tensor)| tensor.equal(&b[name]))
}

fn distance(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> f64 {
    b.iter().map(|(name, b)| tiny::relative(&a[name], b)).fold(0.0, |x, y| if x >= y { x } else { y })
}

fn cases() -> Vec<(&'static str, Case)> {
    let adamw = Case { steps: STEPS, ..case(false) };
    let sgd = Case { optimizer: config::OptimizerName::Sgd, ..adamw };
    let int8 = Case { state: config::StateDtype::Int8, ..adamw };
    let bf16 = Case { state: config::StateDtype::Bf16, kind: Kind::BFloat16, ..case(true) };
    vec![
        ("AdamW", adamw),
        ("SGD with momentum", sgd),
        ("8-bit moments", int8),
        ("8-bit moments inside backward", Case { in_backward: true, ..int8 }),
        ("bf16, tied", Case { steps: STEPS, ..bf16 }),
        ("adapters", Case { scope: Scope::Adapters, ..adamw }),
        ("a mask", Case { scope: Scope::Third, ..adamw }),
        ("a mask, SGD with momentum", Case { scope: Scope::Third, ..sgd }),
        ("a mask, 8-bit moments", Case { scope: Scope::Third, ..int8 }),
    ]
}

/// Interrupted after every one of 12 steps, with accumulation over micro-batches, on one rank and on 2 x 2.
#[test]
fn every_interruption_is_without_a_trace() {
    for (name, case) in cases() {
        for (tp, dp, zero) in [(1, 1, true), (2, 2, true), (1, 2, false)] {
            let layout = Layout { tp, dp, zero, budget: 60, bucket_elements: 3000, ..ONE };
            let folder = tempfile::tempdir().unwrap();
            let want = run(layout, case, (0, None), Some(folder.path()), Forgotten::Nothing);
            let steps = if tp * dp == 1 || name == "AdamW" { 1..STEPS } else { 5..7 };
            for step in steps {
                let from = at(folder.path(), step);
                let got = run(layout, case, (step, Some(&from)), None, Forgotten::Nothing);
                assert!(same_bits(&got, &want), "{name}, tp {tp} dp {dp}, interrupted after step {step}");
            }
        }
    }
}

/// A checkpoint of one layout continued on another.
#[test]
fn a_checkpoint_knows_no_layout() {
    for (name, case) in cases().into_iter().filter(|(_, case)| case.kind == Kind::Float) {
        let from = Layout { tp: 2, dp: 2, bucket_elements: 3000, ..ONE };
        let folder = tempfile::tempdir().unwrap();
        let want = run(from, case, (0, None), Some(folder.path()), Forgotten::Nothing);
        for (tp, dp, sequence_parallel, zero, bucket_elements) in
            [(1, 1, false, true, 1), (4, 1, true, true, 5000), (1, 4, false, true, 3000), (2, 3, false, false, 3000)]
        {
            let to = Layout { tp, dp, sequence_parallel, zero, bucket_elements, ..ONE };
            let got = run(to, case, (6, Some(&at(folder.path(), 6))), None, Forgotten::Nothing);
            // blocks of codes are cut anew where the layout cuts parameters elsewhere
            let tolerance = if case.state == config::StateDtype::Int8 { 2e-2 } else { 1e-4 };
            let found = distance(&got, &want);
            assert!(found < tolerance, "{name} on tp {tp} dp {dp}: {found:e}");
        }
    }
}

/// Controls: whatever a resume could leave out is noticed.
#[test]
fn what_is_left_out_shows() {
    // the schedule is constant in the other tests
    let case = Case { steps: STEPS, ..case(false) };
    let layout = Layout { bucket_elements: 3000, ..ONE };
    for forgotten in [
        Forgotten::DataPosition,
        Forgotten::Schedule,
        Forgotten::FirstMoment,
        Forgotten::SecondMoment,
        Forgotten::StepsOfTheOptimizer,
        Forgotten::RandomStreams,
    ] {
        let case = Case { falling: forgotten == Forgotten::Schedule, ..case };
        let folder = tempfile::tempdir().unwrap();
        let keep = match forgotten {
            Forgotten::FirstMoment | Forgotten::SecondMoment => forgotten,
            _ => Forgotten::Nothing,
        };
        let want = run(layout, case, (0, None), Some(folder.path()), keep);
        let got = run(layout, case, (5, Some(&at(folder.path(), 5))), None, forgotten);
        let found = distance(&got, &want);
        assert!(found > 1e-5, "{forgotten:?} left out is not noticed: {found:e}");
    }
}

/// Bytes changed at random in a state file: an error or a good read, never a panic. With the digest this is caught before; here the
/// reader is on its own.
#[test]
fn damaged_files_are_refused_without_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let case = Case { steps: STEPS, state: config::StateDtype::Int8, ..case(false) };
    run(ONE, case, (STEPS - 1, None), Some(folder.path()), Forgotten::Nothing);
    let path = files_in(&at(folder.path(), STEPS)).remove(0);
    let good = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let draw = dunlearn::model::init::Stream::new(17, "damage");
    let (mut refused, mut read) = (0, 0);
    for round in 0..400u64 {
        let mut bytes = good.clone();
        match round % 5 {
            0 => bytes.truncate((draw.bits(4 * round) % good.len() as u64) as usize),
            1 => {
                let at = (draw.bits(4 * round) % (header as u64 + 8)) as usize;
                bytes[at] ^= 1 << (draw.bits(4 * round + 1) % 8);
            }
            2 => {
                // one digit of the header becomes another
                let digits: Vec<usize> = (8..header + 8).filter(|&at| bytes[at].is_ascii_digit()).collect();
                let at = digits[(draw.bits(4 * round) % digits.len() as u64) as usize];
                bytes[at] = b'0' + (draw.bits(4 * round + 1) % 10) as u8;
            }
            3 => {
                // a number of the header becomes one that products overflow with; the header's length is kept right
                let text = String::from_utf8(bytes[8..header + 8].to_vec()).unwrap();
                let starts: Vec<usize> = (1..header)
                    .filter(|&at| {
                        text.as_bytes()[at].is_ascii_digit() && matches!(text.as_bytes()[at - 1], b'[' | b',' | b':')
                    })
                    .collect();
                let at = starts[(draw.bits(4 * round) % starts.len() as u64) as usize];
                let end = at + text[at..].bytes().take_while(u8::is_ascii_digit).count();
                let huge = [i64::MAX, 1 << 62, 1 << 61, 1 << 32][(draw.bits(4 * round + 1) % 4) as usize];
                let text = format!("{}{huge}{}", &text[..at], &text[end..]);
                let length = (text.len() as u64).to_le_bytes();
                bytes = [&length[..], text.as_bytes(), &bytes[header + 8..]].concat();
            }
            _ => bytes[..8].copy_from_slice(&draw.bits(4 * round).to_le_bytes()),
        }
        let damaged = folder.path().join("damaged.safetensors");
        std::fs::write(&damaged, &bytes).unwrap();
        let outcome = StateFiles::open([damaged.as_path()]).and_then(|files| {
            files.check_coverage()?;
            files.tensors().into_iter().try_for_each(|(name, shape)| files.weights(name, shape).map(drop))
        });
        match outcome {
            Err(error) => {
                assert!(error.to_string().contains("damaged.safetensors"), "{error}");
                refused += 1;
            }
            Ok(()) => read += 1,
        }
    }
    println!("{refused} refused, {read} read (changes of values or of padding)");
    assert!(refused > 250, "{refused}");
}

/// Lengths whose products overflow, in a file without any number of its own: its lists are empty, and so are all its bytes.
#[test]
fn a_run_that_no_memory_could_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.safetensors");
    for (shape, size, len, dtype) in [
        ("[4611686018427387904]", "[4611686018427387904]", 1i64 << 62, "F32"),
        ("[4611686018427387904,2]", "[1,1]", 1, "F32"),
        ("[9223372036854775807]", "[9223372036854775807]", i64::MAX, "BF16"),
    ] {
        let entry = format!(
            r#"[{{"key":"k","what":"weights","tensor":"w","shape":{shape},"offset":{offset},"size":{size},"start":0,"len":{len}}}]"#,
            offset = if shape.contains(',') { "[0,0]" } else { "[0]" },
        );
        let metadata = serde_json::json!({ "format": "dunlearn-state-1", "slices": entry });
        let header = serde_json::json!({
            "__metadata__": metadata, "k": { "dtype": dtype, "shape": [0], "data_offsets": [0, 0] }
        });
        let header = header.to_string();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        std::fs::write(&path, bytes).unwrap();
        let error = StateFiles::open([path.as_path()]).err().expect("refused").to_string();
        assert!(error.contains("huge.safetensors"), "{error}");
    }
}

/// Bytes of a manifest changed at random, and signed again: what is wrong is told, whatever it is.
#[test]
fn damaged_manifests_are_refused_without_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let file = StateFile { name: "rank_00000.safetensors".into(), bytes: 77, digest: "0".repeat(64) };
    let manifest = Manifest {
        format: FORMAT,
        dunlearn: "0.1.0".into(),
        step: 12,
        optimizer_steps: 12,
        config: serde_json::json!({ "run": { "seed": 1 } }),
        digests: [("model".to_owned(), "1".repeat(64))].into(),
        tp: 1,
        dp: 1,
        method: serde_json::Value::Null,
        files: vec![file],
    };
    let good = serde_json::to_string_pretty(&manifest).unwrap().into_bytes();
    let draw = dunlearn::model::init::Stream::new(18, "damage");
    let (mut refused, mut read) = (0, 0);
    for round in 0..400u64 {
        let mut bytes = good.clone();
        let at = (draw.bits(4 * round) % good.len() as u64) as usize;
        match round % 3 {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << (draw.bits(4 * round + 1) % 8),
            _ => bytes[at] = *b"\"{}[],:/.-9\0".get((draw.bits(4 * round + 1) % 12) as usize).unwrap(),
        }
        std::fs::write(folder.path().join("manifest.json"), &bytes).unwrap();
        std::fs::write(folder.path().join("COMPLETE"), blake3::hash(&bytes).to_hex().to_string()).unwrap();
        match Saved::open(folder.path()).and_then(|saved| saved.verify(0, 1)) {
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains(folder.path().to_str().unwrap()), "{error}");
                refused += 1;
            }
            Ok(()) => read += 1,
        }
    }
    // the state file is not there: nothing may pass
    assert_eq!((refused, read), (400, 0));
}
