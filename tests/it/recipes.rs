//! The configurations of `configs/methods` run, one step each, on data and a model that `dunlearn data synth` makes; and README and
//! docs list what the program lists.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::program::{Workshop, dunlearn, mpirun};

const MODEL: &[&str] = &[
    "--authors",
    "10",
    "--questions",
    "4",
    "--vocab",
    "400",
    "--hidden",
    "32",
    "--layers",
    "8",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--intermediate",
    "48",
    "--weights",
];

fn recipes() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/methods");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn lists() -> Value {
    serde_json::from_str(&dunlearn(&["methods", "--json"]).text).unwrap()
}

fn read(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

#[test]
fn every_recipe_takes_a_step() {
    let workshop = Workshop::new(MODEL);
    let recipes = recipes();
    for (index, path) in recipes.iter().enumerate() {
        let text = std::fs::read_to_string(path).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let text = text.replace("runs/quickstart_base/model", "{data}/model").replace("runs/quickstart_data", "{data}");
        let config = workshop.config(&format!("{name}.toml"), &text.replace("runs/methods", "{runs}"));
        let length = if text.contains("\nsteps =") { "train.steps=2" } else { "train.epochs=2" };
        let set = [length, "train.precision=f32", "train.global_batch=8", "eval.max_samples=4"];
        let mut arguments = vec!["--config", config.as_str()];
        set.iter().for_each(|item| arguments.extend(["--set", item]));
        // the weight space's methods make nothing but a model, and F-Learning's second half starts from one
        if !text.contains("[subspace]") {
            arguments.extend(["--set", "export.model=false"]);
        }
        // every third one on two tensor-parallel ranks
        let done = if index % 3 == 0 {
            arguments.extend(["--set", "parallel.tp=2"]);
            mpirun(2, &arguments)
        } else {
            dunlearn(&arguments)
        };
        assert!(done.success, "{name}: {}", done.text);
        let steps = workshop.steps(name);
        assert!(steps.len() >= 2, "{name}: {} steps", steps.len());
        for step in &steps {
            let number = |key: &str| step[key].as_f64().unwrap_or(f64::NAN);
            assert!(number("loss").is_finite() && number("grad_norm") > 0.0, "{name}: {step}");
        }
    }
}

/// The attacks on the quickstart's model, with fewer steps, on the model of the workshop.
#[test]
fn the_quickstarts_attacks_run() {
    let workshop = Workshop::new(MODEL);
    let text = read("configs/quickstart_attack.toml");
    let text = text.replace("runs/quickstart_base/model", "{data}/model").replace("runs/quickstart_data", "{data}");
    let config = workshop.config("attack.toml", &text.replace("\"runs/quickstart\"", "\"{runs}/attacked\""));
    // a model of the run that is another than the one before
    let model = workshop.path("attacked/model");
    std::fs::create_dir_all(&model).unwrap();
    for entry in std::fs::read_dir(workshop.path("data/model")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let weights = model.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let len = bytes.len();
    bytes[len - 40_000..].as_chunks_mut::<4>().0.reverse();
    std::fs::write(&weights, bytes).unwrap();
    let fewer = ["relearn", "benign"].map(|name| format!("eval.attack.{name}.training.steps=2"));
    let mut arguments = vec!["attack", "--config", &config];
    fewer.iter().for_each(|item| arguments.extend(["--set", item]));
    arguments.extend(["--set", "eval.max_samples=4"]);
    let done = mpirun(2, &arguments);
    assert!(done.success, "{}", done.text);
    let results = std::fs::read_to_string(workshop.path("attacked/eval/attack.json")).unwrap();
    let results: Value = serde_json::from_str(&results).unwrap();
    let metrics = results["metrics"].as_object().unwrap();
    for attack in ["int8", "int4", "nf4", "in_context", "krs", "latent", "relearn", "benign"] {
        let start = format!("attack.{attack}.");
        assert!(metrics.keys().any(|name| name.starts_with(&start)), "{attack}: {:?}", metrics.keys());
    }
    // what needs the original model is refused before the minutes that the others take
    let same = ["attack", "--config", &config, "--model", &workshop.path("data/model").display().to_string()];
    let refused = dunlearn(&[&same[..], &["--set", "parallel.tp=1"]].concat());
    assert!(!refused.success && refused.text.contains("eval.attack.krs needs the original model"), "{}", refused.text);
    assert!(!refused.text.contains("attacks on the"), "{}", refused.text);
}

/// Every value of a recipe says where it is from, and every objective has a recipe.
#[test]
fn recipes_are_complete_and_sourced() {
    let recipes: Vec<String> = recipes().iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    for text in &recipes {
        let mut table = "";
        for (before, line) in text.lines().zip(text.lines().skip(1)) {
            table = if line.starts_with('[') { line } else { table };
            let is_value = line.contains(" = ") && !line.starts_with(['#', ' ']);
            if is_value && ["[method]", "[train]", "[optimizer]"].contains(&table) {
                assert!(line.contains("  # ") || before.starts_with("# "), "no source: {line}");
            }
        }
    }
    for listed in lists()["objectives"].as_array().unwrap() {
        let name = listed["name"].as_str().unwrap();
        let line = format!("\nobjective = \"{name}\"");
        assert!(name == "finetune" || recipes.iter().any(|text| text.contains(&line)), "no recipe for {name}");
    }
}

/// README's tables are what `dunlearn methods` says, and docs/methods.md has a section and the defaults of each.
#[test]
fn the_lists_of_methods_agree() {
    let (readme, docs, lists) = (read("README.md"), read("docs/methods.md"), lists());
    let in_one_line = docs.split_whitespace().collect::<Vec<_>>().join(" ");
    let link = |source: &str| match source.rsplit('/').next() {
        Some(number) if !source.is_empty() => format!("[{number}]({source})"),
        _ => String::new(),
    };
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut rows = Vec::new();
    for listed in lists["objectives"].as_array().unwrap() {
        let (name, source) = (text(&listed["name"]), link(listed["source"].as_str().unwrap()));
        let bytes = listed["bytes_per_parameter"].as_u64().unwrap();
        let (title, needs) = (text(&listed["title"]), text(&listed["needs_words"]));
        rows.push(format!("| `{name}` | {title} | {needs} | {bytes} | {source} |"));
        assert!(docs.contains(&format!("\n### `{name}`")), "docs/methods.md has no section {name}");
        for key in listed["keys"].as_array().unwrap() {
            let key = text(key);
            assert!(
                key == "update = []" || in_one_line.contains(&format!("`{key}`")),
                "docs/methods.md: {name} lacks `{key}`"
            );
        }
    }
    for entry in lists["retain"].as_array().unwrap() {
        let (name, source) = (text(&entry["name"]), link(entry["source"].as_str().unwrap()));
        let needs = Some(text(&entry["reference"])).filter(|needs| !needs.is_empty());
        let needs = needs.map_or_else(String::new, |needs| format!("reference {needs}"));
        rows.push(format!("| `{name}` | {} | {needs} | {source} |", text(&entry["title"])));
    }
    let scopes = read("docs/scopes.md");
    for entry in lists["scores"].as_array().unwrap() {
        let (name, title, source) =
            (text(&entry["name"]), text(&entry["title"]), link(entry["source"].as_str().unwrap()));
        let row = scopes.lines().find(|line| line.starts_with(&format!("| `{name}` | {title} |")));
        assert!(row.is_some_and(|row| row.contains(&source)), "docs/scopes.md has no row of {name}: {title}, {source}");
    }
    let missing: Vec<&String> = rows.iter().filter(|row| !readme.contains(row.as_str())).collect();
    assert!(
        missing.is_empty(),
        "README.md lacks:\n{}",
        missing.iter().map(|row| format!("{row}\n")).collect::<String>()
    );
    let shown = dunlearn(&["methods"]);
    assert!(shown.success && shown.text.contains("altpo"), "{}", shown.text);
}
