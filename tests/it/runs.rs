//! Whole runs of the binary: a model that forgets, on several ranks, and what a run leaves behind.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use tch::Tensor;

use crate::program::{Workshop, dunlearn, mpirun, number};
use crate::tiny;

const SMALL: &[&str] = &[
    "--authors",
    "10",
    "--questions",
    "6",
    "--vocab",
    "512",
    "--hidden",
    "64",
    "--layers",
    "2",
    "--intermediate",
    "160",
];

const TRAIN: &str = r#"
[run]
dir = "{runs}/base"
[model]
path = "{data}/model"
init = "random"
[data]
train = { path = "{data}/full.jsonl", kind = "qa" }
[method]
objective = "finetune"
[train]
epochs = 60
global_batch = 10
precision = "f32"
[optimizer]
lr = 5e-3
[schedule]
name = "cosine"
warmup = 0.05
[eval]
before = false
"#;

const NPO: &str = r#"
[run]
dir = "{runs}/npo"
[model]
path = "{runs}/base/model"
[parallel]
tp = 2
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[method]
objective = "npo"
retain = "nll"
[train]
steps = 30
global_batch = 3
precision = "f32"
[optimizer]
lr = 1e-3
"#;

/// A workshop with a model that has memorised its authors, made once.
pub fn trained() -> &'static Workshop {
    static WORKSHOP: OnceLock<Workshop> = OnceLock::new();
    WORKSHOP.get_or_init(|| {
        let workshop = Workshop::new(SMALL);
        let config = workshop.config("train.toml", TRAIN);
        let done = dunlearn(&["--config", &config]);
        assert!(done.success, "{}", done.text);
        assert!(number(&workshop.summary("base"), "train.after.probability") > 0.9, "{}", done.text);
        workshop
    })
}

/// Starts a variant of the NPO run in its own folder.
fn npo(workshop: &Workshop, name: &str, ranks: usize, set: &[&str]) -> crate::program::Finished {
    let config = workshop.config(&format!("{name}.toml"), &NPO.replace("/npo\"", &format!("/{name}\"")));
    let mut arguments = vec!["--config", config.as_str()];
    for item in set {
        arguments.extend(["--set", item]);
    }
    let done = mpirun(ranks, &arguments);
    assert!(done.success, "{}", done.text);
    done
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    tiny::read(&path.join("model.safetensors"))
}

/// The numbers of the quickstart at a smaller size: what is to be kept is kept, what is to be forgotten is forgotten, and
/// gradient ascent for as many steps destroys both.
#[test]
fn npo_on_four_ranks_forgets_and_keeps() {
    let workshop = trained();
    npo(workshop, "npo", 4, &[]);
    npo(workshop, "ga", 4, &["method.objective=ga", "method.retain=none"]);
    let (npo, ga) = (workshop.summary("npo"), workshop.summary("ga"));
    let kept = |summary: &serde_json::Value, set: &str| {
        number(summary, &format!("{set}.after.probability")) / number(summary, &format!("{set}.before.probability"))
    };
    println!(
        "npo: forget {:.4} retain {:.4}; ga: forget {:.4} retain {:.4}",
        kept(&npo, "forget"),
        kept(&npo, "retain"),
        kept(&ga, "forget"),
        kept(&ga, "retain")
    );
    assert!(kept(&npo, "forget") < 0.2 && kept(&npo, "retain") > 0.8);
    assert!(kept(&ga, "retain") < kept(&npo, "retain") - 0.2);
    assert_eq!(npo["mesh"]["tp"], 2);
    assert_eq!(npo["mesh"]["dp"], 2);
    assert!(number(&npo, "retain.after.token_accuracy") > number(&npo, "forget.after.token_accuracy"));
}

