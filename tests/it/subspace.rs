//! UNLEARN and LEARN as runs: a task's matrices against ordinary trainings of one layer after the other, on several layouts, with a start
//! in between; the arithmetic against the verbs on disk; and UWC's calibration.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde_json::Value;
use tch::{Kind, Tensor};

use crate::program::{Finished, Workshop, dunlearn, mpirun, number};
use crate::tiny;

const SMALL: &[&str] = &[
    "--authors",
    "8",
    "--questions",
    "4",
    "--forget-fraction",
    "0.5",
    "--sums",
    "16",
    "--vocab",
    "512",
    "--hidden",
    "32",
    "--layers",
    "2",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--intermediate",
    "80",
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
epochs = 40
global_batch = 8
precision = "f32"
[optimizer]
lr = 1e-2
[schedule]
name = "cosine"
[eval]
before = false
"#;

const UNLEARN: &str = r#"
[run]
dir = "{runs}/NAME"
[model]
path = "{runs}/base/model"
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/sums.jsonl", kind = "qa" }
[method]
objective = "unlearn"
[subspace]
similar = [{ path = "{data}/retain.jsonl", kind = "qa" }]
max_rank = 4
[train]
steps = 5
global_batch = 4
precision = "f32"
[optimizer]
lr = 3e-3
eps = 1e-4
"#;

/// A model that knows two groups of authors and some sums.
fn workshop() -> &'static Workshop {
    static WORKSHOP: OnceLock<Workshop> = OnceLock::new();
    WORKSHOP.get_or_init(|| {
        let workshop = Workshop::new(SMALL);
        let config = workshop.config("train.toml", TRAIN);
        good(&dunlearn(&["--config", &config]));
        assert!(number(&workshop.summary("base"), "train.after.probability") > 0.7);
        workshop
    })
}

fn good(done: &Finished) {
    assert!(done.success, "{}", done.text);
}

fn start(text: &str, name: &str, ranks: usize, set: &[&str]) -> Finished {
    let config = workshop().config(&format!("{name}.toml"), &text.replace("NAME", name));
    let mut arguments = vec!["--config", config.as_str()];
    for item in set {
        match item.starts_with("--") {
            true => arguments.extend(item.split(' ')),
            false => arguments.extend(["--set", item]),
        }
    }
    if ranks == 1 { dunlearn(&arguments) } else { mpirun(ranks, &arguments) }
}

fn run(name: &str, ranks: usize, set: &[&str]) -> String {
    let done = start(UNLEARN, name, ranks, set);
    good(&done);
    done.text
}

fn path(name: &str) -> String {
    workshop().path(name).display().to_string()
}

fn tensors(folder: &str) -> BTreeMap<String, Tensor> {
    tiny::read(&workshop().path(folder).join("model.safetensors"))
}

fn bytes(folder: &str) -> Vec<u8> {
    std::fs::read(workshop().path(folder).join("model.safetensors")).unwrap()
}

fn rank(t: &Tensor) -> i64 {
    let (_, s, _) = t.to_kind(Kind::Double).svd(true, true);
    s.gt(s.double_value(&[0]) * 1e-4).sum(Kind::Int64).int64_value(&[])
}

/// What a task's matrices should be, by ordinary runs: fine-tune the first layer's matrices, then the second's from there.
fn by_hand(name: &str, data: &str, set: &[&str]) -> BTreeMap<String, Tensor> {
    let mut model = path("base/model");
    for layer in 0..2 {
        let name = format!("{name}_{layer}");
        let text = UNLEARN.split("[subspace]").next().unwrap().replace("\"unlearn\"", "\"finetune\"");
        let text = text + "[train]" + UNLEARN.split("[train]").nth(1).unwrap();
        let own = [
            format!("model.path={model}"),
            format!("data.train={{ path = \"{}\", kind = \"qa\" }}", path(data)),
            format!("scope.layers=[{layer}]"),
            "eval.before=false".to_owned(),
            "eval.after=false".to_owned(),
        ];
        let text = text.replace("forget = { path = \"{data}/forget.jsonl\", kind = \"qa\" }\n", "");
        let text = text.replace("retain = { path = \"{data}/sums.jsonl\", kind = \"qa\" }\n", "");
        let all: Vec<&str> = own.iter().map(String::as_str).chain(set.iter().copied()).collect();
        good(&start(&text, &name, 1, &all));
        model = path(&format!("{name}/model"));
    }
    let (tuned, base) = (tensors(&format!("{name}_1/model")), tensors("base/model"));
    let moved = tuned.iter().filter(|(name, _)| name.ends_with("_proj.weight"));
    moved.map(|(name, t)| (name.clone(), t - &base[name])).collect()
}

