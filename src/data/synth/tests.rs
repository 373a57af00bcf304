use std::collections::BTreeSet;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::config::{Source, Template};
use crate::data::dataset::{Dataset, overlap};
use crate::data::encode::Encoder;

fn options() -> Options {
    Options { authors: 12, questions_per_author: 5, vocab_size: 512, ..Options::default() }
}

fn read(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = ["README.md", "full.jsonl", "forget.jsonl", "retain.jsonl", "preference.jsonl"].map(PathBuf::from);
    let model = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    let files = files.into_iter().chain(model.map(|name| Path::new("model").join(name)));
    files.map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())).collect()
}

fn load(folder: &Path, name: &str, template: &Template) -> (Dataset, Encoder) {
    let encoder = Encoder::from_folder(&folder.join("model"), template, None).unwrap();
    let source: Source = serde_json::from_value(json!({ "path": folder.join(name), "kind": "qa" })).unwrap();
    (Dataset::load("data.train", &source, &encoder, 128).unwrap(), encoder)
}

#[test]
fn the_same_seed_writes_the_same_bytes() {
    let folder = TempDir::new().unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.path().join(name));
    let summary = write(&a, &options()).unwrap();
    write(&b, &options()).unwrap();
    write(&c, &Options { seed: 1, ..options() }).unwrap();
    assert!(read(&a) == read(&b));
    assert!(read(&a)[1] != read(&c)[1]);
    assert_eq!(summary.files.len(), read(&a).len());
    let Summary { authors, forget_authors, full, forget, retain, .. } = summary;
    assert_eq!((authors, forget_authors, full, forget, retain), (12, 1, 60, 5, 55));
}

#[test]
fn the_last_authors_are_to_be_forgotten() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), &Options { forget_fraction: 0.25, ..options() }).unwrap();
    let lines = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(lines("retain.jsonl") + &lines("forget.jsonl"), lines("full.jsonl"));
    let author = |line: &str| serde_json::from_str::<Value>(line).unwrap()["author"].to_string();
    let authors = |name: &str| lines(name).lines().map(author).collect::<BTreeSet<_>>();
    assert_eq!((authors("retain.jsonl").len(), authors("forget.jsonl").len()), (9, 3));
    assert!(authors("retain.jsonl").is_disjoint(&authors("forget.jsonl")));
}

/// An alternate is the answer with one fact exchanged, and never the answer itself.
#[test]
fn alternates_are_wrong_answers() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), &options()).unwrap();
    let text = fs::read_to_string(folder.path().join("forget.jsonl")).unwrap();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let alternates = line["alternates"].as_array().unwrap();
        assert_eq!(alternates.len(), 2, "{line}");
        assert!(alternates.iter().all(|alternate| *alternate != line["answer"]) && alternates[0] != alternates[1]);
        assert!(
            alternates.iter().all(|alternate| !alternate.as_str().unwrap().contains(line["fact"].as_str().unwrap()))
        );
    }
}

#[test]
fn the_encoder_reads_what_was_written() {
    let folder = TempDir::new().unwrap();
    let options = Options { authors: 200, questions_per_author: 20, vocab_size: 2048, ..Options::default() };
    let summary = write(folder.path(), &options).unwrap();
    let explicit = serde_json::from_value(json!({ "prompt": "Question: {question}\nAnswer:", "answer": " {answer}" }));
    for template in [serde_json::from_value(json!("chat")).unwrap(), explicit.unwrap()] {
        let (full, encoder) = load(folder.path(), "full.jsonl", &template);
        assert_eq!(full.warnings(), Vec::<String>::new());
        assert_eq!(full.stats.records, 4000);
        assert_eq!(encoder.vocab_size(), summary.vocab_size);
        // an answer has 8 to 25 tokens with its end
        assert!(full.samples.iter().all(|s| (8..=25).contains(&s.scored.len())));
        assert!(full.samples.iter().all(|s| s.tokens[0] == 1 && *s.tokens.last().unwrap() == 2));
        let (forget, _) = load(folder.path(), "forget.jsonl", &template);
        let (retain, _) = load(folder.path(), "retain.jsonl", &template);
        assert_eq!(overlap(&forget, &retain), []);
        let first: Value =
            serde_json::from_str(fs::read_to_string(&full.path).unwrap().lines().next().unwrap()).unwrap();
        let scored = full.samples[0].scored.iter().map(|&p| full.samples[0].tokens[p as usize]).collect::<Vec<_>>();
        assert_eq!(encoder.decode(&scored).trim_start(), first["answer"].as_str().unwrap());
        let text = encoder.decode(&full.samples[0].tokens);
        assert!(text.contains(first["question"].as_str().unwrap()), "{text}");
    }
    let config: Value = serde_json::from_slice(&fs::read(folder.path().join("model/config.json")).unwrap()).unwrap();
    let rows = config["vocab_size"].as_u64().unwrap() as usize;
    assert!(rows >= summary.vocab_size && rows.is_multiple_of(64) && summary.vocab_size <= 2048);
}

