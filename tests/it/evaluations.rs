//! Evaluations of the binary: the same numbers on every layout, aggregates that the items give again, results side by side, and
//! refusals.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use dunlearn::eval::record::read_items;
use dunlearn::eval::{Evaluation, Item, statistics};

use crate::program::{Workshop, dunlearn, mpirun};

const SMALL: &[&str] = &[
    "--authors",
    "10",
    "--questions",
    "4",
    "--vocab",
    "512",
    "--hidden",
    "64",
    "--layers",
    "2",
    "--intermediate",
    "96",
    "--weights",
];

const EVAL: &str = r#"
[run]
dir = "{runs}/evaluation"
device = "cpu"
[model]
path = "{data}/model"
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[train]
precision = "f32"
micro_batch_tokens = 700
[eval.tofu]
path = "{data}/tofu"
limit = 6
max_new_tokens = 6
[eval.choice]
path = "{data}/choice.jsonl"
limit = 9
[eval.perplexity]
source = { path = "{data}/texts.json", kind = "text" }
[eval.mia]
holdout = { path = "{data}/holdout.jsonl", kind = "qa" }
gradnorm = true
recall = 2
[eval.muse]
verbmem = "{data}/verbmem.jsonl"
knowmem_retain = "{data}/retain.jsonl"
limit = 3
"#;

/// Fictional authors, a random model, another one as the retrained model, and texts.
fn workshop() -> &'static Workshop {
    static WORKSHOP: OnceLock<Workshop> = OnceLock::new();
    WORKSHOP.get_or_init(|| {
        let workshop = Workshop::new(SMALL);
        let other = workshop.path("other");
        let seed = [SMALL, &["--seed", "0", "--out", other.to_str().unwrap()]].concat();
        assert!(dunlearn(&[&["data", "synth"], &seed[..]].concat()).success);
        // the same tokenizer with other weights
        let file = other.join("model/model.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        let len = bytes.len();
        bytes[len - 40_000..].as_chunks_mut::<4>().0.reverse();
        std::fs::write(&file, bytes).unwrap();
        let texts = r#"[{"text": "The river was high that spring."}, {"text": "Nobody crossed it before May."}]"#;
        std::fs::write(workshop.path("data/texts.json"), texts).unwrap();
        let passage = r#"{"prompt": "The river was high", "gt": "that spring and nobody crossed it."}"#;
        std::fs::write(workshop.path("data/verbmem.jsonl"), passage).unwrap();
        workshop
    })
}

fn evaluate(ranks: usize, name: &str, set: &[&str]) -> Evaluation {
    let workshop = workshop();
    let config = workshop.config(&format!("{name}.toml"), &EVAL.replace("/evaluation\"", &format!("/{name}\"")));
    let retrained = format!("eval.retrained={}", workshop.path("other/model").display());
    let cache = format!("eval.cache={}", workshop.path("cache").join(name).display());
    let mut arguments = vec!["eval", "--config", &config, "--label", "it", "--set", &retrained, "--set", &cache];
    for item in set {
        arguments.extend(["--set", item]);
    }
    let done = if ranks == 1 { dunlearn(&arguments) } else { mpirun(ranks, &arguments) };
    assert!(done.success, "{}", done.text);
    let file = results(name);
    Evaluation::read(&file).unwrap().with_all_items(&file).unwrap()
}

fn results(name: &str) -> PathBuf {
    workshop().path(name).join("eval/it.json")
}

fn numbers(items: &[Item], name: &str) -> Vec<f64> {
    items.iter().filter_map(|item| item.numbers.get(name).copied()).collect()
}

