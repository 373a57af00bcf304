//! Which weights may change: the same on every layout, and what lies outside stays as it was to the bit.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::program::{Workshop, dunlearn, mpirun, number};
use crate::tiny;

const SMALL: &[&str] = &[
    "--authors",
    "6",
    "--questions",
    "4",
    "--vocab",
    "512",
    "--hidden",
    "32",
    "--layers",
    "2",
    "--intermediate",
    "80",
];

const CONFIG: &str = r#"
[run]
dir = "{runs}/NAME"
[model]
path = "{data}/model"
init = "random"
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[method]
objective = "npo"
retain = "nll"
[train]
steps = 20
global_batch = 4
precision = "f32"
[optimizer]
lr = 1e-3
eps = 1e-4
weight_decay = 0.1
[eval]
before = false
"#;

/// TP x DP: 1 x 1, 2 x 2 and 4 x 1.
const LAYOUTS: [(usize, &[&str]); 3] =
    [(1, &[]), (4, &["parallel.tp=2", "parallel.bucket_mib=0.02"]), (4, &["parallel.tp=4"])];

/// A folder with data, and with a model whose weights are written out.
fn workshop() -> Workshop {
    let workshop = Workshop::new(SMALL);
    run(&workshop, "start", 1, &["train.steps=1", "optimizer.lr=0"]);
    workshop
}

fn run(workshop: &Workshop, name: &str, ranks: usize, set: &[&str]) -> String {
    let done = attempt(workshop, name, ranks, set);
    assert!(done.success, "{name}: {}", done.text);
    done.text
}

fn attempt(workshop: &Workshop, name: &str, ranks: usize, set: &[&str]) -> crate::program::Finished {
    let config = workshop.config(&format!("{name}.toml"), &CONFIG.replace("NAME", name));
    let mut arguments = vec!["--config", config.as_str(), "--set", "eval.after=false"];
    let model = format!("model.path={}", workshop.path("start/model").display());
    if name != "start" {
        arguments.extend(["--set", &model, "--set", "model.init=pretrained"]);
    }
    for item in set {
        arguments.extend(["--set", item]);
    }
    if ranks == 1 { dunlearn(&arguments) } else { mpirun(ranks, &arguments) }
}

fn tensors(workshop: &Workshop, file: &str) -> BTreeMap<String, Tensor> {
    tiny::read(&workshop.path(file))
}

/// The mask of a run, each tensor of its matrix's shape; what it does not hold is not marked.
fn mask(workshop: &Workshop, name: &str, like: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let held = tensors(workshop, &format!("{name}/mask.safetensors"));
    let each = |(name, like): (&String, &Tensor)| {
        let none = || Tensor::zeros(like.size(), (Kind::Uint8, tch::Device::Cpu));
        (name.clone(), held.get(name).map_or_else(none, |mask| mask.expand_as(like)))
    };
    like.iter().map(each).collect()
}

fn count(masks: &BTreeMap<String, Tensor>) -> i64 {
    masks.values().map(|mask| mask.sum(Kind::Int64).int64_value(&[])).sum()
}

/// Of the matrices of both layers: 2 x (4 x 32 x 32 + 3 x 32 x 80) or what the family has.
fn eligible(start: &BTreeMap<String, Tensor>) -> i64 {
    let matrices = start.iter().filter(|(name, t)| name.contains(".layers.") && t.dim() == 2);
    matrices.map(|(_, t)| t.numel() as i64).sum()
}