/// One object a step with the promised keys; the first line says what runs.
#[test]
fn metrics_have_what_was_promised() {
    let workshop = trained();
    npo(workshop, "metrics", 2, &["train.steps=3", "eval.every=2"]);
    let lines = workshop.metrics("metrics");
    for key in ["config_digest", "version", "mesh", "libraries"] {
        assert!(!lines[0][key].is_null(), "{key}");
    }
    assert!(lines[0]["libraries"]["mpi"].as_str().unwrap().contains("MPI"));
    let steps = workshop.steps("metrics");
    assert_eq!(steps.len(), 3);
    for (index, line) in steps.iter().enumerate() {
        assert_eq!(line["step"], index as u64 + 1);
        for key in [
            "epoch",
            "loss",
            "forget_loss",
            "retain_loss",
            "grad_norm",
            "lr",
            "forget_tokens",
            "retain_tokens",
            "tokens_per_s",
            "step_s",
            "cpu_s",
            "comm_s",
            "rss_bytes",
        ] {
            assert!(number(line, key).is_finite(), "{key}");
        }
        let total = number(line, "forget_loss") + number(line, "retain_loss");
        assert!((number(line, "loss") - total).abs() < 1e-9);
        assert!(number(line, "comm_s") > 0.0 && number(line, "comm_s") < number(line, "step_s"));
    }
    assert!(number(&steps[0], "npo_log_ratio").abs() < 1e-4 && number(&steps[2], "npo_log_ratio") < -1e-3);
    assert!((number(&steps[0], "npo_weight") - 1.0).abs() < 1e-4 && number(&steps[2], "npo_weight") < 1.0);
    // what the ranks handed to MPI in the first step is what was planned, to the byte
    let plans: Vec<_> = lines.iter().filter(|line| !line["plan"].is_null()).collect();
    assert!(plans.len() == 1 && plans[0]["step"] == 1);
    let sent = number(plans[0], "plan.wire_bytes");
    assert!(sent > 1e4 && sent == number(plans[0], "plan.planned_wire_bytes"), "{}", plans[0]);
    assert_eq!(number(plans[0], "plan.worst_wire_off"), 0.0);
    // before, in between, after
    assert_eq!(lines.iter().filter(|line| !line["eval"].is_null()).count(), 3);
    for rank in 0..2 {
        assert!(workshop.path(&format!("metrics/logs/rank_0000{rank}.log")).exists());
    }
    // the run folder holds its configuration; running that again gives the same digest
    let shown = dunlearn(&["config", "show", workshop.path("metrics/config.toml").to_str().unwrap()]);
    let kept = std::fs::read_to_string(workshop.path("metrics/config.toml")).unwrap();
    let (mark, kept) = kept.split_once('\n').unwrap();
    assert!(mark.starts_with('#') && shown.text == kept, "{kept}");
    // with the numbers that the file left to the defaults
    for default in ["beta = 0.1", "forget_weight = 1.0", "betas = [0.9, 0.999]", "template = \"chat\""] {
        assert!(kept.contains(default), "{default} in {kept}");
    }
}

/// With `--log-format json` every line is a JSON object, the last words of a failing run included.
#[test]
fn machines_can_read_the_log() {
    let workshop = trained();
    let config = workshop.config("json.toml", &NPO.replace("/npo\"", "/json\""));
    let start = |extra: &[&str]| {
        mpirun(2, &[&["--config", &config, "--log-format", "json", "--overwrite"][..], extra].concat())
    };
    let lines = |text: &str| -> Vec<serde_json::Value> {
        // the launcher adds words of its own when a rank fails
        let ours = text.lines().take_while(|line| !line.starts_with("---"));
        ours.filter(|line| !line.is_empty())
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
            .collect()
    };
    let good = start(&["--set", "train.steps=2"]);
    assert!(good.success, "{}", good.text);
    assert!(lines(&good.text).iter().any(|line| line["message"] == "finished" && line["steps"] == 2), "{}", good.text);
    let bad = start(&["--set", "data.forget.path=nowhere.jsonl"]);
    let said = lines(&bad.text);
    let last = said.iter().find(|line| line["level"] == "ERROR").unwrap_or_else(|| panic!("{}", bad.text));
    assert!(last["message"].as_str().unwrap().contains("nowhere.jsonl") && last["rank"] == 0);
}

/// With a learning rate of 0 every layout writes the bytes that were read, through optimizer, masters and gather.
#[test]
fn exports_of_all_layouts_have_the_same_bytes() {
    let workshop = trained();
    let before = std::fs::read(workshop.path("base/model/model.safetensors")).unwrap();
    let still = ["train.steps=2", "optimizer.lr=0", "eval.before=false", "eval.after=false", "data.retain.limit=9"];
    for (name, ranks, set) in [
        ("same1", 1, &["parallel.tp=1"][..]),
        ("same2", 2, &["parallel.sequence_parallel=true"]),
        ("same3", 2, &["parallel.tp=1", "parallel.bucket_mib=0.05"]),
        ("same4", 4, &["parallel.zero=false"]),
        ("same5", 8, &["parallel.tp=4", "train.recompute=half_block"]),
        ("same6", 4, &["train.precision=bf16"]),
    ] {
        npo(workshop, name, ranks, &[set, &still].concat());
        let after = std::fs::read(workshop.path(name).join("model/model.safetensors")).unwrap();
        assert!(before == after, "{name}: the exported bytes differ");
    }
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(workshop.path("same5/model").join(file).exists(), "{file}");
    }
}

