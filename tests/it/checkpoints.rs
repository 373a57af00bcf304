//! Checkpoints as a user meets them: asked to stop, killed, moved to other ranks, damaged, out of room.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::program::{self, SHAPE, Workshop, dunlearn, mpirun};

const RUN: &str = r#"
[run]
dir = "{runs}/run"
timeout = 60
[model]
path = "{data}/model"
init = "random"
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[method]
objective = "npo"
retain = "kl"
[train]
steps = 12
global_batch = 4
precision = "f32"
[optimizer]
lr = 1e-3
[checkpoint]
every = 3
keep_last = 0
[eval]
every = 4
"#;

fn bytes(workshop: &Workshop, run: &str) -> Vec<u8> {
    std::fs::read(workshop.path(run).join("model/model.safetensors")).unwrap()
}

fn run_dir(workshop: &Workshop, run: &str) -> String {
    format!("run.dir={}", workshop.path(run).display())
}

/// A file `STOP`, SIGTERM to one rank, and a checkpoint that is gone on with: the same bytes and the same lines of metrics.
#[test]
fn asked_to_stop_a_run_goes_on_as_if_nothing_had_been() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let whole = run_dir(&workshop, "whole");
    let done = mpirun(2, &["--config", &config, "--set", &whole]);
    assert!(done.success, "{}", done.text);

    let again = run_dir(&workshop, "again");
    let arguments = ["--config", &config, "--set", &again];
    // a file: found after the first step
    std::fs::create_dir_all(workshop.path("again")).unwrap();
    std::fs::write(workshop.path("again/STOP"), "").unwrap();
    let done = mpirun(2, &arguments);
    assert_eq!(done.code, Some(75), "{}", done.text);
    assert!(done.text.contains("asked to stop: the state after step 1 of 12 is saved"), "{}", done.text);
    assert!(!workshop.path("again/STOP").exists() && !workshop.path("again/summary.json").exists());

    // a signal, to one rank in the middle
    let mut child = program::mpirun_command(2, &arguments).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let metrics = workshop.path("again/metrics.jsonl");
    let start = Instant::now();
    while !std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\"step\":3,")) {
        assert!(start.elapsed() < Duration::from_secs(60), "no third step");
        std::thread::sleep(Duration::from_millis(2));
    }
    signal("TERM", &again);
    let code = child.wait().unwrap().code();
    // the run may have been too fast for the signal
    if code != Some(0) {
        assert_eq!(code, Some(75));
        let done = mpirun(2, &arguments);
        assert!(done.success && done.text.contains("going on after step "), "{}", done.text);
    }
    assert_eq!(bytes(&workshop, "again"), bytes(&workshop, "whole"));
    let lines = |run: &str| -> Vec<(u64, String)> {
        let steps = workshop.steps(run).into_iter();
        steps.map(|line| (line["step"].as_u64().unwrap(), line["loss"].to_string())).collect()
    };
    assert_eq!(lines("again"), lines("whole"), "each step once, with the same loss");
    let (again, whole) = (workshop.summary("again"), workshop.summary("whole"));
    for set in ["forget", "retain"] {
        assert_eq!(again[set], whole[set], "evaluations before, during and after");
    }
}