/// Every score on three layouts: the same marks, and after 20 AdamW steps with weight decay nothing outside has moved.
#[test]
fn masks_are_the_same_everywhere_and_nothing_else_moves() {
    let workshop = workshop();
    let start = tensors(&workshop, "start/model/model.safetensors");
    let all = eligible(&start);
    let scores: [(&str, &[&str]); 10] = [
        ("random", &[]),
        ("gradient", &[]),
        ("gri", &["before.noise=0.01"]),
        ("fila", &["scope.mask.unit=row"]),
        ("wagle", &["scope.mask.among=tensor"]),
        ("memflex", &["scope.mask.unit=column"]),
        ("activations", &["scope.mask.unit=column"]),
        ("del", &["scope.mask.among=layer"]),
        ("random", &["scope.mask.unit=tensor", "scope.mask.invert=true"]),
        ("gradient", &["scope.layers=[1]", "optimizer.name=sgd", "optimizer.momentum=0.9", "scope.mask.fraction=0.3"]),
    ];
    for (index, (score, more)) in scores.iter().enumerate() {
        let mut seen: Vec<(BTreeMap<String, Tensor>, BTreeMap<String, Tensor>)> = Vec::new();
        for (which, (ranks, layout)) in LAYOUTS.iter().enumerate() {
            let name = format!("{score}{index}_{which}");
            let score = format!("scope.mask.score={score}");
            let mut set = vec![score.as_str()];
            let no_eps = more.iter().any(|key| key.starts_with("optimizer.name"));
            set.extend(more.iter().chain(*layout));
            if no_eps {
                // SGD takes no eps
                let config = CONFIG.replace("eps = 1e-4\n", "").replace("NAME", &name);
                let config = workshop.config(&format!("{name}.toml"), &config);
                let model = format!("model.path={}", workshop.path("start/model").display());
                let mut arguments = vec!["--config", &config, "--set", "eval.after=false", "--set", &model];
                arguments.extend(["--set", "model.init=pretrained"]);
                set.iter().for_each(|item| arguments.extend(["--set", item]));
                let done = if *ranks == 1 { dunlearn(&arguments) } else { mpirun(*ranks, &arguments) };
                assert!(done.success, "{}", done.text);
            } else {
                run(&workshop, &name, *ranks, &set);
            }
            let masks = mask(&workshop, &name, &start);
            let after = tensors(&workshop, &format!("{name}/model/model.safetensors"));
            let mut moved = 0;
            for (tensor, before) in &start {
                let changed = after[tensor].ne_tensor(before);
                let outside = changed.logical_and(&masks[tensor].eq(0)).sum(Kind::Int64).int64_value(&[]);
                assert_eq!(outside, 0, "{name}: {tensor} has moved outside the mask");
                moved += changed.sum(Kind::Int64).int64_value(&[]);
            }
            assert!(moved * 10 > count(&masks) * 9, "{name}: {moved} of {} have moved", count(&masks));
            seen.push((masks, after));
        }
        for (masks, after) in &seen[1..] {
            for name in start.keys() {
                assert!(masks[name].equal(&seen[0].0[name]), "{score} {more:?}: {name}");
                let distance = tiny::difference(&after[name], &seen[0].1[name]);
                assert!(distance < 2e-4, "{score} {more:?}: {name} by {distance}");
            }
        }
        if *score != "activations" && more.is_empty() {
            assert_eq!(count(&seen[0].0), (0.1 * all as f64).round() as i64, "{score}");
        }
    }
    // four whole copies
    run(&workshop, "copies", 4, &["scope.mask.score=gri", "before.noise=0.01", "parallel.zero=false"]);
    let (copies, one) = (mask(&workshop, "copies", &start), mask(&workshop, "gri2_0", &start));
    assert!(start.keys().all(|name| copies[name].equal(&one[name])));
    // a mask of everything without noise is the objective itself
    run(&workshop, "whole", 2, &["scope.mask.score=gri", "scope.mask.fraction=1"]);
    run(&workshop, "plain", 2, &["scope.tensors=[\"*_proj.weight\"]"]);
    let [whole, plain] = ["whole", "plain"].map(|name| tensors(&workshop, &format!("{name}/model/model.safetensors")));
    assert!(start.keys().all(|name| tiny::difference(&whole[name], &plain[name]) < 1e-7));
    // a mask is used again, turned round, and cut with another
    let file = |name: &str| workshop.path(&format!("{name}/mask.safetensors")).display().to_string();
    let (a, b) = (file("random0_0"), file("gradient1_0"));
    run(&workshop, "turned", 2, &[&format!("scope.mask.file={a}"), "scope.mask.invert=true", "parallel.tp=2"]);
    run(&workshop, "cut", 2, &[&format!("scope.mask.file={a}"), &format!("scope.mask.intersect={b}")]);
    let get = |name: &str| mask(&workshop, name, &start);
    let (a, b, turned, cut) = (get("random0_0"), get("gradient1_0"), get("turned"), get("cut"));
    assert_eq!(count(&turned), all - count(&a));
    for name in start.keys() {
        assert!(cut[name].equal(&(&a[name] * &b[name])), "{name}");
        assert_eq!((&turned[name] * &a[name]).sum(Kind::Int64).int64_value(&[]), 0);
    }
}