#[test]
fn every_metric_is_the_same_on_every_layout() {
    let one = evaluate(1, "one", &[]);
    let suites = ["tofu.model_utility", "tofu.log10_forget_quality", "choice.accuracy", "perplexity.per_token"];
    let more = ["mia.min_k_plus_plus_auc", "mia.priv_leak", "muse_verbmem.rouge_l_f1", "forget.extraction_strength"];
    let passes = ["mia.gradnorm_auc", "mia.recall_auc", "mia.gradnorm_priv_leak"];
    for name in suites.iter().chain(&more).chain(&passes) {
        assert!(one.metrics.contains_key(*name), "{name} is missing: {:?}", one.warnings);
    }
    for (ranks, tp) in [(2, 2), (2, 1), (4, 2)] {
        let name = format!("ranks{ranks}tp{tp}");
        let set = [format!("parallel.tp={tp}"), "parallel.dp=auto".to_owned()];
        let other = evaluate(ranks, &name, &[&set[0], &set[1]]);
        let names = |one: &Evaluation| one.metrics.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&one), names(&other));
        assert_eq!(one.data, other.data);
        for (metric, want) in &one.metrics {
            let got = &other.metrics[metric];
            let near = (got.value - want.value).abs() <= 1e-6 * want.value.abs().max(1.0);
            assert!(near && got.n == want.n, "{metric} on {name}: {} instead of {}", got.value, want.value);
        }
        for (set, items) in &one.items {
            for (a, b) in items.iter().zip(&other.items[set]) {
                assert_eq!((&a.prompt, &a.generation), (&b.prompt, &b.generation));
                for (number, want) in &a.numbers {
                    let got = b.numbers[number];
                    let near = (got - want).abs() <= 2e-6 * want.abs().max(1.0);
                    assert!(near, "{set} item {} {number} on {name}: {got} instead of {want}", a.index);
                }
            }
        }
    }
}

/// Every aggregate comes again from the files of items alone, by other arithmetic where there is some.
#[test]
fn items_give_the_aggregates_again() {
    let one = evaluate(1, "items", &[]);
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
    let near = |metric: &str, want: f64| {
        let got = one.value(metric).unwrap_or_else(|| panic!("no {metric}: {:?}", one.warnings));
        assert!((got - want).abs() < 1e-9, "{metric} is {got}, the items give {want}");
    };
    let items = |set: &str| {
        let file = one.metrics[&format!("{set}.probability")].items.clone().unwrap();
        read_items(&results("items").with_file_name(file)).unwrap()
    };
    let forget = items("tofu_forget");
    near("tofu_forget.probability", mean(forget.iter().map(|item| (-item.numbers["loss"]).exp()).collect()));
    let ratio = |item: &Item| {
        let wrong = (0..5).map(|i| -item.numbers[&format!("wrong_{i}_loss")]).sum::<f64>() / 5.0;
        (wrong + item.numbers["paraphrase_loss"]).exp()
    };
    near("tofu_forget.truth_ratio", mean(forget.iter().map(|item| ratio(item).min(1.0 / ratio(item))).collect()));
    let parts = ["tofu_retain", "tofu_real_authors", "tofu_world_facts"].into_iter().flat_map(|set| {
        let items = items(set);
        let choice = if set == "tofu_retain" { "probability" } else { "choice_probability" };
        let truth = numbers(&items, "truth_ratio").iter().map(|r| (1.0 - r).max(0.0)).collect();
        [mean(numbers(&items, choice)), mean(numbers(&items, "rouge_l_recall")), mean(truth)]
    });
    let parts: Vec<f64> = parts.collect();
    near(
        "tofu.model_utility",
        if parts.contains(&0.0) { 0.0 } else { 9.0 / parts.iter().map(|x| 1.0 / x).sum::<f64>() },
    );
    let (members, others) = (items_of(&one, "mia_forget"), items_of(&one, "mia_holdout"));
    // the two texts before the others are not attacked
    assert_eq!(numbers(others, "recall").len() + 2, others.len());
    for attack in ["loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm", "recall"] {
        let (members, others) = (numbers(members, attack), numbers(others, attack));
        let beats = |a: f64, b: f64| f64::from(u8::from(a > b)) + 0.5 * f64::from(u8::from(a == b));
        let won: f64 = others.iter().flat_map(|a| members.iter().map(move |b| beats(*a, *b))).sum();
        near(&format!("mia.{attack}_auc"), won / (members.len() * others.len()) as f64);
    }
    let retrained = cached("items");
    let ks = statistics::kolmogorov_smirnov(
        &numbers(&forget, "log_truth_ratio"),
        &numbers(&retrained.items["tofu_forget"], "log_truth_ratio"),
    );
    near("tofu.ks_statistic", ks.unwrap().statistic);
    assert!(one.value("tofu.ks_statistic").unwrap() > 0.0, "the retrained model is another one");
}

