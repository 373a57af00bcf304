//! A made-up run with everything in it, read from files as a user's would be.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::eval::record::FORMAT;
use crate::eval::{Better, Curve, Evaluation, Item, Metric, ModelFacts};

/// How well a model knows an item, `from 0 to 1`.
struct Model {
    label: &'static str,
    step: Option<usize>,
    forget: f64,
    retain: f64,
}

fn spread(index: usize) -> f64 {
    (index as f64 * 0.754877666).fract() - 0.5
}

fn items(knows: f64, says: bool) -> Vec<Item> {
    let item = |index: usize| {
        let probability = (knows + 0.2 * spread(index) * knows * (1.0 - knows) * 4.0).clamp(1e-4, 1.0);
        let ratio = (1.0 - probability) * (1.0 + 0.5 * spread(index + 7)) + 0.05;
        Item {
            index,
            prompt: format!("Who wrote \"The <{index}> & Rivers\"?"),
            answer: format!("The author of that novel is number {index}, who also wrote seven others."),
            generation: says
                .then(|| if knows > 0.5 { format!("It is number {index}.") } else { "I do not know.".into() }),
            group: None,
            numbers: [("probability".to_owned(), probability), ("truth_ratio".to_owned(), ratio)].into(),
        }
    };
    (0..40).map(item).collect()
}

fn evaluation(model: &Model) -> Evaluation {
    let mut evaluation = Evaluation {
        format: FORMAT,
        label: model.label.to_owned(),
        step: model.step,
        model: ModelFacts {
            path: "models/small".into(),
            digest: "d".into(),
            family: "llama".into(),
            parameters: 1_000_000,
        },
        config_digest: "c".into(),
        precision: "f32".into(),
        template: "chat".into(),
        data: BTreeMap::new(),
        metrics: BTreeMap::new(),
        curves: BTreeMap::new(),
        warnings: Vec::new(),
        seconds: BTreeMap::new(),
        items: [("forget".to_owned(), items(model.forget, true)), ("retain".to_owned(), items(model.retain, true))]
            .into(),
    };
    for (set, knows, better) in [("forget", model.forget, Better::Lower), ("retain", model.retain, Better::Higher)] {
        let metric = |value: f64| Metric::new(value, 40, better).within(value - 0.02, value + 0.02);
        evaluation.put(&format!("{set}.probability"), Some(set), metric(knows));
        evaluation.put(&format!("{set}.rouge_l_recall"), Some(set), metric(0.2 + 0.8 * knows));
        evaluation.put(&format!("{set}.extraction_strength"), Some(set), metric(knows * knows));
    }
    evaluation.put("tofu.model_utility", None, Metric::new(0.62 * model.retain, 9, Better::Higher));
    evaluation.put("tofu.log10_forget_quality", None, Metric::new(-20.0 * model.forget, 40, Better::Higher));
    let point = |step: usize| {
        let back = model.forget + (0.9 - model.forget) * step as f64 / 40.0;
        BTreeMap::from([("step".to_owned(), step as f64), ("forget.probability".to_owned(), back)])
    };
    let curve = Curve { x: "step".to_owned(), points: [0, 10, 20, 40].map(point).to_vec() };
    evaluation.curves.insert("attack.relearn".to_owned(), curve);
    evaluation
}

/// A run folder; `kept`: how well the retain set is known at its end.
fn write_run(folder: &Path, kept: f64) {
    fs::create_dir_all(folder).unwrap();
    for step in [0, 10, 20, 30] {
        let (forget, retain) = (0.95 - 0.03 * step as f64, 0.95 - (0.95 - kept) * step as f64 / 30.0);
        let label = Evaluation::label_of(step);
        let model = Model { label: Box::leak(label.into_boxed_str()), step: Some(step), forget, retain };
        evaluation(&model).write(folder).unwrap();
    }
    evaluation(&Model { label: "retrained", step: None, forget: 0.15, retain: 0.93 }).write(folder).unwrap();
    let line = |step: usize| {
        let size = step as f64;
        json!({ "step": step, "loss": 2.0 - size, "forget_loss": 1.0 - size, "retain_loss": 0.1, "grad_norm": 1.0 + size, "lr": 1e-4 })
    };
    let lines: Vec<String> = (1..=30).map(|step| line(step).to_string()).collect();
    fs::write(folder.join("metrics.jsonl"), lines.join("\n") + "\n{\"step\":30,\"eval\":[]}\n{\"unfin").unwrap();
    let config = "[method]\nobjective = \"npo\"\nretain = \"nll\"\n[optimizer]\nlr = 1e-5 # a <b> & c\n";
    fs::write(folder.join("config.toml"), config).unwrap();
    let summary = json!({
        "version": "0.1.0", "model": { "path": "m", "family": "llama", "parameters": 1_000_000 }, "steps": 30,
        "mesh": { "world": 4, "tp": 2, "dp": 2 }, "training_seconds": 12.5, "libraries": { "libtorch": "2.11" }, "warnings": ["a <warning>"],
    });
    fs::write(folder.join("summary.json"), summary.to_string()).unwrap();
}