/// A method's own state is in the checkpoint (PDU's dual variable), and what is not trained comes out of it as it was (RMU); on
/// another layout too.
#[test]
fn what_a_method_remembers_goes_on_too() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let pdu = ["objective=pdu", "retain=nll", "dual_start=0.5", "dual_rate=0.1", "dual_warmup=0", "retain_bound=1"];
    let rmu = [
        "objective=rmu",
        "retain=embedding",
        "layer=0",
        "steering=3",
        "update=[\"model.layers.*.mlp.down_proj.weight\"]",
    ];
    for (name, method) in [("pdu", &pdu[..]), ("rmu", &rmu)] {
        let set: Vec<String> = method.iter().map(|item| format!("method.{item}")).collect();
        let run = |dir: &str, tp: &str| {
            let dir = run_dir(&workshop, dir);
            let more = ["train.steps=4", "eval.every=0", "checkpoint.every=0", dir.as_str(), tp];
            let mut arguments = vec!["--config", config.as_str()];
            more.into_iter().chain(set.iter().map(String::as_str)).for_each(|item| arguments.extend(["--set", item]));
            mpirun(2, &arguments)
        };
        let (whole, again) = (format!("{name}_whole"), format!("{name}_again"));
        let done = run(&whole, "parallel.tp=2");
        assert!(done.success, "{}", done.text);
        std::fs::create_dir_all(workshop.path(&again)).unwrap();
        std::fs::write(workshop.path(&again).join("STOP"), "").unwrap();
        assert_eq!(run(&again, "parallel.tp=2").code, Some(75));
        let done = run(&again, "parallel.tp=2");
        assert!(done.success && done.text.contains("going on after step 1"), "{}", done.text);
        assert_eq!(bytes(&workshop, &again), bytes(&workshop, &whole), "{name}");
        let weights = |run: &str| -> Vec<String> {
            workshop.steps(run).iter().map(|line| line["retain_weight"].to_string()).collect()
        };
        assert_eq!(weights(&again), weights(&whole), "{name}");
        let moved = weights(&whole).windows(2).all(|pair| pair[0] != pair[1]);
        assert_eq!(moved, name == "pdu", "{:?}", weights(&whole));

        let other = format!("{name}_other");
        std::fs::create_dir_all(workshop.path(&other)).unwrap();
        std::fs::write(workshop.path(&other).join("STOP"), "").unwrap();
        assert_eq!(run(&other, "parallel.tp=2").code, Some(75));
        let done = run(&other, "parallel.tp=1");
        assert!(done.success, "{}", done.text);
        let loss = |run: &str| workshop.steps(run)[3]["loss"].as_f64().unwrap();
        assert!((loss(&other) / loss(&whole) - 1.0).abs() < 1e-4, "{name}: {} {}", loss(&other), loss(&whole));
    }
}

