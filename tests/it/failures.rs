//! What a user sees when something is wrong: one message that says where, on any rank, and an end within seconds.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::program::{self, SHAPE, Workshop, dunlearn, mpirun};

const RUN: &str = r#"
[run]
dir = "{runs}/run"
timeout = 4
[model]
path = "{data}/model"
init = "random"
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[method]
objective = "ga"
retain = "nll"
[train]
steps = 3
global_batch = 4
precision = "f32"
[optimizer]
lr = 1e-3
"#;

/// Ranks whose launcher was killed outright do not stay behind.
#[test]
fn ranks_end_with_their_launcher() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let arguments = ["--config", &config, "--fault", "hang@step:1", "--set", "run.timeout=600"];
    let mut launcher = program::mpirun_command(2, &arguments).stderr(Stdio::null()).spawn().unwrap();
    within(60, "both ranks at work", || ranks_of(&config).len() == 2 && workshop.path("run/metrics.jsonl").exists());
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    within(10, "no rank left", || ranks_of(&config).is_empty());
}

/// Processes of the binary that run this configuration.
fn ranks_of(config: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| std::fs::read_to_string(process.path().join("cmdline")).ok());
    lines.filter(|line| line.starts_with(env!("CARGO_BIN_EXE_dunlearn")) && line.contains(config)).collect()
}

fn within(seconds: u64, what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(seconds), "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// An error that all ranks find is told once.
#[test]
fn a_common_error_is_told_once() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", &RUN.replace("objective", "objektive"));
    let done = mpirun(4, &["--config", &config]);
    assert_eq!(done.text.matches("did you mean `objective`?").count(), 1, "{}", done.text);
    assert_eq!(done.code, Some(2));
}

/// One line for each mistake: what was found, where, and what to write.
#[test]
fn mistakes_are_explained() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let model = workshop.path("data/model");
    let refused = |set: &[&str]| {
        let arguments: Vec<&str> =
            ["--config", &config].into_iter().chain(set.iter().flat_map(|s| ["--set", s])).collect();
        let done = dunlearn(&arguments);
        assert_eq!(done.code, Some(2), "{}", done.text);
        assert!(!done.text.contains("panicked") && !done.text.contains("backtrace"), "{}", done.text);
        done.text
    };
    for (set, expected) in [
        (&["parallel.tp=2"][..], "start it with `mpirun -n 2`"),
        (&["run.device=cuda"], "run.device = \"cuda\": "),
        (&["model.path=nowhere"], "cannot read nowhere/config.json: No such file or directory (os error 2)\n"),
        (&["model.init=pretrained"], "has no weights: expected model.safetensors"),
        (&["data.forget.path=nowhere.jsonl"], "nowhere.jsonl"),
        (&["data.forget.kind=text"], "no field \"text\""),
        (&["train.steps=0"], "train.steps: is 0"),
        (
            &["train.grad_dtype=bf16", "train.micro_batch_tokens=64", "train.global_batch=8"],
            "holds one micro-batch a step, step 1 has ",
        ),
        (&["optimizer.lr=fast"], "`lr = \"fast\"`: invalid type: string \"fast\", expected a number"),
    ] {
        let text = refused(set);
        assert!(text.contains(expected), "{set:?}: {text}");
    }
    // forget and retain are the same file
    let same = format!("data.retain.path={}", workshop.path("data/forget.jsonl").display());
    assert!(refused(&[&same]).contains("nothing would be forgotten"));

    // weights that do not fit list everything that is wrong
    let checkpoint = workshop.path("other");
    std::fs::create_dir(&checkpoint).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model.join(file), checkpoint.join(file)).unwrap();
    }
    let wrong = tch::Tensor::zeros([3, 5], (tch::Kind::Float, tch::Device::Cpu));
    let tensors = [("model.norm.weight", &wrong), ("model.layers.9.mlp.down_proj.weight", &wrong)];
    tch::Tensor::write_safetensors(&tensors, checkpoint.join("model.safetensors")).unwrap();
    let path = format!("model.path={}", checkpoint.display());
    let text = refused(&[&path, "model.init=pretrained"]);
    for expected in [
        "missing      model.layers.0.self_attn.q_proj.weight [32, 32]",
        "wrong shape  model.norm.weight: found [3, 5], expected [32]",
        "unexpected   model.layers.9.mlp.down_proj.weight [3, 5]",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    // a truncated file is no panic
    let bytes = std::fs::read(checkpoint.join("model.safetensors")).unwrap();
    std::fs::write(checkpoint.join("model.safetensors"), &bytes[..bytes.len() - 8]).unwrap();
    assert!(refused(&[&path, "model.init=pretrained"]).contains("model.safetensors"));

    // an architecture that is not built is named with key and value
    let text = std::fs::read_to_string(model.join("config.json")).unwrap();
    for (from, to, expected) in [
        ("\"llama\"", "\"gpt2\"", "model_type = \"gpt2\" is not supported"),
        ("\"silu\"", "\"gelu\"", "hidden_act = \"gelu\" is not supported"),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(checkpoint.join("config.json"), text.replace(from, to)).unwrap();
        let said = refused(&[&path]);
        assert!(said.contains(expected), "{said}");
    }
}

