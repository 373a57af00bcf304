use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::json;
use tempfile::TempDir;

use super::*;

fn all(path: &Path, split: Option<&str>) -> Result<Vec<(usize, Value)>, String> {
    let rows = rows(path, split).map_err(|e| e.to_string())?;
    rows.map(|row| row.map(|row| (row.number, row.value)).map_err(|e| e.to_string())).collect()
}

/// A Parquet file as data sets have them: a text, a list of texts and a number.
fn write_parquet(path: &Path, rows: &[(&str, &[&str], i64)]) {
    let schema = "message schema { required binary question (UTF8);
        optional group choices (LIST) { repeated group list { optional binary element (UTF8); } }
        required int64 answer; }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let questions: Vec<ByteArray> = rows.iter().map(|row| row.0.into()).collect();
    column.typed::<ByteArrayType>().write_batch(&questions, None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let texts: Vec<ByteArray> = rows.iter().flat_map(|row| row.1.iter().map(|&text| text.into())).collect();
    let repetition: Vec<i16> = rows.iter().flat_map(|row| (0..row.1.len()).map(|i| i16::from(i > 0))).collect();
    column.typed::<ByteArrayType>().write_batch(&texts, Some(&vec![3; texts.len()]), Some(&repetition)).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let answers: Vec<i64> = rows.iter().map(|row| row.2).collect();
    column.typed::<Int64Type>().write_batch(&answers, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn every_published_format_gives_the_same_rows() {
    let folder = TempDir::new().unwrap();
    let values = [
        json!({ "question": "q\u{e9}", "choices": ["a", "b"], "answer": 1 }),
        json!({ "question": "p", "choices": ["c"], "answer": 0 }),
    ];
    let want: Vec<(usize, Value)> = values.iter().cloned().enumerate().map(|(i, value)| (i + 1, value)).collect();
    let write = |name: &str, text: String| {
        fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name)
    };
    let lines = write("a.json", format!("\u{feff}{}\n{}\n", values[0], values[1]));
    assert_eq!(all(&lines, None).unwrap(), want);
    let array = write("b.json", format!(" {:#}", json!(values)));
    assert_eq!(all(&array, None).unwrap(), want);
    let parquet = folder.path().join("c.parquet");
    write_parquet(&parquet, &[("q\u{e9}", &["a", "b"], 1), ("p", &["c"], 0)]);
    assert_eq!(all(&parquet, None).unwrap(), want);
    assert_eq!(find(folder.path(), "c").unwrap(), parquet);
}

#[test]
fn a_data_set_folder_has_splits_and_shards() {
    let folder = TempDir::new().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(folder.path().join("dataset_infos.json"), "{}").unwrap();
    write_parquet(&data.join("train-00001-of-00002.parquet"), &[("two", &["x"], 0)]);
    write_parquet(&data.join("train-00000-of-00002.parquet"), &[("one", &["x"], 0)]);
    let questions = |split| -> Result<Vec<String>, String> {
        let rows = all(folder.path(), split)?;
        Ok(rows.iter().map(|(_, value)| value["question"].as_str().unwrap().to_owned()).collect())
    };
    assert_eq!(questions(None).unwrap(), ["one", "two"]);
    fs::write(data.join("test.jsonl"), "{\"question\": \"three\"}").unwrap();
    assert_eq!(questions(Some("test")).unwrap(), ["three"]);
    let error = questions(None).unwrap_err();
    assert!(
        error.ends_with("is a folder with the splits test, train: write split = \"...\" with one of them"),
        "{error}"
    );
    assert!(questions(Some("dev")).unwrap_err().contains("no split \"dev\""));
}

#[test]
fn what_cannot_be_read_is_told_with_its_place() {
    let folder = TempDir::new().unwrap();
    let message = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        all(&path, None).unwrap_err().replace(&format!("{}/", folder.path().display()), "")
    };
    assert_eq!(
        message("a.jsonl", b"{}\n{"),
        "a.jsonl:2: invalid JSON: EOF while parsing an object at column 1; a JSON object must stand on one line"
    );
    assert!(message("b.json", b"[{},\n{]").starts_with("b.json:2: invalid JSON: "));
    assert!(message("c.parquet", b"PAR1 cut off").starts_with("c.parquet is no Parquet file that can be read: "));
    assert!(message("d.jsonl", b"\x1f\x8b").contains("a gzip file"));
    let error = find(folder.path(), "forget10").unwrap_err().to_string();
    assert!(error.contains("no forget10") && error.contains("it holds a.jsonl, b.json, c.parquet, d.jsonl"), "{error}");
}

#[test]
fn fields_are_asked_for_by_name() {
    let row = |value: Value| Row { path: Path::new("f.jsonl").into(), number: 3, value };
    let one = row(json!({ "a": "x", "list": ["y", "z"], "bad": ["y", 1], "blank": " ", "none": [] }));
    assert_eq!(one.texts("list", "tofu").unwrap(), ["y", "z"]);
    assert_eq!(one.texts("a", "tofu").unwrap(), ["x"]);
    let message = |field| one.texts(field, "tofu").unwrap_err().to_string();
    assert_eq!(message("bad"), "f.jsonl:3: field \"bad\"[1]: found the number 1, expected a string");
    assert_eq!(message("none"), "f.jsonl:3: field \"none\": found an empty list, expected at least one string");
    assert!(message("b").starts_with("f.jsonl:3: no field \"b\", which kind \"tofu\" needs; the fields there: \"a\""));
    assert!(one.text("blank", "tofu").unwrap_err().to_string().ends_with("found a blank string, expected some text"));
    assert!(row(json!([1])).object("tofu").unwrap_err().to_string().contains("found a list of 1"));
}