/// Adapters, masks and what is done before training: stopped twice and gone on with, the same bytes; moved to one rank, nearly; and the
/// checkpoint's own export is the run's.
#[test]
fn what_may_change_goes_on_too() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let start = run_dir(&workshop, "start");
    let done = dunlearn(&["--config", &config, "--set", &start, "--set", "train.steps=1", "--set", "optimizer.lr=0"]);
    assert!(done.success, "{}", done.text);
    let other = run_dir(&workshop, "other");
    let done =
        dunlearn(&["--config", &config, "--set", &other, "--set", "train.steps=2", "--set", "optimizer.lr=0.01"]);
    assert!(done.success, "{}", done.text);
    let model = format!("model.path={}", workshop.path("start/model").display());
    let other = format!("before.other={}", workshop.path("other/model").display());
    let cases: [(&str, &[&str]); 4] = [
        ("lora", &["scope.lora.r=4", "scope.lora.alpha=8"]),
        ("fila", &["scope.lora.r=4", "scope.lora.alpha=8", "scope.lora.init=fila"]),
        ("mask", &["scope.mask.score=gri", "scope.mask.fraction=0.2", "before.noise=0.01"]),
        ("blend", &["scope.tensors=[\"*.q_proj.weight\"]", "before.blend=0.3", &other]),
    ];
    for (name, scope) in cases {
        let run = |dir: &str, ranks: usize, tp: &str, more: &[&str]| {
            let dir = run_dir(&workshop, dir);
            let settings = [
                "train.steps=6",
                "eval.before=false",
                "eval.after=false",
                "eval.every=0",
                "method.retain=nll",
                "schedule.name=constant",
            ];
            let mut arguments = vec!["--config", config.as_str()];
            let all = settings.iter().chain(&["checkpoint.every=0", "model.init=pretrained"]).chain(scope).chain(more);
            all.copied().chain([model.as_str(), dir.as_str(), tp]).for_each(|item| arguments.extend(["--set", item]));
            if ranks == 1 { dunlearn(&arguments) } else { mpirun(ranks, &arguments) }
        };
        let stop = |dir: &str| {
            std::fs::create_dir_all(workshop.path(dir)).unwrap();
            std::fs::write(workshop.path(dir).join("STOP"), "").unwrap();
            let done = run(dir, 2, "parallel.tp=2", &[]);
            assert_eq!(done.code, Some(75), "{name}: {}", done.text);
        };
        let (whole, again, moved) = (format!("{name}_whole"), format!("{name}_again"), format!("{name}_moved"));
        let done = run(&whole, 2, "parallel.tp=2", &[]);
        assert!(done.success, "{name}: {}", done.text);
        stop(&again);
        stop(&again);
        let done = run(&again, 2, "parallel.tp=2", &["checkpoint.every=5"]);
        assert!(done.success && done.text.contains("going on after step 2"), "{name}: {}", done.text);
        assert_eq!(bytes(&workshop, &again), bytes(&workshop, &whole), "{name}");
        assert_eq!(workshop.summary(&again)["steps"], 6);
        stop(&moved);
        let done = run(&moved, 1, "parallel.tp=1", &[]);
        assert!(done.success, "{name}: {}", done.text);
        let loss = |run: &str| workshop.steps(run)[5]["loss"].as_f64().unwrap();
        assert!((loss(&moved) / loss(&whole) - 1.0).abs() < 1e-4, "{name}: {} {}", loss(&moved), loss(&whole));
        // the model of the checkpoint after step 5, by three ranks and by one, is that of a run of five steps
        let short = format!("{name}_short");
        let done = run(&short, 2, "parallel.tp=2", &["train.steps=5"]);
        assert!(done.success, "{name}: {}", done.text);
        let folder = workshop.path(&again).display().to_string();
        let out = workshop.path(&format!("{name}_model")).display().to_string();
        let done = dunlearn(&["export", &folder, "--step", "5", "--out", &out]);
        assert!(done.success, "{name}: {}", done.text);
        assert!(same_files(Path::new(&out), &workshop.path(&short).join("model")), "{name}");
        for (out, ranks) in [("one", 1), ("three", 3)] {
            let out = workshop.path(&format!("{name}_{out}")).display().to_string();
            let arguments = ["export", &folder, "--step", "5", "--out", &out, "--max-shard-size", "20kB"];
            let done = if ranks == 1 { dunlearn(&arguments) } else { mpirun(ranks, &arguments) };
            assert!(done.success, "{name}: {}", done.text);
        }
        assert!(same_files(&workshop.path(&format!("{name}_one")), &workshop.path(&format!("{name}_three"))), "{name}");
        if name == "mask" {
            // another mask is another run
            let path = workshop.path(&again).join("mask.safetensors");
            std::fs::remove_file(workshop.path(&again).join("summary.json")).unwrap();
            let mut mask = std::fs::read(&path).unwrap();
            let last = mask.len() - 1;
            mask[last] ^= 1;
            std::fs::write(&path, mask).unwrap();
            let done = run(&again, 2, "parallel.tp=2", &["checkpoint.every=5"]);
            assert!(
                !done.success && done.text.contains("scope.mask: the checkpoint was made with digest"),
                "{}",
                done.text
            );
        }
        if name == "lora" {
            // what was not trained comes from the model that was read, and from no other
            let weights = workshop.path("start/model/model.safetensors");
            let good = std::fs::read(&weights).unwrap();
            let mut bad = good.clone();
            let last = bad.len() - 2;
            bad[last] ^= 1;
            std::fs::write(&weights, bad).unwrap();
            let out = workshop.path("from_another").display().to_string();
            let done = dunlearn(&["export", &folder, "--step", "5", "--out", &out]);
            std::fs::write(&weights, good).unwrap();
            assert!(!done.success && done.text.contains("but that is another model now"), "{}", done.text);
        }
    }
}

/// The same names with the same bytes.
fn same_files(a: &Path, b: &Path) -> bool {
    let all = |folder: &Path| {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> =
            entries.map(|path| (path.file_name().unwrap().to_owned(), std::fs::read(&path).unwrap())).collect();
        files.sort();
        files
    };
    all(a) == all(b)
}

/// Ended after the export and before the summary, and between the pieces of a checkpoint's replacement: the same command goes on.
#[test]
fn no_moment_to_end_is_a_bad_one() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let set = ["--set", "train.steps=4", "--set", "checkpoint.every=1", "--set", "eval.every=0"];
    let run = |more: &[&str]| dunlearn(&[&["--config", config.as_str()][..], &set, more].concat());
    assert!(!run(&["--fault", "kill@end:0"]).success);
    let model = workshop.path("run/model/model.safetensors");
    let first = std::fs::read(&model).unwrap();
    assert!(!workshop.path("run/summary.json").exists());
    // the newest stands aside for another that never came
    let at = |name: &str| workshop.path("run/checkpoints").join(name);
    std::fs::rename(at("step_000003"), at("step_000003.replaced")).unwrap();
    std::fs::create_dir(at("step_000003.partial")).unwrap();
    let done = run(&[]);
    assert!(done.success && done.text.contains("going on after step 3"), "{}", done.text);
    assert!(done.text.contains("step_000003 is back"), "{}", done.text);
    assert_eq!(std::fs::read(&model).unwrap(), first);
    let summary = workshop.summary("run");
    let tokens: u64 = workshop.steps("run").iter().map(|line| line["tokens"].as_u64().unwrap()).sum();
    let told = summary["tokens_per_s"].as_f64().unwrap() * summary["training_seconds"].as_f64().unwrap();
    assert!((told - tokens as f64).abs() < 1.0, "all steps' tokens are counted, those before too: {told} {tokens}");
}