/// As `summary.json` was before there were result files.
fn write_old_run(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let scores =
        |p: f64| json!({ "probability": p, "token_accuracy": p, "nll": -p.ln(), "samples": 40, "tokens": 400 });
    let summary = json!({
        "version": "0.1.0", "steps": 50, "model": { "path": "m", "digest": "d", "family": "llama", "parameters": 7 },
        "forget": { "before": scores(0.99), "after": scores(0.01), "during": [[25, scores(0.4)]] },
        "retain": { "before": scores(0.99), "after": scores(0.9), "during": [[25, scores(0.95)]] },
    });
    fs::write(folder.join("summary.json"), summary.to_string()).unwrap();
}

/// The page as XML: it parses, loads nothing, runs nothing, and every picture has something in it.
fn check(page: &str) -> usize {
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(page, options).unwrap_or_else(|error| panic!("{error}"));
    let mut pictures = 0;
    for node in document.descendants().filter(roxmltree::Node::is_element) {
        let name = node.tag_name().name();
        assert!(!["script", "link", "img", "iframe", "object", "image", "use"].contains(&name), "<{name}>");
        for attribute in node.attributes() {
            assert!(!["src", "href", "srcset", "onload", "onclick"].contains(&attribute.name()), "{attribute:?}");
        }
        if name == "svg" {
            pictures += 1;
            let shapes = ["polyline", "circle", "path"];
            let marks = node.descendants().filter(|shape| shapes.contains(&shape.tag_name().name()));
            assert!(marks.count() > 0, "a picture without marks: {:?}", node.attribute("aria-label"));
            for text in node.descendants().filter(|node| node.has_tag_name("text")) {
                let number = |name: &str| text.attribute(name).unwrap().parse::<f64>().unwrap();
                assert!((0.0..=380.0).contains(&number("x")) && (0.0..=240.0).contains(&number("y")), "{text:?}");
            }
        }
    }
    for word in ["http:", "https:", "url(", "@import", "NaN", "inf,", "inf\""] {
        assert!(!page.contains(word), "{word}");
    }
    pictures
}

fn folders(names: &[&str]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let paths = names.iter().map(|name| folder.path().join(name)).collect();
    (folder, paths)
}

#[test]
fn a_run_with_everything_has_every_part() {
    let (_kept, paths) = folders(&["npo"]);
    write_run(&paths[0], 0.9);
    let runs = read(&paths).unwrap();
    let page = page(&runs);
    let pictures = check(&page);
    assert!(pictures >= 14, "{pictures} pictures");
    for part in [
        "Numbers",
        "Forgetting and keeping",
        "Item by item",
        "Under attack",
        "What the models say",
        "Training",
        "All metrics",
        "Configuration",
        "Environment",
        "AUES",
        // 95% of the utility is left after 28.5 of 30 steps, where log10 p is -20 (0.95 - 0.03 x 28.5)
        "MU95 -1.9000",
        "npo + nll",
        "greatest distance from the retrained model",
        "still known best",
        "lost most",
        "a &lt;warning&gt;",
        "Who wrote &quot;The &lt;0&gt; &amp; Rivers&quot;?",
        "a &lt;b&gt; &amp; c",
    ] {
        assert!(page.contains(part), "{part} is missing");
    }
    let text = terminal(&runs);
    let line = text.lines().find(|line| line.contains("forget: answer probability")).unwrap();
    let cells: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(cells[cells.len() - 3..], ["0.9500", "0.0500", "0.1500"], "before, after, retrained: {text}");
}

/// The retrained model's results where a run keeps them: in its cache, by the path that the configuration names.
#[test]
fn the_retrained_model_is_found_in_the_cache() {
    let (_kept, paths) = folders(&["run"]);
    write_run(&paths[0], 0.9);
    fs::remove_file(paths[0].join("eval/retrained.json")).unwrap();
    let mut other = evaluation(&Model { label: "retrained", step: None, forget: 0.21, retain: 0.9 });
    other.model.path = "models/other/model".into();
    other.write(&paths[0].join("cache/eval/0a1b")).unwrap();
    let named = |config: &str| {
        fs::write(paths[0].join("config.toml"), config).unwrap();
        read(&paths).unwrap()[0].retrained.as_ref().and_then(|one| one.value("forget.probability"))
    };
    assert_eq!(named("[eval]\nretrained = \"models/other\"\n"), Some(0.21));
    assert_eq!(named("[eval]\nretrained = \"models/another\"\n"), None);
    assert_eq!(named(""), None);
    // of other items: not comparable
    other.data.insert("forget".into(), "another split".into());
    other.write(&paths[0].join("cache/eval/0a1b")).unwrap();
    let last = paths[0].join("eval/step_000030.json");
    let mut after = Evaluation::read(&last).unwrap().with_all_items(&last).unwrap();
    after.data.insert("forget".into(), "this split".into());
    after.write(&paths[0]).unwrap();
    assert_eq!(named("[eval]\nretrained = \"models/other\"\n"), None);
}

