use std::fmt::Write as _;

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::data::encode::tests::{Folder, qa};

/// A file of question and answer lines, and its source.
struct File {
    source: Source,
    _folder: TempDir,
}

impl File {
    fn new(pairs: &[(&str, &str)]) -> Self {
        let lines = pairs.iter().fold(String::new(), |mut text, (question, answer)| {
            writeln!(text, "{}", json!({ "question": question, "answer": answer })).unwrap();
            text
        });
        Self::text(&lines, "qa")
    }

    fn text(lines: &str, kind: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, lines).unwrap();
        let source = serde_json::from_value(json!({ "path": path, "kind": kind })).unwrap();
        Self { source, _folder: folder }
    }

    fn load(&self, encoder: &Encoder, max_length: usize) -> Result<Dataset, DataError> {
        Dataset::load("data.forget", &self.source, encoder, max_length)
    }
}

fn encoder() -> Encoder {
    Folder::new(&[[b' ', b'x']], |_| {}).explicit("{question}: ", "{answer}")
}

#[test]
fn everything_that_was_done_is_counted_and_told() {
    // with its ": " a question takes 2 tokens more, an answer 1 more for the end; " x" is one token
    let pairs = [("q", "a"), ("q", "xa"), ("q", "a"), ("qqq", "abcdef"), ("q", "a")];
    let dataset = File::new(&pairs).load(&encoder(), 8).unwrap();
    assert_eq!(dataset.lines, [1, 2, 3, 4, 5]);
    let tally = |count, first_line| Tally { count, first_line: Some(first_line) };
    let expected = Stats {
        records: 5,
        samples: 5,
        tokens: 5 + 5 + 5 + 8 + 5,
        scored: 2 + 3 + 2 + 3 + 2,
        longest: 8,
        truncated: tally(1, 4),
        tokens_lost: 4,
        straddling: tally(1, 2),
        duplicates: tally(2, 3),
        ..Stats::default()
    };
    assert_eq!(dataset.stats, expected);
    let warnings = dataset.warnings();
    assert_eq!(
        warnings[0],
        "data.forget: 1 of 5 samples are longer than data.max_length = 8; 4 tokens at their ends are cut off \
         (first: line 4)"
    );
    assert!(
        warnings[1].starts_with("data.forget: 1 of 5 samples have a token that holds both the end of the prompt and")
    );
    assert_eq!(warnings[2], "data.forget: 2 of 5 samples are equal to an earlier one (first: line 3)");
    assert_eq!(warnings.len(), 3);
    assert_eq!(File::new(&pairs[..1]).load(&encoder(), 8).unwrap().warnings(), Vec::<String>::new());
}

#[test]
fn windows_share_the_line_of_their_text() {
    let file = File::text("{\"text\": \"ab\"}\n\n{\"text\": \"abcdefgh\"}", "text");
    let dataset = file.load(&encoder(), 4).unwrap();
    assert_eq!(dataset.lines, [1, 3, 3]);
    let Stats { records, samples, windows, tokens_lost, split, .. } = dataset.stats;
    assert_eq!((records, samples, windows, tokens_lost), (2, 3, 2, 1));
    assert_eq!(split, Tally { count: 1, first_line: Some(3) });
    assert!(dataset.warnings().iter().any(|w| w.contains("1 of 2 texts are longer") && w.contains("became 2 windows")));
}

#[test]
fn prompts_that_leave_no_room_are_refused_with_the_length_to_set() {
    let file = File::new(&[("q", "a"), ("qqqqq", "a"), ("qqqqqqqq", "abc")]);
    let error = file.load(&encoder(), 6).unwrap_err().to_string();
    let expected = "data.jsonl: 2 of 3 samples have a prompt of data.max_length = 6 tokens or more, so that nothing \
                    of their answer is left to score; the first is line 2 with a prompt of 7 tokens; set \
                    data.max_length to at least 11 (14 cuts no sample), or remove them";
    assert!(error.ends_with(expected), "{error}");
    assert!(file.load(&encoder(), 11).is_ok());
    assert_eq!(file.load(&encoder(), 14).unwrap().stats.truncated.count, 0);
    assert!(file.load(&encoder(), 10).is_err());
    assert!(matches!(file.load(&encoder(), 1), Err(DataError::MaxLength { found: 1 })));
}