/// Moments that were not saved start anew, and that is said.
#[test]
fn a_checkpoint_without_the_optimizer_is_no_secret() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let run = || {
        let set = ["--set", "checkpoint.save_optimizer=false", "--set", "train.steps=4", "--set", "eval.every=0"];
        dunlearn(&[&["--config", config.as_str()][..], &set].concat())
    };
    std::fs::create_dir_all(workshop.path("run")).unwrap();
    std::fs::write(workshop.path("run/STOP"), "").unwrap();
    assert_eq!(run().code, Some(75));
    let done = run();
    assert!(done.success && done.text.contains("its moments and their count start anew"), "{}", done.text);
}

/// Sends a signal to the first process of the binary that runs with an argument.
fn signal(name: &str, argument: &str) {
    for process in ranks_with(argument).into_iter().take(1) {
        let _ = std::process::Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status();
    }
}

fn ranks_with(argument: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|number| {
            let line = std::fs::read_to_string(format!("/proc/{number}/cmdline")).unwrap_or_default();
            line.starts_with(env!("CARGO_BIN_EXE_dunlearn")) && line.contains(argument)
        })
        .collect()
}

/// A rank killed at random moments until the run is through: anywhere, as soon as a save is open, and inside `dunlearn export`. No
/// checkpoint is ever unreadable, and the end is that of the undisturbed run. `launch/soak` does the same for longer.
#[test]
fn killed_at_random_it_still_ends_at_the_same_weights() {
    let rounds = std::env::var("DUNLEARN_SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    let seed = std::env::var("DUNLEARN_SOAK_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let every_step = ["--set", "checkpoint.every=1"];
    let whole = run_dir(&workshop, "whole");
    let done = mpirun(2, &[&["--config", &config, "--set", &whole][..], &every_step].concat());
    assert!(done.success, "{}", done.text);
    let seconds = done.seconds;
    let (mut kills, mut ends) = (0, 0);
    let (mut in_saves, mut exports, mut in_exports) = (0, 0, 0);
    let draw = dunlearn::model::init::Stream::new(seed, "kills");
    while kills < rounds {
        let run = format!("run{ends}");
        let dir = run_dir(&workshop, &run);
        let checkpoints = workshop.path(&run).join("checkpoints");
        let share = (draw.bits(2 * kills) >> 40) as f64 / f64::from(1 << 24);
        let which = draw.bits(2 * kills + 1);
        let has_checkpoint =
            |run: &str| names(&workshop.path(run).join("checkpoints")).iter().any(|name| !name.contains('.'));
        let newest = (0..=ends).rev().map(|i| format!("run{i}")).find(|run| has_checkpoint(run));
        if let Some(newest) = newest.filter(|_| kills % 4 == 3) {
            exports += 1;
            in_exports += u64::from(export_killed(&workshop, &newest, share, which));
            kills += 1;
            continue;
        }
        let arguments = [&["--config", &config, "--set", &dir][..], &every_step].concat();
        let mut child =
            program::mpirun_command(2, &arguments).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        if kills % 4 == 2 {
            // as soon as a save is open, or some milliseconds later
            let start = Instant::now();
            let open = || names(&checkpoints).iter().any(|name| name.ends_with(".partial"));
            while !open() && start.elapsed().as_secs_f64() < 2.0 * seconds && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_micros(200));
            }
            in_saves += u64::from(open());
            std::thread::sleep(Duration::from_secs_f64(0.01 * share));
        } else {
            // a moment between the start and the end of an undisturbed run
            std::thread::sleep(Duration::from_secs_f64(0.3 + share * seconds));
        }
        kill_one(&dir, which);
        kills += 1;
        let status = child.wait().unwrap();
        if std::fs::read_dir(&checkpoints).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| !entry.file_name().to_string_lossy().ends_with(".partial")))
        }) {
            let done = dunlearn(&["checkpoint", "verify", workshop.path(&run).to_str().unwrap()]);
            assert!(done.success, "after kill {kills}: {}", done.text);
        }
        if status.success() || workshop.path(&run).join("summary.json").exists() {
            assert_eq!(bytes(&workshop, &run), bytes(&workshop, "whole"), "after kill {kills}");
            ends += 1;
        }
    }
    // the last one is led to its end
    let run = format!("run{ends}");
    let dir = run_dir(&workshop, &run);
    let done = mpirun(2, &[&["--config", &config, "--set", &dir][..], &every_step].concat());
    assert!(done.success, "{}", done.text);
    assert_eq!(bytes(&workshop, &run), bytes(&workshop, "whole"));
    println!(
        "{kills} kills ({in_saves} while a save was open, {in_exports} of {exports} aimed at exports inside one), {} runs to their end, all at the same weights",
        ends + 1
    );
}