/// A run that diverges stops with rank, tensor and step, before it writes anything.
#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let set = ["optimizer.lr=1e30", "optimizer.max_grad_norm=0", "train.steps=20"];
    let arguments: Vec<&str> = ["--config", &config].into_iter().chain(set.iter().flat_map(|s| ["--set", s])).collect();
    let done = mpirun(2, &arguments);
    assert_eq!(done.code, Some(2), "{}", done.text);
    assert!(done.text.contains("error: step ") && done.text.contains("lower optimizer.lr"), "{}", done.text);
    assert!(!workshop.path("run/model").exists());
}

/// Nothing is written over by accident: neither a run, finished or not, nor files that no run has written, nor the model
/// that is read.
#[test]
fn what_is_there_is_kept() {
    let workshop = Workshop::new(&[SHAPE, &["--weights"]].concat());
    let config = workshop.config("run.toml", RUN);
    let start = |extra: &[&str]| dunlearn(&[&["--config", &config][..], extra].concat());
    assert!(start(&[]).success);
    let again = start(&[]);
    assert!(!again.success && again.text.contains("holds a finished run"), "{}", again.text);
    // a mistake in the new run's inputs leaves the old run alone, --overwrite or not
    let summary = std::fs::read(workshop.path("run/summary.json")).unwrap();
    assert!(!start(&["--overwrite", "--set", "data.forget.path=nowhere.jsonl"]).success);
    assert_eq!(std::fs::read(workshop.path("run/summary.json")).unwrap(), summary);
    assert!(workshop.path("run/model/model.safetensors").exists());
    assert!(start(&["--overwrite"]).success);

    assert!(!start(&["--overwrite", "--fault", "error@export:0"]).success);
    assert!(!workshop.path("run/model").exists() && !workshop.path("run/summary.json").exists());
    let stopped = start(&[]);
    assert!(stopped.text.contains("holds a run that stopped after 3 steps"), "{}", stopped.text);

    // a folder with a user's own files of the same names
    for (name, is_folder) in [("logs", true), ("config.toml", false), ("model", true)] {
        let folder = workshop.path(&format!("mine_{name}"));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join(name);
        if is_folder { std::fs::create_dir(&path) } else { std::fs::write(&path, RUN) }.unwrap();
        let refused = start(&["--overwrite", "--set", &format!("run.dir={}", folder.display())]);
        assert!(refused.text.contains(&format!("{name} exists and was not written by a run")), "{}", refused.text);
        assert!(path.exists());
    }

    // the model that is read stands where the run would write its own
    let source = workshop.path("data/model");
    let refused = start(&["--overwrite", "--set", &format!("run.dir={}", workshop.path("data").display())]);
    assert!(refused.text.contains("over the one that it reads"), "{}", refused.text);
    assert!(source.join("model.safetensors").exists());
}

/// Weights that the last step broke are not exported as if nothing had happened.
#[test]
fn a_last_step_into_nothing_is_noticed() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let set = ["optimizer.lr=1e30", "optimizer.weight_decay=1e30", "train.steps=1", "schedule.name=constant"];
    let arguments: Vec<&str> = ["--config", &config].into_iter().chain(set.iter().flat_map(|s| ["--set", s])).collect();
    let done = dunlearn(&arguments);
    assert_eq!(done.code, Some(2), "{}", done.text);
    assert!(done.text.contains("step 1: weights on 1 ranks are no numbers"), "{}", done.text);
    assert!(!workshop.path("run/model").exists());
}
