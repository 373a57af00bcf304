//! Arithmetic on models on disk: the same bytes on every number of ranks, the way back, and refusals that name tensor and file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::program::{Finished, dunlearn, mpirun};
use crate::tiny;

const MODEL: &[&str] = &[
    "--authors",
    "4",
    "--questions",
    "2",
    "--vocab",
    "400",
    "--hidden",
    "48",
    "--layers",
    "2",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--intermediate",
    "80",
    "--weights",
];

/// A folder with models of one shape: `a`, `b`, `c`, drawn from different seeds.
struct Models(tempfile::TempDir);

impl Models {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (seed, name) in ["a", "b", "c"].into_iter().enumerate() {
            let out = folder.path().join(format!("data_{name}"));
            let seed = seed.to_string();
            let mut arguments = vec!["data", "synth", "--out", out.to_str().unwrap(), "--seed", &seed];
            arguments.extend(MODEL);
            good(&dunlearn(&arguments));
            std::fs::rename(out.join("model"), folder.path().join(name)).unwrap();
        }
        // a vocabulary of its own words may be shorter: all models get the first one's shapes
        for name in ["b", "c"] {
            let same: Vec<(String, Tensor)> = tensors(&folder.path().join("a"))
                .into_iter()
                .map(|(key, first)| {
                    let own = tensors(&folder.path().join(name)).remove(&key).filter(|own| own.size() == first.size());
                    (key, own.unwrap_or_else(|| first * 0.5))
                })
                .collect();
            Tensor::write_safetensors(&same, folder.path().join(name).join("model.safetensors")).unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `dunlearn weights VERB`, in which `@name` stands for a folder here.
    fn run(&self, ranks: usize, words: &str) -> Finished {
        let words: Vec<String> = words
            .split_whitespace()
            .map(|word| word.strip_prefix('@').map_or(word.to_owned(), |name| self.path(name).display().to_string()))
            .collect();
        let arguments: Vec<&str> = std::iter::once("weights").chain(words.iter().map(String::as_str)).collect();
        if ranks == 1 { dunlearn(&arguments) } else { mpirun(ranks, &arguments) }
    }

    fn done(&self, words: &str) {
        good(&self.run(1, words));
    }

    fn refused(&self, words: &str, expected: &[&str]) {
        let done = self.run(1, words);
        assert!(!done.success, "{words} was accepted");
        for text in expected {
            assert!(done.text.contains(text), "{words}: {:?} lacks {text:?}", done.text);
        }
    }

    /// Tasks of b and c, counted from a.
    fn with_tasks() -> Self {
        let models = Self::new();
        models.done("difference @b @a --out @task_b");
        models.done("difference @c @a --out @task_c");
        models
    }
}

fn good(done: &Finished) {
    assert!(done.success, "{}", done.text);
}

/// All tensors of a folder, whatever files they are in.
fn tensors(folder: &Path) -> BTreeMap<String, Tensor> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .flat_map(|path| tiny::read(&path))
        .collect()
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

const RANDOMISED: &str = "--side both --max-rank 6 --exact-limit 8";

/// Every verb, several files, on 1, 2 and 4 ranks: the same files.
#[test]
fn every_number_of_ranks_writes_the_same_bytes() {
    let models = Models::with_tasks();
    for (name, words) in [
        ("difference", "difference @b @a"),
        ("exact", "discriminate @task_b --similar @task_c --max-rank 6"),
        ("randomised", &format!("discriminate @task_b --similar @task_c --similar @task_b {RANDOMISED}")),
        ("frobenius", "discriminate @task_b --similar @task_c --mode frobenius"),
        ("add", "add @a @task_b --strength -0.7"),
        ("mix", "mix @a @b --share 0.3 --dtype bf16"),
    ] {
        let written = [1, 2, 4].map(|ranks| {
            let out = format!("{name}_{ranks}");
            good(&models.run(ranks, &format!("{words} --out @{out} --max-shard-size 60kB")));
            files(&models.path(&out))
        });
        assert!(written[0].len() > 3 && written[0].contains_key("model.safetensors.index.json"), "{name}");
        assert!(written[1] == written[0] && written[2] == written[0], "{name} depends on the ranks");
    }
}

/// Property (e) of UNLEARN: learning after unlearning the same task is the model that was; and what no task names keeps its bytes.
#[test]
fn learning_after_unlearning_restores() {
    let models = Models::with_tasks();
    models.done("discriminate @task_b --similar @task_c --max-rank 6 --out @unique");
    models.done("add @a @unique --strength -1 --out @unlearned");
    models.done("add @unlearned @unique --strength 1 --out @learned");
    let (before, middle, after) =
        (tensors(&models.path("a")), tensors(&models.path("unlearned")), tensors(&models.path("learned")));
    assert_eq!(before.len(), after.len());
    for (name, tensor) in &before {
        if name.ends_with("_proj.weight") {
            assert!(tiny::relative(&middle[name], tensor) > 0.1, "{name} was not moved");
            assert!(tiny::relative(&after[name], tensor) < 1e-7, "{name} was not restored");
        } else {
            assert!(middle[name].equal(tensor) && after[name].equal(tensor), "{name} was moved");
        }
    }
    // (f) without similar tasks it is the task vector itself
    models.done("discriminate @task_b --out @alone");
    assert!(files(&models.path("alone")) == files(&models.path("task_b")));
    assert!(files(&models.path("unlearned"))["tokenizer.json"] == files(&models.path("a"))["tokenizer.json"]);
}

/// The written matrices against the definition, computed here with libtorch's own decomposition.
#[test]
fn the_written_matrices_are_those_of_the_definition() {
    let models = Models::with_tasks();
    models.done("discriminate @task_b --similar @task_c --energy 1 --max-rank 5 --out @exact");
    models.done("discriminate @task_b --similar @task_c --energy 1 --max-rank 5 --exact-limit 1 --power-iterations 40 --out @random");
    let (task, similar) = (tensors(&models.path("task_b")), tensors(&models.path("task_c")));
    for (name, task) in task {
        let directions = similar[&name].to_kind(Kind::Double).svd(true, true).2.narrow(1, 0, 5);
        let task = task.to_kind(Kind::Double);
        let want = &task - task.mm(&directions).mm(&directions.tr());
        assert!(tiny::relative(&tensors(&models.path("exact"))[&name], &want) < 1e-6, "{name}");
        assert!(tiny::relative(&tensors(&models.path("random"))[&name], &want) < 1e-4, "{name}");
    }
}

#[test]
fn mixtures_end_at_the_two_models() {
    let models = Models::new();
    for (share, same) in [("0", "a"), ("1", "b")] {
        models.done(&format!("mix @a @b --share {share} --out @mix_{same}"));
        let (mixed, model) = (tensors(&models.path(&format!("mix_{same}"))), tensors(&models.path(same)));
        assert!(model.iter().all(|(name, tensor)| mixed[name].equal(tensor)), "share {share}");
    }
    models.done("mix @a @b --share 0.25 --tensors *mlp* --out @part");
    let [a, b, part] = ["a", "b", "part"].map(|name| tensors(&models.path(name)));
    for (name, tensor) in part {
        let want = if name.contains("mlp") { &a[&name] * 0.75 + &b[&name] * 0.25 } else { a[&name].copy() };
        assert!(tiny::relative(&tensor, &want) < 1e-6, "{name}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let models = Models::with_tasks();
    let change = |name: &str, edit: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let folder = models.path(name);
        std::fs::create_dir(&folder).unwrap();
        let mut all = tensors(&models.path("task_c"));
        edit(&mut all);
        let list: Vec<(String, Tensor)> = all.into_iter().collect();
        Tensor::write_safetensors(&list, folder.join("model.safetensors")).unwrap();
    };
    let q = "model.layers.1.self_attn.q_proj.weight";
    change("short", &|all| _ = all.remove(q));
    change("wide", &|all| _ = all.insert(q.to_owned(), Tensor::zeros([48, 50], (Kind::Float, Device::Cpu))));
    change("nan", &|all| all.get_mut(q).unwrap().get(3).copy_(&Tensor::from(f32::NAN)));
    change("vector", &|all| {
        _ = all.insert("model.norm.weight".to_owned(), Tensor::ones([48], (Kind::Float, Device::Cpu)))
    });
    change("strange", &|all| _ = all.insert("x.weight".to_owned(), Tensor::ones([2, 2], (Kind::Float, Device::Cpu))));
    let out = "--out @out";
    models.refused(&format!("discriminate @task_b --similar @short {out}"), &[q, "/short: ", "/task_b", "is missing"]);
    let wide = [q, "[48, 50] in ", "/wide/model.safetensors", "[48, 48] in ", "/task_b/model.safetensors"];
    models.refused(&format!("discriminate @task_b --similar @wide {out}"), &wide);
    models.refused(&format!("discriminate @task_b --similar @nan {out}"), &[q, "/nan/model.safetensors", "not finite"]);
    models.refused(&format!("add @a @nan --strength 1 {out}"), &[q, "/nan/model.safetensors", "not finite"]);
    models.refused(&format!("discriminate @vector {out}"), &["model.norm.weight", "has 1 dimensions"]);
    models.refused(&format!("add @a @strange --strength 1 {out}"), &["x.weight is missing", "/strange"]);
    models.refused(&format!("add @a @task_b --strength 1e9 --dtype f16 {out}"), &["does not fit into f16"]);
    models.refused(&format!("difference @b @a --tensors *.bias {out}"), &["\"*.bias\" matches no tensor", "/b;"]);
    models.refused(&format!("mix @a @b --share 1.5 {out}"), &["--share is 1.5; expected"]);
    models.refused("mix @a @b --share 0.5 --out @c", &["/c exists; choose another --out"]);
    assert!(!models.path("out").exists());
}