/// Kills one rank of `dunlearn export` and exports again: what has its final name is whole, and the second time it is all there. Gives
/// whether the first was hit before its end.
fn export_killed(workshop: &Workshop, run: &str, share: f64, which: u64) -> bool {
    let folder = workshop.path(run).display().to_string();
    let out = |name: &str| workshop.path(&format!("export_{which}_{name}"));
    let (good, killed) = (out("good"), out("killed"));
    // in many files, each of them synchronised: an export that takes its time
    let small = ["--max-shard-size", "20KB"];
    let whole = dunlearn(&[&["export", &folder, "--out", good.to_str().unwrap()][..], &small].concat());
    assert!(whole.success, "{}", whole.text);
    let arguments = [&["export", folder.as_str(), "--out", killed.to_str().unwrap()][..], &small].concat();
    let mut child = program::mpirun_command(2, &arguments).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    // as soon as its folder is open, or some milliseconds later
    let open = killed.with_extension("partial");
    while !open.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    std::thread::sleep(Duration::from_secs_f64(0.02 * share));
    kill_one(killed.to_str().unwrap(), which);
    child.wait().unwrap();
    let hit = !killed.exists();
    if hit {
        let done = mpirun(2, &arguments);
        assert!(done.success, "{}", done.text);
    }
    assert!(same_files(&good, &killed), "an export after a kill");
    hit
}