/// One layout after the other: the task that ordinary trainings of one layer after the other find, nothing else moved, and the model is
/// the base without what is the task's own.
#[test]
fn a_task_is_learnt_layer_by_layer_on_every_layout() {
    let base = tensors("base/model");
    let matrices = ["scope.tensors=[\"*_proj.weight\"]"];
    let want = [
        ("target", by_hand("by_hand", "data/forget.jsonl", &matrices)),
        ("similar_1", by_hand("by_hand_similar", "data/retain.jsonl", &matrices)),
    ];
    for (name, ranks, set) in [
        ("one", 1, &[][..]),
        ("two_by_two", 4, &["parallel.tp=2", "parallel.sequence_parallel=true"]),
        ("copies", 2, &["parallel.zero=false", "train.micro_batch_tokens=40"]),
    ] {
        let text = run(name, ranks, set);
        assert!(text.contains("what the target does not share with 1 similar tasks"), "{text}");
        for (task, want) in &want {
            let found = tensors(&format!("{name}/tasks/{task}"));
            assert_eq!(found.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
            for (tensor, want) in want {
                let off = tiny::relative(&found[tensor], want);
                // on one rank nothing but the subtraction differs
                assert!(off < if ranks == 1 { 1e-6 } else { 5e-3 }, "{name}: {task} {tensor} is off by {off:e}");
            }
        }
        let (after, unique) = (tensors(&format!("{name}/model")), tensors(&format!("{name}/tasks/unique")));
        for (tensor, before) in &base {
            match unique.get(tensor) {
                Some(task) => assert!(tiny::difference(&after[tensor], &(before - task)) < 1e-7, "{name}: {tensor}"),
                None => assert!(after[tensor].equal(before), "{name}: {tensor} was moved"),
            }
        }
        let summary = workshop().summary(name);
        assert_eq!(summary["steps"], 5 * 2 * 2);
        let steps = workshop().steps(name);
        let last = steps.last().unwrap();
        assert_eq!(
            (&last["task"], &last["layers"], &last["stage_step"]),
            (&"similar_1".into(), &serde_json::json!([1]), &5.into())
        );
        for set in ["forget", "retain", "similar_1"] {
            let [before, after] = ["before", "after"].map(|when| number(&summary, &format!("{set}.{when}.nll")));
            assert!(before.is_finite() && after.is_finite(), "{set}");
        }
        assert!(number(&summary, "forget.after.nll") > number(&summary, "forget.before.nll"));
    }
    // the numbers after are those of the written model
    let again = start(UNLEARN, "again", 1, &[&format!("model.path={}", path("one/model")), "train.steps=1"]);
    good(&again);
    let (said, says) = (workshop().summary("one"), workshop().summary("again"));
    let [a, b] = [number(&said, "similar_1.after.nll"), number(&says, "similar_1.before.nll")];
    assert!((a - b).abs() < 1e-6, "{a} {b}");
}

/// Discrimination and removal repeated without training: by the verbs, and by the run itself.
#[test]
fn what_was_learnt_is_used_again() {
    run("whole", 1, &[]);
    let weights = |words: &str| {
        let words: Vec<String> =
            words.split(' ').map(|word| word.strip_prefix('@').map_or_else(|| word.to_owned(), path)).collect();
        let arguments: Vec<&str> = std::iter::once("weights").chain(words.iter().map(String::as_str)).collect();
        good(&dunlearn(&arguments));
    };
    weights("discriminate @whole/tasks/target --similar @whole/tasks/similar_1 --max-rank 4 --out @unique");
    weights("add @base/model @unique --strength -1 --out @removed");
    assert!(bytes("unique") == bytes("whole/tasks/unique") && bytes("removed") == bytes("whole/model"));
    // LEARN after UNLEARN restores
    weights("add @whole/model @whole/tasks/unique --strength 1 --out @restored");
    let (base, restored) = (tensors("base/model"), tensors("restored"));
    assert!(base.iter().all(|(name, t)| tiny::relative(&restored[name], t) < 1e-6));
    let text = run("whole", 2, &["--overwrite", "subspace.strength=2.0", "subspace.max_rank=2"]);
    assert!(text.contains("task target: taken from") && workshop().steps("whole").is_empty(), "{text}");
    assert!(bytes("removed") != bytes("whole/model"));
    // nothing is trained, and still the model before and the one after are two
    let both = ["--overwrite", "subspace.strength=3.0", "eval.before=true", "eval.after=true"];
    assert!(run("whole", 1, &both).contains("task target: taken from"));
    let mut evaluations: Vec<_> =
        std::fs::read_dir(workshop().path("whole/eval")).unwrap().map(|e| e.unwrap().file_name()).collect();
    evaluations.retain(|name| name.to_string_lossy().ends_with(".json"));
    assert_eq!(evaluations.len(), 2, "{evaluations:?}");
    // another training is another task
    let text = run("whole", 1, &["--overwrite", "optimizer.lr=1e-3"]);
    assert!(!text.contains("taken from") && !workshop().steps("whole").is_empty(), "{text}");
}

/// Stopped twice, once by a file and once by a fault after a stage: the same command ends with the same bytes.
#[test]
fn a_stopped_run_goes_on_with_its_stage() {
    run("unbroken", 2, &["parallel.tp=2"]);
    std::fs::create_dir_all(workshop().path("broken")).unwrap();
    std::fs::write(workshop().path("broken/STOP"), "").unwrap();
    let stopped = start(UNLEARN, "broken", 2, &["parallel.tp=2"]);
    assert_eq!(stopped.code, Some(75), "{}", stopped.text);
    assert!(stopped.text.contains("0 of 2 stages of task target are on disk"), "{}", stopped.text);
    let killed = start(UNLEARN, "broken", 2, &["parallel.tp=2", "--fault error@save.2:1"]);
    assert!(!killed.success, "{}", killed.text);
    let text = run("broken", 2, &["parallel.tp=2"]);
    assert!(text.contains("task target, stage 1 of 2: taken from"), "{text}");
    assert_eq!(workshop().steps("broken").len(), 3 * 5);
    for folder in ["tasks/target", "tasks/similar_1", "tasks/unique", "model"] {
        assert!(bytes(&format!("broken/{folder}")) == bytes(&format!("unbroken/{folder}")), "{folder}");
    }
    assert!(std::fs::read_dir(workshop().path("broken/cache")).unwrap().next().is_none(), "stages are left over");
}

/// Low-rank tasks, from the pretrained and from random matrices; a part of what is one parameter; all layers at once; LEARN.
#[test]
fn other_ways_to_find_a_task() {
    let lora = "scope.lora={ r = 2, alpha = 4 }";
    run("low", 2, &[lora, "parallel.tp=2", "train.steps=4"]);
    run("random", 1, &[lora, "subspace.start=random", "train.steps=4"]);
    for name in ["low", "random"] {
        let task = tensors(&format!("{name}/tasks/target"));
        assert_eq!(task.len(), 14);
        assert!(task.values().all(|t| rank(t) <= 2 && t.abs().max().double_value(&[]) > 0.0), "{name}");
    }
    let [low, random] = ["low", "random"].map(|name| tensors(&format!("{name}/tasks/target")));
    assert!(low.iter().all(|(name, t)| tiny::relative(&random[name], t) > 0.3));
    run("part", 2, &["scope.tensors=[\"*.q_proj.weight\", \"*.down_proj.weight\"]", "parallel.tp=2"]);
    let (base, after, task) = (tensors("base/model"), tensors("part/model"), tensors("part/tasks/target"));
    assert_eq!(task.len(), 4);
    for (name, before) in &base {
        assert_eq!(!after[name].equal(before), task.contains_key(name), "{name}");
    }
    // together, without similar tasks: the task vector of an ordinary run
    let alone = ["subspace={ order = \"together\" }", "scope.tensors=[\"*_proj.weight\"]"];
    run("together", 2, &alone);
    let train = format!("data.train={{ path = \"{}\", kind = \"qa\" }}", path("data/forget.jsonl"));
    let tuned = UNLEARN.replace("\"unlearn\"", "\"finetune\"");
    let (head, tail) = tuned.split_once("[subspace]").unwrap();
    let tuned = head.to_owned() + "[train]" + tail.split_once("[train]").unwrap().1;
    good(&start(&tuned, "tuned", 2, &[&train, "scope.tensors=[\"*_proj.weight\"]"]));
    let (tuned, after) = (tensors("tuned/model"), tensors("together/model"));
    for (name, before) in &base {
        assert!(tiny::difference(&(before * 2.0 - &tuned[name]), &after[name]) < 1e-6, "{name}");
    }
    // LEARN adds
    let text = UNLEARN.replace("forget =", "train =").replace("\"unlearn\"", "\"learn\"");
    good(&start(&text, "learn", 1, &["subspace={ strength = 0.5 }"]));
    let (after, task) = (tensors("learn/model"), tensors("learn/tasks/target"));
    for (name, task) in &task {
        assert!(tiny::difference(&after[name], &(&base[name] + task * 0.5)) < 1e-7, "{name}");
    }
    let summary = workshop().summary("learn");
    assert!(number(&summary, "train.after.nll") < number(&summary, "train.before.nll"));
}

/// UWC: the mixture that is found keeps what was asked for, is what was measured, and less of the model before would not do.
#[test]
fn calibration_finds_the_least_mixture() {
    run("strong", 1, &["subspace={ strength = 6.0 }"]);
    let (config, out) = (path("strong/config.toml"), path("calibrated"));
    let common = ["weights", "calibrate", "--config", &config, "--keep", "0.9", "--evaluations", "9", "--json"];
    let done = mpirun(2, &[&common[..], &["--set", "parallel.tp=2", "--out", &out]].concat());
    good(&done);
    let json = done.text.find('{').map(|at| &done.text[at..=done.text.rfind('}').unwrap()]).unwrap();
    let found: Value = serde_json::from_str(json).unwrap();
    let (share, bar) = (number(&found, "share"), number(&found, "bar"));
    assert!(share > 0.0 && share < 1.0 && found["tried"].as_array().unwrap().len() == 9, "{found}");
    let retain = |mixture: &Value| number(&mixture["metrics"]["retain.probability"], "value");
    for mixture in found["tried"].as_array().unwrap() {
        let at = number(mixture, "share");
        assert!(at >= share || retain(mixture) < bar, "{at} would do");
        if at == share {
            assert!(retain(mixture) >= bar);
            good(&start(UNLEARN, "check", 1, &[&format!("model.path={out}"), "train.steps=1"]));
            let measured = number(&workshop().summary("check"), "retain.before.probability");
            assert!((measured - retain(mixture)).abs() < 1e-5, "{measured} {}", retain(mixture));
        }
    }
    let refused = dunlearn(&[&common[..4], &["--of", "nothing", "--out", &path("none")]].concat());
    assert!(!refused.success && refused.text.contains("its sets are forget, retain"), "{}", refused.text);

    // several runs side by side, by the paper's number
    run("weak", 1, &["subspace={ strength = 2.0 }"]);
    let (strong, weak) = (path("strong"), path("weak"));
    let both = ["weights", "calibrate", &strong, &weak, "--metric", "extraction_strength", "--evaluations", "4"];
    let told = dunlearn(&both);
    good(&told);
    assert!(told.text.contains("extraction_strength; calibrated: with the least share"), "{}", told.text);
    let done = dunlearn(&[&both[..], &["--json"]].concat());
    good(&done);
    let all: Value =
        serde_json::from_str(&done.text[done.text.find('[').unwrap()..=done.text.rfind(']').unwrap()]).unwrap();
    assert_eq!((all[0]["run"].as_str(), all[1]["run"].as_str()), (Some(strong.as_str()), Some(weak.as_str())));
    assert_eq!(number(&all[0], "before"), number(&all[1], "before"), "one model before");
    for one in all.as_array().unwrap() {
        let share = number(one, "share");
        let found = one["tried"].as_array().unwrap().iter().find(|mixture| number(mixture, "share") == share).unwrap();
        let of = |set: &str| number(&found["metrics"][format!("{set}.extraction_strength")], "value");
        assert!(of("retain") >= number(one, "bar"), "{one}");
        let start = format!("{} ", one["run"].as_str().unwrap());
        for set in ["forget", "retain"] {
            let found = |line: &&str| line.trim_start().starts_with(&start) && line.contains(set);
            let line = told.text.lines().find(found).unwrap();
            assert!(line.contains(&format!("{share:.4}")) && line.ends_with(&format!("{:.4}", of(set))), "{line}");
        }
    }
    let refused = dunlearn(&[&both[..], &["--out", &path("none")]].concat());
    assert!(!refused.success && refused.text.contains("--out: there are 2 runs"), "{}", refused.text);
}