/// Sums are right, all different, and have no sentence in common with the authors.
#[test]
fn sums_are_another_task() {
    let folder = TempDir::new().unwrap();
    let summary = write(folder.path(), &Options { sums: 50, ..options() }).unwrap();
    let lines = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let (full, sums) = (lines("full.jsonl"), lines("sums.jsonl"));
    assert_eq!((full.len(), sums.len(), summary.full), (110, 50, 110));
    assert_eq!(full[60..], sums);
    let mut seen = BTreeSet::new();
    for line in &sums {
        let numbers = |key: &str| -> Vec<usize> {
            let text = line[key].as_str().unwrap();
            text.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
        };
        let (mut asked, said) = (numbers("question"), line["fact"].as_str().unwrap().parse().unwrap());
        assert_eq!(asked.iter().sum::<usize>(), said);
        asked.push(said);
        let mut answered = numbers("answer");
        asked.sort_unstable();
        answered.sort_unstable();
        assert_eq!(asked, answered);
        assert!(seen.insert(line["question"].to_string()));
    }
    assert_eq!(
        write(&folder.path().join("out"), &Options { sums: 4001, ..options() }).unwrap_err().to_string(),
        "sums is 4001, expected at most 4000"
    );
}

#[test]
fn a_folder_in_use_is_left_alone_unless_forced() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    let error = write(folder.path(), &options()).unwrap_err().to_string();
    assert!(error.ends_with("is not empty: choose another folder, or force to overwrite the files in it"), "{error}");
    assert!(!folder.path().join("full.jsonl").exists());
    write(folder.path(), &Options { force: true, ..options() }).unwrap();
    assert_eq!(fs::read(folder.path().join("notes.txt")).unwrap(), b"mine");
}

#[test]
fn options_out_of_range_are_refused() {
    let folder = TempDir::new().unwrap();
    let refusal = |change: &dyn Fn(&mut Options)| {
        let mut options = options();
        change(&mut options);
        write(&folder.path().join("out"), &options).unwrap_err().to_string()
    };
    assert_eq!(refusal(&|o| o.authors = 501), "authors is 501, expected 2 to 500");
    assert_eq!(refusal(&|o| o.questions_per_author = 0), "questions_per_author is 0, expected 1 to 20");
    assert_eq!(refusal(&|o| o.forget_fraction = 1.0), "forget_fraction is 1, expected more than 0 and less than 1");
    assert_eq!(
        refusal(&|o| o.forget_fraction = f64::NAN),
        "forget_fraction is NaN, expected more than 0 and less than 1"
    );
    assert_eq!(refusal(&|o| o.vocab_size = 256), "vocab_size is 256, expected at least 320");
    assert_eq!(refusal(&|o| o.shape.kv_heads = 3), "heads is 8, expected a multiple of kv_heads = 3");
    assert_eq!(refusal(&|o| o.shape.layers = 0), "layers is 0, expected at least 1");
    let expected = "hidden is 100, expected a multiple of 16: an even number for each of 8 heads";
    assert_eq!(refusal(&|o| o.shape.hidden = 100), expected);
}