/// Kills one of the ranks that run with an argument, if there are any.
fn kill_one(argument: &str, which: u64) {
    let ranks = ranks_with(argument);
    if !ranks.is_empty() {
        let victim = ranks[(which % ranks.len() as u64) as usize];
        let _ = std::process::Command::new("kill").args(["-KILL", &victim.to_string()]).status();
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The model of a checkpoint, written by one process or by several, is the one that the run exports; other ranks go on from it.
#[test]
fn a_checkpoint_becomes_a_model_and_moves_to_other_ranks() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let done = mpirun(4, &["--config", &config, "--set", "parallel.tp=2", "--set", "checkpoint.every=1"]);
    assert!(done.success, "{}", done.text);
    let run = workshop.path("run");
    let run = run.to_str().unwrap();
    let listed = dunlearn(&["checkpoint", "ls", run]);
    assert!(listed.text.contains("tp 2 x dp 2"), "{}", listed.text);
    // a run that stops at step 6 exports what the checkpoint after step 6 holds
    let short = run_dir(&workshop, "short");
    let halves = ["--set", "train.steps=6", "--set", "schedule.name=constant"];
    let constant = run_dir(&workshop, "constant");
    let long = ["--config", &config, "--set", &constant, "--set", "schedule.name=constant", "--set", "parallel.tp=2"];
    assert!(mpirun(2, &long).success);
    let done = mpirun(2, &[&["--config", &config, "--set", &short, "--set", "parallel.tp=2"][..], &halves].concat());
    assert!(done.success, "{}", done.text);
    let (one, three) = (workshop.path("one"), workshop.path("three"));
    let from = workshop.path("constant");
    let export = |out: &Path| -> Vec<String> {
        ["export", from.to_str().unwrap(), "--step", "6", "--out", out.to_str().unwrap()].map(str::to_owned).to_vec()
    };
    let arguments = export(&one);
    let done = dunlearn(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(done.success, "{}", done.text);
    let arguments = export(&three);
    assert!(mpirun(3, &arguments.iter().map(String::as_str).collect::<Vec<_>>()).success);
    let weights = |folder: &PathBuf| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert_eq!(weights(&one), weights(&three));
    assert_eq!(weights(&one), bytes(&workshop, "short"));

    // 2 x 2 continued on one rank
    let moved = workshop.path("moved");
    std::fs::create_dir_all(moved.join("checkpoints")).unwrap();
    for name in ["config.toml", "metrics.jsonl"] {
        std::fs::copy(workshop.path("run").join(name), moved.join(name)).unwrap();
    }
    let step = "checkpoints/step_000006";
    std::fs::create_dir_all(moved.join(step)).unwrap();
    for entry in std::fs::read_dir(workshop.path("run").join(step)).unwrap().flatten() {
        std::fs::copy(entry.path(), moved.join(step).join(entry.file_name())).unwrap();
    }
    let done = dunlearn(&["--config", &config, "--set", &run_dir(&workshop, "moved")]);
    assert!(done.success && done.text.contains("going on after step 6"), "{}", done.text);
    let loss = |run: &str| workshop.steps(run)[11]["loss"].as_f64().unwrap();
    assert!((loss("moved") / loss("run") - 1.0).abs() < 1e-4);
}

/// Every kind of damage is told with the file; so is a checkpoint of something else, with the first difference.
#[test]
fn what_does_not_belong_is_refused() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    std::fs::create_dir_all(workshop.path("run")).unwrap();
    std::fs::write(workshop.path("run/STOP"), "").unwrap();
    let done = mpirun(2, &["--config", &config]);
    assert_eq!(done.code, Some(75), "{}", done.text);
    let step = workshop.path("run/checkpoints/step_000001");
    let files: Vec<(PathBuf, Vec<u8>)> = std::fs::read_dir(&step)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
        .collect();
    let of = |name: &str| files.iter().find(|(path, _)| path.ends_with(name)).unwrap().clone();
    let heal = || files.iter().for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
    let refused = |what: &str, expected: &[&str]| {
        let done = dunlearn(&["--config", &config]);
        assert_eq!(done.code, Some(2), "{what}: {}", done.text);
        for word in expected {
            assert!(done.text.contains(word), "{what}: {word} is not in {}", done.text);
        }
        assert!(!done.text.contains("panicked"), "{what}: {}", done.text);
        heal();
    };
    let (first, second) = (of("rank_00000.safetensors"), of("rank_00001.safetensors"));
    for (path, bytes) in [&first, &second] {
        let name = path.file_name().unwrap().to_str().unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 8]).unwrap();
        refused("cut", &[name, "the manifest says"]);
        let mut flipped = bytes.clone();
        let at = bytes.len() - 5;
        flipped[at] ^= 4;
        std::fs::write(path, flipped).unwrap();
        refused("one bit", &[name, "was changed: its digest is"]);
        std::fs::remove_file(path).unwrap();
        refused("deleted", &[name, "No such file"]);
        let mut long = bytes.clone();
        long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(path, long).unwrap();
        refused("header longer than the file", &[name]);
    }
    std::fs::write(&first.0, &second.1).unwrap();
    std::fs::write(&second.0, &first.1).unwrap();
    refused("swapped", &["rank_0000"]);
    let manifest = of("manifest.json");
    let text = String::from_utf8(manifest.1.clone()).unwrap();
    std::fs::write(&manifest.0, text.replace("rank_00001", "../../../x")).unwrap();
    refused("a name that leads out", &["manifest.json", "was changed"]);
    let path = of("COMPLETE").0;
    let led_out = text.replace("rank_00001.safetensors", "../x.safetensors");
    std::fs::write(&manifest.0, &led_out).unwrap();
    std::fs::write(&path, dunlearn_digest(&led_out)).unwrap();
    refused("a name that leads out, signed", &["\"../x.safetensors\"; expected a file name without a folder"]);
    std::fs::remove_file(&path).unwrap();
    refused("no sign of completeness", &["COMPLETE", "No such file", "move the folder away"]);

    // what only reads a checkpoint refuses damage too
    let mut flipped = first.1.clone();
    let at = flipped.len() - 5;
    flipped[at] ^= 4;
    std::fs::write(&first.0, flipped).unwrap();
    let (run, out) = (workshop.path("run").display().to_string(), workshop.path("out").display().to_string());
    let step_text = step.display().to_string();
    for arguments in [
        &["export", &run, "--out", &out][..],
        &["checkpoint", "verify", &run],
        &["checkpoint", "diff", &step_text, &step_text],
    ] {
        let done = dunlearn(arguments);
        assert!(!done.success, "{arguments:?}: {}", done.text);
        assert!(done.text.contains("rank_00000.safetensors: was changed: its digest is"), "{}", done.text);
    }
    assert!(!workshop.path("out").exists());
    heal();
    // names in a model's index
    let led = workshop.path("led");
    std::fs::create_dir_all(&led).unwrap();
    for entry in std::fs::read_dir(workshop.path("data/model")).unwrap().flatten() {
        std::fs::copy(entry.path(), led.join(entry.file_name())).unwrap();
    }
    for name in ["../model.safetensors", "/etc/model.safetensors", "..", "sub/model.safetensors"] {
        let index = serde_json::json!({ "weight_map": { "model.norm.weight": name } }).to_string();
        std::fs::write(led.join("model.safetensors.index.json"), index).unwrap();
        let (led, new) = (format!("model.path={}", led.display()), run_dir(&workshop, "led_run"));
        let arguments = ["--config", &config, "--set", &led, "--set", &new, "--set", "model.init=pretrained"];
        let done = dunlearn(&arguments);
        assert_eq!(done.code, Some(2), "{name}: {}", done.text);
        let words = format!("names the weight file {name:?}; expected a file name without a folder");
        assert!(done.text.contains("model.safetensors.index.json") && done.text.contains(&words), "{}", done.text);
    }

    let other = |set: &[&str]| {
        let arguments: Vec<&str> =
            ["--config", &config].into_iter().chain(set.iter().flat_map(|s| ["--set", s])).collect();
        dunlearn(&arguments).text
    };
    let folder = || {
        ["config.toml", "metrics.jsonl", "status.json"]
            .map(|name| std::fs::read(workshop.path("run").join(name)).unwrap())
    };
    let before = folder();
    let text = other(&["optimizer.lr=0.5"]);
    assert!(folder() == before, "a refusal leaves the run as it was");
    assert!(text.contains("optimizer.lr: the checkpoint was made with 0.001, this configuration says 0.5"), "{text}");
    assert!(text.contains("--force-resume"), "{text}");
    let text = other(&["run.seed=4"]);
    assert!(text.contains("run.seed: the checkpoint was made with"), "{text}");
    let data = workshop.path("data/retain.jsonl").display().to_string();
    let text = other(&[&format!("data.forget.path={data}"), "method.retain=none", "method.objective=ga"]);
    assert!(text.contains("data.forget: the checkpoint was made with digest"), "{text}");
    let forced = dunlearn(&[
        "--config",
        &config,
        "--force-resume",
        "--set",
        "optimizer.lr=2e-3",
        "--set",
        "method.beta=0.2",
        "--set",
        "run.seed=4",
    ]);
    assert!(forced.text.contains("model: the checkpoint was made with digest"), "a random start: {}", forced.text);
    let metrics = std::fs::read_to_string(workshop.path("run/metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"force_resume\":[\"method.beta: "), "{metrics}");
    assert!(forced.text.contains("method.beta: the checkpoint was made with"), "every difference: {}", forced.text);
    assert!(forced.success && forced.text.contains("--force-resume: "), "{}", forced.text);
    assert!(forced.text.contains("optimizer.lr: the checkpoint was made with"), "{}", forced.text);
    let text = dunlearn(&["--config", &config, "--overwrite", "--set", "checkpoint.resume=must"]).text;
    assert!(!text.contains("must"), "--overwrite starts anew: {text}");
    let nowhere = run_dir(&workshop, "nowhere");
    let text = other(&[&nowhere, "checkpoint.resume=must"]);
    assert!(text.contains("has no complete checkpoint to go on from"), "{text}");
}