/// The published folder of MUSE gives what its files give by name, in its own and in older names, and says what it lacks.
#[test]
fn muse_reads_the_published_folder() {
    let workshop = workshop();
    let folder = workshop.path("MUSE-News");
    let array = |name: &str| -> String {
        let text = std::fs::read_to_string(workshop.path(&format!("data/{name}.jsonl"))).unwrap();
        format!("[{}]", text.lines().collect::<Vec<_>>().join(","))
    };
    let text = |name: &str| -> String {
        let rows: Vec<serde_json::Value> = serde_json::from_str(&array(name)).unwrap();
        rows.iter().map(|row| serde_json::json!({ "text": row["answer"] }).to_string() + "\n").collect()
    };
    let write = |name: &str, text: String| {
        std::fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
        std::fs::write(folder.join(name), text).unwrap();
    };
    write("knowmem/forget_qa-00000-of-00001.json", array("forget"));
    write("knowmem/forget_qa_icl.json", array("holdout"));
    write("knowmem/retain2_qa.json", array("retain"));
    write("privleak/forget.jsonl", text("forget"));
    let config = EVAL.replace("[eval.mia]\nholdout = { path = \"{data}/holdout.jsonl\", kind = \"qa\" }", "[eval.mia]");
    let (start, _) = config.split_once("verbmem =").unwrap();
    let config = format!("{start}path = \"{}\"\nlimit = 3\n", folder.display());
    let config = workshop.config("muse.toml", &config.replace("/evaluation\"", "/muse\""));
    let run = |set: &[&str]| {
        let set: Vec<&str> = set.iter().flat_map(|item| ["--set", item]).collect();
        dunlearn(&[&["eval", "--config", &config, "--label", "it"], &set[..]].concat())
    };
    let refused = run(&[]);
    assert!(!refused.success, "{}", refused.text);
    for expected in [
        "MUSE-News lacks verbmem/forget, knowmem/retain_qa_icl or knowmem/retain2_qa_icl; looked for NAME.jsonl",
        "verbmem is not there or holds no data, knowmem holds forget_qa, forget_qa_icl, retain2_qa;",
        "name files with eval.muse.verbmem, eval.muse.knowmem_retain_icl",
    ] {
        assert!(refused.text.contains(expected), "{expected}: {}", refused.text);
    }
    write("knowmem/retain2_qa_icl.json", array("holdout"));
    std::fs::create_dir_all(folder.join("verbmem")).unwrap();
    std::fs::copy(workshop.path("data/verbmem.jsonl"), folder.join("verbmem/forget.jsonl")).unwrap();
    let refused = run(&[]);
    let expected = "lacks privleak/holdout; looked for";
    assert!(refused.text.contains(expected) && refused.text.contains("eval.mia.holdout"), "{}", refused.text);
    write("privleak/holdout.jsonl", text("holdout"));
    let done = run(&[r#"eval.suites=["muse", "mia"]"#]);
    assert!(done.success, "{}", done.text);
    let file = results("muse");
    let published = Evaluation::read(&file).unwrap().with_all_items(&file).unwrap();
    assert_eq!(published.items["mia_holdout"].len(), text("holdout").lines().count());
    let named =
        |key: &str, name: &str| format!("eval.muse.{key}={}", workshop.path(&format!("data/{name}.jsonl")).display());
    let names = [
        named("verbmem", "verbmem"),
        named("knowmem_forget", "forget"),
        named("knowmem_forget_icl", "holdout"),
        named("knowmem_retain", "retain"),
        named("knowmem_retain_icl", "holdout"),
    ];
    let names: Vec<&str> = names.iter().map(String::as_str).chain([r#"eval.suites=["muse", "mia"]"#]).collect();
    let by_name = evaluate(1, "muse_names", &names);
    for set in ["muse_verbmem", "muse_knowmem_forget", "muse_knowmem_retain"] {
        assert_eq!(published.items[set], by_name.items[set], "{set}");
        assert_eq!(published.data[set], by_name.data[set], "{set}");
    }
}

fn items_of<'a>(one: &'a Evaluation, set: &str) -> &'a [Item] {
    &one.items[set]
}

/// The retrained model's results in the cache of an evaluation.
fn cached(name: &str) -> Evaluation {
    let folder = workshop().path("cache").join(name);
    let home = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let file = home.join("eval/retrained.json");
    Evaluation::read(&file).unwrap().with_all_items(&file).unwrap()
}

/// The other model is evaluated once, and again where data or settings change.
#[test]
fn results_of_other_models_are_computed_once() {
    let workshop = workshop();
    let suites = r#"eval.suites=["tofu"]"#;
    let said = |set: &[&str]| {
        let config = workshop.config("once.toml", &EVAL.replace("/evaluation\"", "/once\""));
        let retrained = format!("eval.retrained={}", workshop.path("other").display());
        let set: Vec<&str> = [&["eval.tofu.rouge=false", suites, &retrained], set].concat();
        let arguments: Vec<&str> = set.iter().flat_map(|item| ["--set", item]).collect();
        let done = dunlearn(&[&["eval", "--config", &config], &arguments[..]].concat());
        assert!(done.success, "{}", done.text);
        done.text.contains("evaluating")
    };
    assert!(said(&[]), "nothing was known");
    assert!(!said(&[]), "it was known");
    assert!(said(&["eval.tofu.limit=5"]), "other items");
    assert!(said(&["train.precision=bf16"]), "another precision");
}

#[test]
fn a_run_evaluates_its_suites_and_results_stand_side_by_side() {
    let workshop = workshop();
    let run = EVAL.replace("/evaluation\"", "/unlearned\"").replace("[train]", "[train]\nsteps = 4\nglobal_batch = 4")
        + "[method]\nobjective = \"ga\"\nretain = \"nll\"\n[optimizer]\nlr = 1e-3\n";
    let config = workshop.config("unlearned.toml", &run);
    let retrained = format!("eval.retrained={}", workshop.path("other").display());
    let every = ["--set", "eval.every=2", "--set", r#"eval.suites=["tofu", "mia"]"#, "--set", &retrained];
    let done = dunlearn(&[&["--config", &config], &every[..]].concat());
    assert!(done.success, "{}", done.text);
    let folder = workshop.path("unlearned");
    let files: Vec<String> = Evaluation::files(&folder)
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    assert_eq!(files, ["step_000000.json", "step_000002.json", "step_000004.json"]);
    let last = Evaluation::read(&folder.join("eval/step_000004.json")).unwrap();
    assert_eq!((last.step, last.metrics.contains_key("tofu.forget_quality")), (Some(4), true));
    // the numbers of the run's summary are those of its results
    let summary = workshop.summary("unlearned");
    let after = summary["forget"]["after"]["probability"].as_f64().unwrap();
    assert!((after - last.value("forget.probability").unwrap()).abs() < 1e-12);
    let told = dunlearn(&["eval", "compare", folder.to_str().unwrap(), "--all", "--metric", "forget"]);
    assert!(told.success, "{}", told.text);
    assert!(told.text.contains("unlearned 000000") && told.text.contains("tofu.forget_quality"), "{}", told.text);
    assert!(told.text.contains("over 3 checkpoints AUES 0.") && told.text.contains("MU95"), "{}", told.text);
    let table: BTreeMap<&str, Vec<&str>> = told
        .text
        .lines()
        .filter_map(|line| line.trim().split_once(' ').map(|(name, rest)| (name, rest.split_whitespace().collect())))
        .collect();
    assert_eq!(table["forget.probability"].len(), 3, "{}", told.text);
}

/// What does not belong together is refused before anything is computed, and says where.
#[test]
fn wrong_data_is_refused_with_its_place() {
    let workshop = workshop();
    let write = |name: &str, text: &str| std::fs::write(workshop.path(name), text).unwrap();
    let copy = |name: &str| {
        let (from, to) = (workshop.path("data/tofu"), workshop.path(name));
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    };
    let refused = |set: &[String], expected: &str| {
        let config = workshop.config("refused.toml", &EVAL.replace("/evaluation\"", "/refused\""));
        let mut arguments = vec!["eval", "--config", &config];
        for item in set {
            arguments.extend(["--set", item]);
        }
        let done = dunlearn(&arguments);
        assert!(!done.success && done.text.contains(expected), "{expected:?} is not in {}", done.text);
        assert!(!done.text.contains("panicked"), "{}", done.text);
    };
    let set = |key: &str, name: &str| vec![format!("{key}={}", workshop.path(name).display())];
    refused(&set("eval.tofu.path", "nowhere"), "no forget10_perturbed.jsonl");
    // another split than that of the results
    let one = evaluate(1, "split", &[r#"eval.suites=["tofu"]"#, "eval.tofu.rouge=false"]);
    assert!(one.value("tofu.forget_quality").is_some());
    let mut other = set("eval.retrained", "split/eval/it.json");
    other.extend(["eval.tofu.limit=5".to_owned(), "eval.tofu.rouge=false".to_owned()]);
    refused(&other, "are of other items than this evaluation's tofu_retain: another split or file");
    // a field that is not there, and lists of unequal length
    copy("short");
    write("short/forget10_perturbed.jsonl", r#"{"question": "q", "answer": "a", "perturbed_answer": ["b"]}"#);
    refused(&set("eval.tofu.path", "short"), "forget10_perturbed.jsonl:1: no field \"paraphrased_answer\"");
    let rows = [r#"["Rome", "Bonn", "Nice"]"#, r#"["Rome"]"#]
        .map(|wrong| format!(r#"{{"question": "q", "answer": "a", "perturbed_answer": {wrong}}}"#));
    copy("short");
    write("short/world_facts_perturbed.jsonl", &rows.join("\n"));
    refused(
        &set("eval.tofu.path", "short"),
        "world_facts_perturbed.jsonl:2: field \"perturbed_answer\": found a list of 1",
    );
    write("choice.jsonl", r#"{"question": "q", "choices": ["a", "b"], "answer": 4}"#);
    refused(&set("eval.choice.path", "choice.jsonl"), "choice.jsonl:1: field \"answer\": found 4");
    refused(
        &[format!("eval.mia.holdout.path={}", workshop.path("data/forget.jsonl").display())],
        "are forget texts too",
    );
    refused(&["eval.mia.recall=1000".to_owned()], "eval.mia.recall: is 1000, and eval.mia.holdout has");
    refused(&["eval.choice.shots=2".to_owned()], "eval.choice.examples: missing; shots = 2 needs examples");
    refused(&[r#"eval.suites=["wmdp"]"#.to_owned()], "eval.suites: lists \"wmdp\", which has no table");
}

/// A model that says nothing sensible gives no zeros: what has no value is missing, and a warning says why.
#[test]
fn a_broken_model_gives_warnings_instead_of_numbers() {
    let workshop = workshop();
    let broken = workshop.path("broken");
    std::fs::create_dir_all(&broken).unwrap();
    for entry in std::fs::read_dir(workshop.path("data/model")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), broken.join(entry.file_name())).unwrap();
    }
    let file = broken.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let len = bytes.len();
    bytes[len - 4000..].as_chunks_mut::<4>().0.iter_mut().for_each(|x| *x = f32::NAN.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    let set = format!("model.path={}", broken.display());
    let one = evaluate(1, "nan", &[&set, r#"eval.suites=["tofu", "choice"]"#]);
    assert_eq!(one.value("forget.probability"), None);
    assert_eq!(one.value("tofu.model_utility"), None);
    assert_eq!(one.value("choice.accuracy"), None);
    assert!(!one.metrics.values().any(|metric| metric.value == 0.0), "{:?}", one.metrics);
    let told = |text: &str| assert!(one.warnings.iter().any(|warning| warning.contains(text)), "{:?}", one.warnings);
    told("forget.probability was not computed");
    told("tofu.model_utility was not computed");
    told("choice.accuracy: 9 questions have no answer");
}