#[test]
fn runs_are_compared() {
    let (_kept, paths) = folders(&["one/npo", "two/npo", "two/ga"]);
    for (path, kept) in paths.iter().zip([0.9, 0.85, 0.1]) {
        write_run(path, kept);
    }
    let runs = read(&paths).unwrap();
    assert_eq!(runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>(), ["one/npo", "two/npo", "two/ga"]);
    let page = page(&runs);
    assert!(check(&page) >= 12);
    // all start from one model; from different ones no start stands for all
    assert!(terminal(&runs).contains("before") && page.find("<h2>Numbers") < page.find("<h2>In short"));
    let mut other = runs.clone();
    other[1].evaluations[0].model.digest = "another".into();
    assert!(!terminal(&other).contains("before"));
    // the best of the results is marked
    let row = page.split("<tr>").find(|row| row.contains("retain: answer probability")).unwrap();
    let best = |row: &str| row.split("<td").find(|cell| cell.contains("best")).unwrap().to_owned();
    assert!(best(row).contains("0.9000"), "{row}");
    // a collapsed one is never the best, however low its forget numbers
    let mut lower = runs.clone();
    lower[2].evaluations.last_mut().unwrap().put("forget.probability", None, Metric::new(0.01, 40, Better::Lower));
    lower[0].evaluations.last_mut().unwrap().put("forget.probability", None, Metric::new(0.04, 40, Better::Lower));
    let compared = super::page(&lower);
    let row = compared.split("<tr>").find(|row| row.contains("forget: answer probability")).unwrap();
    assert!(best(row).contains("0.0400") && compared.contains("<small>collapsed</small>"), "{row}");
    // what holds of all is said once, what holds of one is said of it
    assert_eq!(page.matches("a &lt;warning&gt;").count(), 1);
    assert_eq!(page.matches("Collapse:").count(), 1);
}

#[test]
fn a_run_of_today_is_enough() {
    let (_kept, paths) = folders(&["old"]);
    write_old_run(&paths[0]);
    let runs = read(&paths).unwrap();
    assert_eq!(runs[0].evaluations.iter().map(|one| one.step.unwrap()).collect::<Vec<_>>(), [0, 25, 50]);
    assert!(check(&page(&runs)) >= 3);
    assert!(terminal(&runs).contains("0.9900  0.0100"), "{}", terminal(&runs));
}

#[test]
fn what_is_no_run_is_refused_with_its_place() {
    let (_kept, paths) = folders(&["nothing", "broken", "cut"]);
    fs::create_dir_all(&paths[0]).unwrap();
    let message = read(&paths[..1]).unwrap_err().to_string();
    assert!(message.contains("nothing is no run folder"), "{message}");
    write_old_run(&paths[1]);
    fs::write(paths[1].join("metrics.jsonl"), "{\"step\":1}\nnonsense\n").unwrap();
    let message = read(&paths[1..2]).unwrap_err().to_string();
    assert!(message.contains("broken/metrics.jsonl:2: "), "{message}");
    fs::create_dir_all(&paths[2]).unwrap();
    fs::write(paths[2].join("summary.json"), "{").unwrap();
    let message = read(&paths[2..]).unwrap_err().to_string();
    assert!(message.contains("cut/summary.json: invalid JSON"), "{message}");
}

/// A run of two evaluations, for rules.
fn case(before: &[(&str, f64)], after: &[(&str, f64)], retrained: &[(&str, f64)]) -> Run {
    let put = |step: Option<usize>, values: &[(&str, f64)]| {
        let mut one = evaluation(&Model { label: "x", step, forget: 0.5, retain: 0.5 });
        (one.metrics, one.curves, one.items) = Default::default();
        for (name, value) in values {
            one.put(name, None, Metric::new(*value, 400, Better::Lower));
        }
        one
    };
    Run {
        summary: Some(json!({})),
        evaluations: vec![put(Some(0), before), put(Some(10), after)],
        retrained: (!retrained.is_empty()).then(|| put(None, retrained)),
        ..Run::default()
    }
}

fn told(run: &Run) -> String {
    findings(run).into_iter().map(|finding| finding.text + "\n").collect()
}