/// A part of what is held as one parameter, single layers, other checkpoints; and a stopped run that goes on.
#[test]
fn names_layers_and_interventions() {
    let workshop = workshop();
    let start = tensors(&workshop, "start/model/model.safetensors");
    run(&workshop, "q", 2, &["scope.tensors=[\"*.q_proj.weight\"]", "scope.layers=[1]", "parallel.tp=2"]);
    let after = tensors(&workshop, "q/model/model.safetensors");
    let moved: Vec<&String> = start.keys().filter(|name| !after[*name].equal(&start[*name])).collect();
    assert_eq!(moved, ["model.layers.1.self_attn.q_proj.weight"]);
    // reset gives the other's values where it may change; a blend changes all
    run(&workshop, "other", 1, &["optimizer.lr=3e-2"]);
    let other = format!("before.other={}", workshop.path("other/model").display());
    let still = ["train.steps=1", "optimizer.lr=0", &other];
    let mask = ["scope.mask.score=random", "scope.mask.unit=column", "before.reset=true"];
    for (name, ranks) in [("reset1", 1), ("reset4", 4)] {
        run(&workshop, name, ranks, &[&still[..], &mask].concat());
        let marks = self::mask(&workshop, name, &start);
        let (after, other) = (
            tensors(&workshop, &format!("{name}/model/model.safetensors")),
            tensors(&workshop, "other/model/model.safetensors"),
        );
        for tensor in start.keys() {
            let want = other[tensor].where_self(&marks[tensor].eq(1), &start[tensor]);
            assert!(after[tensor].equal(&want), "{name} {tensor}");
        }
    }
    run(&workshop, "blend", 2, &[&still[..], &["before.blend=0.25", "scope.layers=[0]", "parallel.tp=2"]].concat());
    let (after, other) =
        (tensors(&workshop, "blend/model/model.safetensors"), tensors(&workshop, "other/model/model.safetensors"));
    for tensor in start.keys() {
        let want = &start[tensor] + (&other[tensor] - &start[tensor]) * 0.25;
        assert!(tiny::difference(&after[tensor], &want) < 1e-6, "{tensor}");
    }
    // noise has the length that was asked for and is a function of the seed
    let noise =
        ["before.noise=0.02", "train.steps=1", "optimizer.lr=0", "scope.mask.score=random", "scope.mask.fraction=0.5"];
    for (name, ranks) in [("noise1", 1), ("noise4", 4)] {
        run(&workshop, name, ranks, &noise);
    }
    let (one, four) =
        (tensors(&workshop, "noise1/model/model.safetensors"), tensors(&workshop, "noise4/model/model.safetensors"));
    let (mut squares, mut n) = (0.0, 0.0);
    for tensor in start.keys() {
        assert!(one[tensor].equal(&four[tensor]), "{tensor}");
        let change = (&one[tensor] - &start[tensor]).to_kind(Kind::Double);
        squares += change.square().sum(Kind::Double).double_value(&[]);
        n += change.ne(0.0).sum(Kind::Double).double_value(&[]);
    }
    // standard error of a deviation over 10,000 numbers: 0.7 %
    assert!(((squares / n).sqrt() / 0.02 - 1.0).abs() < 0.03 && n > 10_000.0, "{n}");
    // stopped after 7 of 20 steps and continued on other ranks
    let mask = ["scope.mask.score=gri", "before.noise=0.01", "checkpoint.every=7", "checkpoint.keep_last=0"];
    run(&workshop, "whole", 2, &mask);
    let config = workshop.config("whole.toml", &CONFIG.replace("NAME", "whole"));
    let folder = workshop.path("whole");
    std::fs::remove_file(folder.join("summary.json")).unwrap();
    std::fs::remove_dir_all(folder.join("checkpoints/step_000014")).unwrap();
    let before = tensors(&workshop, "whole/model/model.safetensors");
    std::fs::remove_dir_all(folder.join("model")).unwrap();
    let model = format!("model.path={}", workshop.path("start/model").display());
    let mut arguments = vec!["--config", &config, "--set", "eval.after=false", "--set", &model];
    arguments.extend(["--set", "model.init=pretrained"]);
    mask.iter().for_each(|item| arguments.extend(["--set", item]));
    let done = mpirun(2, &arguments);
    assert!(done.success && done.text.contains("going on after step 7"), "{}", done.text);
    let again = tensors(&workshop, "whole/model/model.safetensors");
    assert!(before.iter().all(|(name, t)| again[name].equal(t)), "a resumed run with a mask");
}