fn dunlearn_digest(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

/// No room, or no leave to write: the run ends at the edge of a step with path and bytes, and the older checkpoint is whole.
#[test]
fn a_full_disk_loses_nothing() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let arguments = ["--config", &config, "--set", "checkpoint.every=1"];
    std::fs::create_dir_all(workshop.path("run")).unwrap();
    std::fs::write(workshop.path("run/STOP"), "").unwrap();
    assert_eq!(mpirun(2, &arguments).code, Some(75));
    let verified = || {
        let done = dunlearn(&["checkpoint", "verify", workshop.path("run").to_str().unwrap()]);
        assert!(done.success && done.text.contains("step_000001: 2 files"), "{}", done.text);
    };
    // a rank that fails just before a save
    let folder = workshop.path("run/checkpoints");
    let done = mpirun(2, &[&arguments[..], &["--fault", "error@save:1"]].concat());
    assert!(!done.success && done.text.contains("injected error in phase Save"), "{}", done.text);
    verified();

    // a file system with room for one checkpoint and a half
    let size: u64 =
        std::fs::read_dir(folder.join("step_000001")).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    let aside = workshop.path("aside");
    std::fs::rename(&folder, &aside).unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    let command = |program: &str, arguments: &[&str]| {
        let status = std::process::Command::new(program).args(arguments).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    let room = format!("size={}", size * 3 / 2 + 40_000);
    if !command("mount", &["-t", "tmpfs", "-o", &room, "tmpfs", folder.to_str().unwrap()]) {
        return println!("skipped the small file system: no leave to mount one");
    }
    let copied = command("cp", &["-r", aside.join("step_000001").to_str().unwrap(), folder.to_str().unwrap()]);
    let done = mpirun(2, &arguments);
    let whole = std::panic::catch_unwind(std::panic::AssertUnwindSafe(verified));
    command("umount", &[folder.to_str().unwrap()]);
    assert!(copied && !done.success, "{}", done.text);
    for word in ["saving, rank ", "No space left on device", " bytes to save; ", " bytes are free there"] {
        assert!(done.text.contains(word), "{word}: {}", done.text);
    }
    let told = done.text.split(" bytes are free there").next().and_then(|text| text.rsplit(' ').next());
    let free: u64 = told.unwrap().parse().unwrap();
    assert!(free < size, "of the small file system, which is full: {}", done.text);
    whole.unwrap();

    // a file system that is only read; and, for those who may write everywhere, a file where the folder should be
    assert!(command("mount", &["-t", "tmpfs", "-o", &room, "tmpfs", folder.to_str().unwrap()]));
    command("cp", &["-r", aside.join("step_000001").to_str().unwrap(), folder.to_str().unwrap()]);
    let read_only = command("mount", &["-o", "remount,ro", folder.to_str().unwrap()]);
    let done = mpirun(2, &arguments);
    let whole = std::panic::catch_unwind(std::panic::AssertUnwindSafe(verified));
    command("umount", &[folder.to_str().unwrap()]);
    assert!(read_only && !done.success, "{}", done.text);
    for word in ["saving, rank 0: ", "Read-only file system", "step_000002.partial", " bytes are free there"] {
        assert!(done.text.contains(word), "{word}: {}", done.text);
    }
    assert!(!done.text.contains("this rank has 0 bytes"), "{}", done.text);
    whole.unwrap();
}

/// A run that was killed before its first checkpoint starts anew when it is started again, and only then: nothing tells two runs apart
/// but their configuration.
#[test]
fn what_left_no_checkpoint_starts_anew() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let dir = run_dir(&workshop, "run");
    let start = |more: &[&str]| {
        dunlearn(&[&["--config", &config, "--set", &dir, "--set", "checkpoint.every=5"][..], more].concat())
    };
    let killed = start(&["--fault", "kill@step.3:0"]);
    assert!(!killed.success, "{}", killed.text);
    assert!(names(&workshop.path("run").join("checkpoints")).is_empty());
    let other = start(&["--set", "optimizer.lr=0.5"]);
    assert!(!other.success && other.text.contains("holds a run that stopped after"), "{}", other.text);
    let done = start(&[]);
    assert!(done.success, "{}", done.text);
    let whole = run_dir(&workshop, "whole");
    let undisturbed = dunlearn(&["--config", &config, "--set", &whole, "--set", "checkpoint.every=5"]);
    assert!(undisturbed.success, "{}", undisturbed.text);
    assert_eq!(bytes(&workshop, "run"), bytes(&workshop, "whole"));
}