#[test]
fn many_threads_give_what_one_gives() {
    let pairs: Vec<_> = (0..1000).map(|i| (format!("question {i}"), format!("answer {}", i * 7 % 1000))).collect();
    let pairs: Vec<_> = pairs.iter().map(|(q, a)| (q.as_str(), a.as_str())).collect();
    let (file, encoder) = (File::new(&pairs), encoder());
    let dataset = file.load(&encoder, 64).unwrap();
    let alone: Vec<_> = pairs.iter().flat_map(|(q, a)| encoder.encode(&qa(q, a), 64).unwrap().samples).collect();
    assert_eq!(dataset.samples, alone);
    assert_eq!(dataset.lines, (1..=1000).collect::<Vec<_>>());
    assert_eq!(file.load(&encoder, 64).unwrap().digest, dataset.digest);
}

#[test]
fn the_digest_follows_tokens_scores_and_order() {
    let sample = |tokens: &[i32], scored: &[u32]| Sample { tokens: tokens.to_vec(), scored: scored.to_vec() };
    let base = [sample(&[1, 2, 3], &[1, 2]), sample(&[4, 5], &[1])];
    let others = [
        [sample(&[1, 2, 4], &[1, 2]), sample(&[4, 5], &[1])],
        [sample(&[1, 2, 3], &[2]), sample(&[4, 5], &[1])],
        [sample(&[4, 5], &[1]), sample(&[1, 2, 3], &[1, 2])],
        [sample(&[1, 2, 3, 1], &[2]), sample(&[4, 5], &[1])],
    ];
    assert!(others.iter().all(|other| digest(other) != digest(&base)));
    assert_eq!(digest(&base).len(), 64);
    // b3sum of the bytes 01 00 00 00 00 00 00 00 | 07 00 00 00 | 00 00 00 00 00 00 00 00
    let bytes = [&1u64.to_le_bytes()[..], &7i32.to_le_bytes(), &0u64.to_le_bytes()].concat();
    assert_eq!(digest(&[sample(&[7], &[])]), blake3::hash(&bytes).to_hex().to_string());
}

#[test]
fn overlap_finds_the_same_question_with_the_same_answer() {
    let encoder = encoder();
    let load = |pairs: &[(&str, &str)]| File::new(pairs).load(&encoder, 64).unwrap();
    let forget = load(&[("q", "a"), ("q", "b"), ("r", "a"), ("q", "a")]);
    let retain = load(&[("z", "z"), ("r", "a"), ("q", "a"), ("q", "a")]);
    assert_eq!(overlap(&forget, &retain), [(0, 2), (2, 1), (3, 2)]);
    assert_eq!(overlap(&forget, &load(&[("q", "c")])), []);
}

#[test]
fn an_error_of_one_sample_names_its_line() {
    let folder = Folder::new(&[], |_| {});
    folder.write(
        "chat_template.jinja",
        "{% if 'bad' in messages[0].content %}{{ raise_exception('bad word') }}{% endif %}",
    );
    let encoder = Encoder::from_folder(folder.path(), &serde_json::from_value(json!("chat")).unwrap(), None).unwrap();
    let error = File::new(&[("bad", "a")]).load(&encoder, 64).unwrap_err().to_string();
    assert!(error.contains("data.jsonl:1: the chat template of") && error.contains("bad word"), "{error}");
}

/// A sample with two alternates becomes two samples; a refusal is the sample's own or one of the run's, always the same one.
#[test]
fn preferred_answers_stand_beside_their_samples() {
    let lines = "{\"question\": \"q\", \"answer\": \"a\", \"alternates\": [\"b\", \"c\"]}\n\
                 {\"question\": \"x\", \"answer\": \"a\", \"alternates\": [\"d\"], \"idk\": \"no\"}\n";
    let (file, encoder) = (File::text(lines, "qa"), encoder());
    let load = |wanted, seed| {
        Dataset::load_pairs("data.forget", &file.source, &encoder, 80, wanted, &Refusals::own(seed)).unwrap()
    };
    let text = |sample: &Sample| encoder.decode(&sample.tokens);
    let alternates = load(Wanted::Alternates, 0);
    assert_eq!(alternates.preferred.iter().map(text).collect::<Vec<_>>(), ["q: b", "q: c", "x: d"]);
    assert_eq!(alternates.samples.iter().map(text).collect::<Vec<_>>(), ["q: a", "q: a", "x: a"]);
    assert_eq!((alternates.lines.clone(), alternates.stats.duplicates.count), (vec![1, 1, 2], 0));
    // the answer is scored, the prompt is not
    assert_eq!(alternates.preferred[1].scored, alternates.samples[1].scored);
    let refusals = load(Wanted::Refusal, 0);
    assert_eq!(text(&refusals.preferred[0]), format!("q: {}", Refusals::own(0).of(0)));
    assert_eq!(text(&refusals.preferred[1]), "x: no");
    assert_ne!(refusals.digest, load(Wanted::Nothing, 0).digest);
    assert_eq!(load(Wanted::Nothing, 0).preferred, []);
}