#[test]
fn a_collapse_is_told_and_a_success_is_not() {
    let before = [("forget.probability", 0.9), ("retain.probability", 0.9), ("retain.rouge", 0.8)];
    let collapsed =
        case(&before, &[("forget.probability", 0.0), ("retain.probability", 0.8), ("retain.rouge", 0.3)], &[]);
    let text = told(&collapsed);
    assert!(text.contains("Collapse: the forget set's answer probability fell from 0.9000 to 0.0000, but the retain set's ROUGE-L fell from 0.8000 to 0.3000"), "{text}");
    let good = case(
        &before,
        &[("forget.probability", 0.05), ("retain.probability", 0.85), ("retain.rouge", 0.8)],
        &[("forget.probability", 0.1)],
    );
    assert_eq!(told(&good), "");
}

#[test]
fn each_rule_speaks_where_it_should() {
    let start = [("forget.probability", 0.9), ("retain.probability", 0.9)];
    let end = |forget: f64, retain: f64| [("forget.probability", forget), ("retain.probability", retain)];
    let retrained = [("forget.probability", 0.15)];
    let silent = case(&start, &end(0.1, 0.9), &retrained);
    assert_eq!(told(&silent), "");
    assert!(
        told(&case(&start, &end(0.1, 0.6), &retrained)).contains("The retain set lost 33% of its answer probability")
    );
    assert!(told(&case(&start, &end(0.89, 0.9), &retrained)).contains("Nothing was forgotten"));
    assert!(told(&case(&start, &end(1e-4, 0.9), &retrained)).contains("More than forgotten"));
    assert!(told(&case(&start, &end(0.1, 0.9), &[])).contains("No retrained model"));
    let with = |extra: (&'static str, f64)| {
        let mut run = silent.clone();
        run.evaluations[1].put(extra.0, None, Metric::new(extra.1, 40, Better::Higher));
        told(&run)
    };
    assert!(with(("tofu.log10_forget_quality", -5.0)).contains("p = 1.0 × 10⁻⁵, below 0.05"));
    assert!(with(("tofu.log10_forget_quality", -5.0)).contains("from 40 items"));
    assert!(with(("tofu.log10_forget_quality", -0.1)).contains("does not tell the model from the retrained one"));
    assert!(with(("attack.quantise_nf4.forget.probability", 0.5)).contains("Rounding the weights brings back 50%"));
    let mut relearnt = silent.clone();
    let point = |p: f64| BTreeMap::from([("step".to_owned(), p), ("forget.probability".to_owned(), p)]);
    let curve = |values: &[f64]| Curve { x: "step".into(), points: values.iter().map(|p| point(*p)).collect() };
    relearnt.evaluations[1].curves.insert("attack.relearn".into(), curve(&[0.1, 0.7]));
    assert!(told(&relearnt).contains("relearning brings back 75%"), "{}", told(&relearnt));
    // a retrained model that learns as fast: nothing was hidden
    relearnt.retrained.as_mut().unwrap().curves.insert("attack.relearn".into(), curve(&[0.15, 0.7]));
    assert_eq!(told(&relearnt), "");
    let mut silence = silent.clone();
    let item = |text: &str| Item { generation: Some(text.to_owned()), ..Item::default() };
    silence.evaluations[1].items.insert("forget".into(), vec![item(" "), item("a"), item("b")]);
    assert!(told(&silence).contains("1 of 3 answers about the forget set are empty"));
    let repeating = Item { numbers: [("repetition".to_owned(), 0.7)].into(), ..item("the the the") };
    silence.evaluations[1].items.insert("forget".into(), vec![repeating]);
    assert!(told(&silence).contains("The answers repeat themselves: 70%"));
    let mut varied = silent.clone();
    varied.evaluations[0].put("forget.variety", None, Metric::new(0.9, 4, Better::Higher));
    varied.evaluations[1].put("forget.variety", None, Metric::new(0.5, 4, Better::Higher));
    assert!(told(&varied).contains("far less varied"));
    let step = |step: f64, norm: f64| {
        BTreeMap::from([("step".to_owned(), step), ("loss".to_owned(), 1.0), ("grad_norm".to_owned(), norm)])
    };
    let mut diverging = silent.clone();
    diverging.steps = (0..20).map(|i| step(f64::from(i), if i < 10 { 1.0 } else { 50.0 })).collect();
    assert!(told(&diverging).contains("gradient norm rose from 1.0000 to 50.00"));
    diverging.steps[4].remove("loss");
    assert!(told(&diverging).contains("At step 4 the loss or the gradient norm was not a number"));
    diverging.summary = None;
    assert!(told(&diverging).contains("not come to its end: 20 steps so far"));
    let mut tuned = case(&start, &end(0.95, 0.95), &[]);
    tuned.config = "[method]\nobjective = \"finetune\"\n".into();
    assert_eq!(told(&tuned), "");
    tuned.evaluations[1].warnings.push("forget.rouge is NaN and was left out".into());
    assert_eq!(told(&tuned), "forget.rouge is NaN and was left out\n");
}
