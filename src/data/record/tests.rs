use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;

/// Writes `bytes` to a file and reads it as `data.forget` with the rest of the source's keys given as JSON.
fn read_bytes(bytes: &[u8], keys: &str) -> Result<Vec<Record>, String> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("forget.jsonl");
    fs::write(&path, bytes).unwrap();
    let mut source: Source = serde_json::from_str(&format!(r#"{{"path": "", {keys}}}"#)).unwrap();
    source.path = path;
    let shown = format!("{}/", folder.path().display());
    read("data.forget", &source, Wanted::Nothing).map_err(|e| e.to_string().replace(&shown, ""))
}

fn refusal(text: &str, keys: &str) -> String {
    read_bytes(text.as_bytes(), keys).expect_err("must be refused")
}

const QA: &str = r#""kind": "qa""#;
const CHAT: &str = r#""kind": "chat""#;
const TEXT: &str = r#""kind": "text""#;

#[test]
fn lines_are_counted_with_the_blank_ones() {
    let file =
        "\u{feff}{\"question\": \"q\", \"answer\": \"a\", \"id\": 3}\r\n\n  \n{\"answer\": \"b\", \"question\": \"p\"}";
    let qa = |question: &str, answer: &str| Content::Qa { question: question.into(), answer: answer.into() };
    let expected = [Record::plain(1, qa("q", "a")), Record::plain(4, qa("p", "b"))];
    assert_eq!(read_bytes(file.as_bytes(), QA).unwrap(), expected);
}

#[test]
fn the_limit_counts_samples_and_nothing_behind_it_is_read() {
    let file = "\n{\"text\": \"a\"}\n\n{\"text\": \"b\"}\nnot JSON";
    let records = read_bytes(file.as_bytes(), r#""kind": "text", "limit": 2"#).unwrap();
    assert_eq!(records.iter().map(|r| r.line).collect::<Vec<_>>(), [2, 4]);
    let error = refusal(file, r#""kind": "text", "limit": 0"#);
    assert_eq!(error, "forget.jsonl holds no sample: data.forget.limit is 0, expected at least 1 or no limit");
}

#[test]
fn fields_are_mapped() {
    let keys = r#""kind": "qa", "fields": {"question": "prompt", "answer": "response"}"#;
    let records = read_bytes(br#"{"prompt": "q", "response": "a", "question": 1}"#, keys).unwrap();
    assert_eq!(records[0].content, Content::Qa { question: "q".into(), answer: "a".into() });
}

#[test]
fn a_missing_field_names_the_fields_there_and_the_key_to_set() {
    let error = refusal("\n{\"prompt\": \"q\", \"response\": \"a\"}", QA);
    assert_eq!(
        error,
        "forget.jsonl:2: no field \"question\", which kind \"qa\" needs; the fields there: \"prompt\", \"response\"; \
         if one of them is the question, set data.forget.fields.question = \"...\""
    );
    let error = refusal(r#"{"messages": []}"#, QA);
    assert!(error.ends_with("; this looks like data.forget.kind = \"chat\""), "{error}");
    assert!(refusal("{}", TEXT).contains("the fields there: none;"));
}

#[test]
fn values_of_another_type_are_refused() {
    let field = |text: &str, keys: &str| refusal(text, keys).replacen("forget.jsonl:1: field ", "", 1);
    assert_eq!(field(r#"{"question": "q", "answer": 7}"#, QA), "\"answer\": found the number 7, expected a string");
    assert_eq!(
        field(r#"{"question": "q", "answer": ["a", "b"]}"#, QA),
        "\"answer\": found a list of 2, expected a string (several answers to one question are not supported: write \
         one line for each)"
    );
    assert_eq!(
        field(r#"{"question": " \n", "answer": "a"}"#, QA),
        "\"question\": found a blank string, expected some text"
    );
    assert_eq!(
        field(r#"{"messages": "hello"}"#, CHAT),
        "\"messages\": found a string, expected a list of {role, content} objects"
    );
    assert_eq!(field(r#"{"text": null}"#, TEXT), "\"text\": found null, expected a string");
}

#[test]
fn chats_have_known_roles_text_and_an_answer() {
    let message = |role: &str, content: &str| format!(r#"{{"role": "{role}", "content": {content}}}"#);
    let chat = |turns: &[String]| format!(r#"{{"messages": [{}]}}"#, turns.join(", "));
    let user = message("user", "\"q\"");
    let good = chat(&[message("system", "\"\""), user.clone(), message("assistant", "\"a\"")]);
    let records = read_bytes(good.as_bytes(), CHAT).unwrap();
    let Content::Chat(messages) = &records[0].content else { panic!("not a chat: {records:?}") };
    assert_eq!(messages.iter().map(|m| m.role).collect::<Vec<_>>(), [Role::System, Role::User, Role::Assistant]);

    let field = |turns: &[String]| refusal(&chat(turns), CHAT).replacen("forget.jsonl:1: field \"messages\"", "", 1);
    assert_eq!(
        field(&[user.clone(), message("bot", "\"a\"")]),
        "[1].role: found \"bot\", expected \"system\", \"user\", \"assistant\" or \"tool\""
    );
    assert_eq!(
        field(&[user.clone(), message("assistant", "[{\"type\": \"text\"}]")]),
        "[1].content: found a list of 1, expected a string"
    );
    assert_eq!(
        field(&[user.clone(), message("assistant", "\"\"")]),
        "[1].content: found a blank string, expected some text"
    );
    assert_eq!(
        field(std::slice::from_ref(&user)),
        ": found no assistant turn, expected at least one, since only those are scored"
    );
    assert_eq!(
        field(&[message("assistant", "\"a\"")]),
        ": found an assistant turn first, expected a user turn before it"
    );
    assert_eq!(
        field(&[r#"{"from": "human", "value": "q"}"#.to_owned()]),
        "[0].role: found only {from, value}, expected a string"
    );
    let calls = r#"{"role": "assistant", "content": "a", "tool_calls": [{}]}"#.to_owned();
    assert!(field(&[user, calls]).starts_with("[1].tool_calls: found tool calls, expected no such field"));
}

#[test]
fn what_is_not_json_lines_is_told_apart() {
    let json = refusal("{\"text\": \"a\"}\n{\"text\": }", TEXT);
    assert_eq!(json, "forget.jsonl:2: invalid JSON: expected value at column 10");
    let pretty = refusal("{\n  \"text\": \"a\"\n}", TEXT);
    assert!(
        pretty.starts_with("forget.jsonl:1: invalid JSON: ") && pretty.ends_with("must stand on one line"),
        "{pretty}"
    );
    assert_eq!(
        refusal("{\"text\": \"a\"}\n[1]", TEXT),
        "forget.jsonl:2: found a list of 1, expected an object with the fields of kind \"text\""
    );
    let array = read_bytes(b"[{\"text\": \"a\"},\n{\"text\": \"b\"}]", TEXT).unwrap();
    assert_eq!(array[1], Record::plain(2, Content::Text("b".into())));
    assert!(refusal("PAR1...", TEXT).starts_with("forget.jsonl is no Parquet file that can be read"));
    assert_eq!(
        read_bytes(b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}", TEXT).unwrap_err(),
        "forget.jsonl:2: byte 11 of the line is not UTF-8"
    );
    let empty = "forget.jsonl holds no sample: it is empty or all its lines are blank";
    assert_eq!([refusal("", TEXT), refusal("\n \n", TEXT)], [empty, empty]);
}

#[test]
fn a_path_that_is_no_file_says_what_is_there() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("forget10.jsonl"), "{}").unwrap();
    fs::write(folder.path().join("notes.txt"), "").unwrap();
    let source =
        |path: PathBuf| Source { path, kind: Kind::Text, fields: Default::default(), limit: None, split: None };
    let missing =
        read("data.forget", &source(folder.path().join("forget.jsonl")), Wanted::Nothing).unwrap_err().to_string();
    assert!(missing.contains("No such file") && missing.ends_with("; beside it are forget10.jsonl"), "{missing}");
    fs::remove_file(folder.path().join("forget10.jsonl")).unwrap();
    let folder = read("data.forget", &source(folder.path().to_owned()), Wanted::Nothing).unwrap_err().to_string();
    assert!(folder.contains("is a folder without data files"), "{folder}");
}

fn pairs(text: &str, keys: &str, wanted: Wanted) -> Result<Vec<Vec<String>>, String> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("forget.jsonl");
    fs::write(&path, text).unwrap();
    let mut source: Source = serde_json::from_str(&format!(r#"{{"path": "", {keys}}}"#)).unwrap();
    source.path = path;
    let shown = format!("{}/", folder.path().display());
    let records = read("data.forget", &source, wanted).map_err(|e| e.to_string().replace(&shown, ""))?;
    Ok(records.into_iter().map(|record| record.preferred).collect())
}

#[test]
fn preferred_answers_are_found_by_kind() {
    let preference = r#"{"prompt": "q", "chosen": "c", "rejected": "r"}"#;
    assert_eq!(pairs(preference, r#""kind": "preference""#, Wanted::Chosen).unwrap(), [["c"]]);
    let records = read_bytes(preference.as_bytes(), r#""kind": "preference""#).unwrap();
    assert_eq!(records[0].content, Content::Qa { question: "q".into(), answer: "r".into() });

    for answer in ["1", "\"B\"", "\"two\""] {
        let choice = format!(r#"{{"question": "q", "choices": ["one", "two", "three"], "answer": {answer}}}"#);
        assert_eq!(pairs(&choice, r#""kind": "choice""#, Wanted::Alternates).unwrap(), [["one", "three"]]);
        let records = read_bytes(choice.as_bytes(), r#""kind": "choice""#).unwrap();
        assert_eq!(records[0].content, Content::Qa { question: "q".into(), answer: "two".into() });
    }
    let qa = r#"{"question": "q", "answer": "a", "idk": "no idea", "alternates": ["b", "c"], "other": "d"}"#;
    assert_eq!(pairs(qa, QA, Wanted::Alternates).unwrap(), [["b", "c"]]);
    assert_eq!(pairs(qa, QA, Wanted::Refusal).unwrap(), [["no idea"]]);
    let mapped = r#""kind": "qa", "fields": {"alternates": "other"}"#;
    assert_eq!(pairs(qa, mapped, Wanted::Alternates).unwrap(), [["d"]]);
    assert_eq!(pairs(r#"{"question": "q", "answer": "a"}"#, QA, Wanted::Refusal).unwrap(), [Vec::<String>::new()]);
}

#[test]
fn samples_without_another_answer_are_refused() {
    let qa = r#"{"question": "q", "answer": "a"}"#;
    let error = pairs(qa, QA, Wanted::Alternates).unwrap_err();
    assert!(error.contains("no field \"alternates\""), "{error}");
    let error = pairs(qa, QA, Wanted::Chosen).unwrap_err();
    assert!(error.starts_with("data.forget.kind is \"qa\": the method needs another answer"), "{error}");
    let error = pairs(r#"{"text": "t"}"#, TEXT, Wanted::Refusal).unwrap_err();
    assert!(error.contains("expected kind \"qa\", \"choice\" or \"preference\""), "{error}");
    let choice = r#"{"question": "q", "choices": ["one", "two"], "answer": "D"}"#;
    let error = refusal(choice, r#""kind": "choice""#);
    assert!(error.contains("expected the index from 0, the letter or the text of one of 2 choices"), "{error}");
}