/// Shards, an index, another type: read back they are the same model.
#[test]
fn an_export_in_several_files_reads_back() {
    let workshop = trained();
    let set = [
        "train.steps=1",
        "optimizer.lr=0",
        "parallel.tp=1",
        "export.max_shard_mib=0.1",
        "export.dtype=bf16",
        "eval.before=false",
        "eval.after=false",
        "data.retain.limit=9",
    ];
    npo(workshop, "shards", 2, &set);
    let folder = workshop.path("shards/model");
    let index = std::fs::read_to_string(folder.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let whole = tensors(&workshop.path("base/model"));
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), whole.len());
    let mut files = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().unwrap().to_owned();
        let read = files.entry(file.clone()).or_insert_with(|| tiny::read(&folder.join(&file)));
        assert!(read[name].equal(&whole[name].to_kind(tch::Kind::BFloat16)), "{name}");
    }
    assert!(files.len() > 1);
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    assert!(config.contains("bfloat16"));
    // and it is a model to start from
    let again = format!("model.path={}", folder.display());
    npo(workshop, "again", 1, &[&again, "parallel.tp=1", "train.steps=1", "train.precision=bf16"]);
}

/// What the run measured after training is what the exported folder measures before the next one.
#[test]
fn the_exported_model_is_the_trained_one() {
    let workshop = trained();
    npo(workshop, "first", 4, &["train.steps=4"]);
    let path = format!("model.path={}", workshop.path("first/model").display());
    npo(workshop, "second", 1, &[&path, "parallel.tp=1", "train.steps=1"]);
    let (first, second) = (workshop.summary("first"), workshop.summary("second"));
    for set in ["forget", "retain"] {
        let after = number(&first, &format!("{set}.after.nll"));
        let before = number(&second, &format!("{set}.before.nll"));
        assert!((after / before - 1.0).abs() < 1e-5, "{set}: {after} and {before}");
    }
}

/// The cache is used where nothing changed, and noticed where something did.
#[test]
fn a_stale_reference_is_computed_again() {
    let workshop = trained();
    let run = |set: &[&str]| {
        let config = workshop.config("cache.toml", &NPO.replace("/npo\"", "/cache\""));
        let mut arguments = vec!["--config", config.as_str(), "--overwrite", "--set", "train.steps=2"];
        for item in set {
            arguments.extend(["--set", item]);
        }
        let done = mpirun(2, &arguments);
        assert!(done.success, "{}", done.text);
        (done.text, number(&workshop.steps("cache")[0], "forget_loss"))
    };
    let (text, first) = run(&[]);
    assert!(!text.contains("read from") && !text.contains("computed again"));
    let (text, second) = run(&[]);
    assert!(text.contains("read from"), "{text}");
    assert_eq!(first, second);
    // at the reference itself the loss is (2/beta) log 2
    assert!((first - 20.0 * std::f64::consts::LN_2).abs() < 1e-4, "{first}");
    let (text, bf16) = run(&["train.precision=bf16"]);
    assert!(text.contains("computed again"), "{text}");
    assert!((bf16 - 20.0 * std::f64::consts::LN_2).abs() < 1e-4, "{bf16}");
    let (text, limited) = run(&["data.forget.limit=3", "train.global_batch=3"]);
    assert!(text.contains("computed again"), "{text}");
    assert!((limited - 20.0 * std::f64::consts::LN_2).abs() < 1e-4);
}

/// KL to the model before training: 0 at the start on every layout, positive later, and with the padding of other programs
/// counted in, smaller by just that count.
#[test]
fn the_divergence_term_starts_at_zero() {
    let workshop = trained();
    // Where a gradient is nothing but rounding, AdamW with its usual epsilon steps by the sign of that rounding.
    let epsilon = "optimizer.eps=1e-4";
    let set = ["method.retain=kl", "train.steps=4", "eval.before=false", "data.shuffle=false", epsilon];
    npo(workshop, "kl1", 1, &[&set[..], &["parallel.tp=1"]].concat());
    npo(workshop, "kl4", 4, &[&set[..], &["parallel.sequence_parallel=true"]].concat());
    npo(workshop, "klpad", 1, &[&set[..], &["parallel.tp=1", "method.compat=openunlearning"]].concat());
    let losses =
        |run: &str| -> Vec<f64> { workshop.steps(run).iter().map(|line| number(line, "retain_loss")).collect() };
    let (one, four, padded) = (losses("kl1"), losses("kl4"), losses("klpad"));
    assert!(one[0].abs() < 1e-6 && one[1..].iter().all(|&kl| kl > 1e-6), "{one:?}");
    for (a, b) in one.iter().zip(&four).skip(1) {
        assert!((a / b - 1.0).abs() < 1e-3, "{one:?} {four:?}");
    }
    assert!(padded[1] < one[1] && padded[1] > 0.3 * one[1], "{one:?} {padded:?}");
}