/// Adapters on every layout: the same model, the base as it was, a folder that holds what the merged model holds.
#[test]
fn adapters_train_alike_and_merge() {
    let workshop = workshop();
    let start = tensors(&workshop, "start/model/model.safetensors");
    for (init, tolerance) in [("zero", 2e-4), ("fila", 2e-3)] {
        let init = format!("scope.lora.init={init}");
        let lora = ["scope.lora.r=4", "scope.lora.alpha=8", &init, "eval.after=true", "optimizer.lr=1e-2"];
        let lora =
            if init.ends_with("fila") { [&lora[..], &["scope.lora.fila_batch=3"]].concat() } else { lora.to_vec() };
        let mut first = None;
        for (which, (ranks, layout)) in LAYOUTS.iter().enumerate() {
            let name = format!("lora_{}_{which}", &init[16..]);
            let set: Vec<&str> = lora.iter().chain(*layout).copied().collect();
            run(&workshop, &name, *ranks, &set);
            let after = tensors(&workshop, &format!("{name}/model/model.safetensors"));
            let rank = |t: &Tensor| {
                let (_, s, _) = t.to_kind(Kind::Double).svd(true, true);
                s.gt(s.double_value(&[0]) * 1e-4 + 1e-7).sum(Kind::Int64).int64_value(&[])
            };
            for (tensor, before) in &start {
                let change = &after[tensor] - before;
                let adapted = tensor.contains("_proj");
                assert_eq!(change.abs().max().double_value(&[]) > 0.0, adapted, "{name} {tensor}");
                if adapted && init.ends_with("zero") {
                    assert!(rank(&change) <= 4, "{name} {tensor}");
                }
            }
            if init.ends_with("zero") {
                let adapter = tensors(&workshop, &format!("{name}/adapter/adapter_model.safetensors"));
                assert_eq!(adapter.len(), 2 * 2 * 7);
                for (tensor, before) in start.iter().filter(|(tensor, _)| tensor.contains("_proj")) {
                    let stem = format!("base_model.model.{}", tensor.trim_end_matches(".weight"));
                    let (a, b) =
                        (&adapter[&format!("{stem}.lora_A.weight")], &adapter[&format!("{stem}.lora_B.weight")]);
                    let merged = before + b.matmul(a) * 2.0;
                    assert!(tiny::difference(&merged, &after[tensor]) < 1e-6, "{name} {tensor}");
                }
            }
            // the merged model says what the adapted one said
            let config = CONFIG.replace("NAME", &format!("{name}_again"));
            let config = workshop.config("again.toml", &config);
            let model = format!("model.path={}", workshop.path(&format!("{name}/model")).display());
            let arguments = [
                "--config",
                &config,
                "--set",
                &model,
                "--set",
                "model.init=pretrained",
                "--set",
                "train.steps=1",
                "--set",
                "optimizer.lr=0",
            ];
            assert!(dunlearn(&arguments).success);
            let (said, says) = (workshop.summary(&name), workshop.summary(&format!("{name}_again")));
            for key in ["forget.after.nll", "retain.after.nll"] {
                let (a, b) = (number(&said, key), number(&says, key));
                assert!((a - b).abs() < 1e-5 * a.abs().max(1.0), "{name} {key}: {a} {b}");
            }
            let first = first.get_or_insert(after.shallow());
            for tensor in start.keys() {
                let distance = tiny::difference(&after[tensor], &first[tensor]);
                assert!(distance < tolerance, "{name} {tensor} by {distance}");
            }
        }
    }
}