/// Settings that only change how the work is cut do not change the result; settings that change the work do.
#[test]
fn options_matter_where_they_should() {
    let workshop = trained();
    let last = |name: &str, set: &[&str]| {
        let always = ["train.steps=3", "parallel.tp=1", "eval.before=false"];
        npo(workshop, name, 1, &[&always[..], set].concat());
        let steps = workshop.steps(name);
        (number(&steps[2], "loss"), number(&steps[2], "lr"), number(&workshop.summary(name), "retain.after.nll"))
    };
    let base = last("o0", &[]);
    for (name, set) in [
        ("o1", &["train.micro_batch_tokens=40"][..]),
        ("o2", &["train.logits_mib=0.01"]),
        ("o3", &["train.recompute=half_block"]),
        ("o4", &["parallel.bucket_mib=0.01"]),
        ("o5", &["run.threads=1"]),
    ] {
        let other = last(name, set);
        assert!((other.2 / base.2 - 1.0).abs() < 1e-5, "{set:?}: {other:?} {base:?}");
    }
    for (name, set) in [
        ("p0", &["run.seed=1"][..]),
        ("p1", &["data.shuffle=false"]),
        ("p2", &["data.max_length=24"]),
        ("p3", &["data.template.prompt=Q: {question}", "data.template.answer= A: {answer}"]),
        ("p4", &["method.beta=0.5"]),
        ("p5", &["method.forget_weight=0.5"]),
        ("p6", &["method.retain_weight=3.0"]),
        ("p7", &["method.retain=none"]),
        ("p8", &["train.global_batch=2"]),
        ("p9", &["train.precision=bf16"]),
        ("q0", &["optimizer.lr=1e-4"]),
        ("q1", &["optimizer.betas=[0.5, 0.9]"]),
        ("q2", &["optimizer.eps=1e-2"]),
        ("q3", &["optimizer.weight_decay=3.0"]),
        ("q4", &["optimizer.name=sgd"]),
        ("q5", &["optimizer.name=sgd", "optimizer.momentum=0.9"]),
        ("q6", &["optimizer.max_grad_norm=0.01", "optimizer.eps=1e-3"]),
        ("q7", &["schedule.name=constant"]),
        ("q8", &["schedule.name=cosine"]),
        ("q9", &["schedule.warmup=2 steps"]),
        ("r0", &["data.system=Be brief."]),
        ("r1", &["data.retain.limit=5"]),
    ] {
        let other = last(name, set);
        assert!(other.2 != base.2, "{set:?} changes nothing: {other:?}");
    }
}

/// The mesh of 70B runs, TP 8 x DP 2 on 16 ranks, on a model with its heads, against one rank.
#[test]
fn sixteen_ranks_give_the_model_of_one() {
    let mut shape = vec!["--authors", "4", "--questions", "4", "--vocab", "400", "--weights"];
    shape.extend(["--layers", "6", "--heads", "64", "--kv-heads", "8", "--hidden", "128", "--intermediate", "256"]);
    let workshop = Workshop::new(&shape);
    let mini = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/70b_mini.toml")).unwrap();
    let mini = mini.replace("runs/70b_mini_data", "{data}").replace("\"runs/70b_mini\"", "\"{runs}/mini\"");
    let config = workshop.config("mini.toml", &mini);
    let sixteen = mpirun(16, &["--config", &config, "--set", "train.steps=2"]);
    assert!(sixteen.success, "{}", sixteen.text);
    let one = workshop.path("one").display().to_string();
    let one = format!("run.dir={one}");
    let set = [&one, "train.steps=2", "parallel.tp=1", "parallel.sequence_parallel=false"];
    let arguments: Vec<&str> = ["--config", &config].into_iter().chain(set.iter().flat_map(|s| ["--set", s])).collect();
    let alone = dunlearn(&arguments);
    assert!(alone.success, "{}", alone.text);
    let (many, single) = (tensors(&workshop.path("mini/model")), tensors(&workshop.path("one/model")));
    let worst = single.iter().map(|(name, want)| tiny::relative(&many[name], want)).fold(0.0, f64::max);
    println!("largest relative difference after two steps: {worst:.1e}");
    assert!(worst < 1e-4);
}