trait Shallow {
    fn shallow(&self) -> Self;
}

impl Shallow for BTreeMap<String, Tensor> {
    fn shallow(&self) -> Self {
        self.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
    }
}

/// What cannot be is told with what is there.
#[test]
fn impossible_scopes_are_refused() {
    let workshop = workshop();
    let said = |set: &[&str]| {
        let done = attempt(&workshop, "refused", 1, set);
        assert!(!done.success, "{set:?}: {}", done.text);
        done.text
    };
    for (set, words) in [
        (
            &["scope.tensors=[\"*.w_proj.weight\"]"][..],
            "scope.tensors: \"*.w_proj.weight\" matches no tensor of the model",
        ),
        (&["scope.layers=[7]"], "scope.layers: 7 is no layer of the model, whose layers are 0 to 1"),
        (
            &["scope.lora.r=4", "scope.lora.alpha=8", "scope.lora.targets=[\"x_proj\"]"],
            "the model has no \"x_proj\"; its matrices are q_proj",
        ),
        (
            &["scope.lora.r=4", "scope.lora.alpha=8", "scope.mask.score=random"],
            "scope.mask: given together with scope.lora",
        ),
        (&["scope.mask.score=memflex"], "scope.mask.unit: is \"weight\" with score = \"memflex\""),
        (&["scope.mask.score=random", "scope.mask.eps=1"], "scope.mask.eps: has no effect unless"),
        (&["scope.mask.score=random", "scope.mask.fraction=0"], "scope.mask.fraction: is 0"),
        (&["scope.mask.file=nowhere.safetensors"], "nowhere.safetensors"),
        (&["before.reset=true"], "before.other: missing"),
    ] {
        let text = said(set);
        assert!(text.contains(words), "{set:?}: {text}");
    }
    // masks that do not fit
    let bad = |name: &str, shape: &[i64], value: i64| {
        let path = workshop.path("bad.safetensors");
        let mask = Tensor::full(shape, value, (Kind::Uint8, tch::Device::Cpu));
        Tensor::write_safetensors(&[(name, mask)], &path).unwrap();
        said(&[&format!("scope.mask.file={}", path.display())])
    };
    let down = "model.layers.0.mlp.down_proj.weight";
    assert!(bad("model.other", &[1, 1], 1).contains("tensor model.other: the model has no tensor of this name"));
    assert!(bad(down, &[32, 81], 1).contains("has the shape [32, 81], which does not broadcast to [32, 80]"));
    assert!(bad(down, &[1, 80], 3).contains("element 0 is 3, expected 0 or 1"));
    assert!(bad(down, &[1, 80], 0).contains("chooses none of"));
}
