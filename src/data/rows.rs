//! Rows of a data set in the formats that data sets are published in: JSON lines, one JSON array, Parquet, and a Hugging Face data set
//! folder with files of these kinds. A row is a JSON value and the place where it stands.

#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use parquet::file::reader::SerializedFileReader;
use serde_json::{Map, Value};

use super::error::DataError;

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// File that holds it.
    pub path: Rc<Path>,
    /// Line of that file, counted from 1; in a JSON array or a Parquet file the row.
    pub number: usize,
    pub value: Value,
}

/// Rows in file order.
pub type Rows = Box<dyn Iterator<Item = Result<Row, DataError>>>;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
const FORMATS: [&str; 3] = ["jsonl", "json", "parquet"];

/// Opens a file, or the files of one split in a data set folder; `split` may be left out where there is only one.
///
/// # Errors
/// A path that is not there, is of no known format, or is a folder with several splits. Rows that do not parse are errors of the
/// iterator.
pub fn rows(path: &Path, split: Option<&str>) -> Result<Rows, DataError> {
    if path.is_dir() {
        let files = files_of(path, split)?;
        let parts: Result<Vec<Rows>, DataError> = files.iter().map(|file| rows_of_file(file)).collect();
        return Ok(Box::new(parts?.into_iter().flatten()));
    }
    if let Some(split) = split {
        return Err(DataError::Split {
            path: path.to_owned(),
            split: split.to_owned(),
            found: "a file, which has no splits".into(),
        });
    }
    rows_of_file(path)
}

/// The file or folder of a published data set that has this name: `NAME.jsonl`, `NAME.json`, `NAME.parquet` or a folder `NAME`.
///
/// # Errors
/// None of them is there; says what is.
pub fn find(folder: &Path, name: &str) -> Result<PathBuf, DataError> {
    let named = |extension: &&str| folder.join(format!("{name}.{extension}"));
    let mut candidates = FORMATS.iter().map(named).chain([folder.join(name)]);
    candidates.find(|path| path.exists()).ok_or_else(|| DataError::NoSet {
        folder: folder.to_owned(),
        name: name.to_owned(),
        hint: if folder.is_dir() { listing("; it holds ", folder) } else { ": there is no such folder".to_owned() },
    })
}

impl Row {
    /// The fields of the row; `kind` is what needs them.
    ///
    /// # Errors
    /// A row that is no object.
    pub fn object(&self, kind: &'static str) -> Result<&Map<String, Value>, DataError> {
        self.value.as_object().ok_or_else(|| DataError::NotObject {
            path: self.path.to_path_buf(),
            line: self.number,
            found: describe(&self.value),
            kind,
        })
    }

    /// The text of a field.
    ///
    /// # Errors
    /// A field that is missing, no string or blank.
    pub fn text(&self, field: &str, kind: &'static str) -> Result<String, DataError> {
        self.filled(format!("{field:?}"), self.field(field, kind)?)
    }

    /// The texts of a field that holds a list of them, or a single one.
    ///
    /// # Errors
    /// A field that is missing, or holds anything else, or nothing.
    pub fn texts(&self, field: &str, kind: &'static str) -> Result<Vec<String>, DataError> {
        match self.field(field, kind)? {
            Value::Array(values) if values.is_empty() => {
                Err(self.wrong(format!("{field:?}"), "an empty list".to_owned(), "at least one string"))
            }
            Value::Array(values) => {
                let filled = |(i, value): (usize, &Value)| self.filled(format!("{field:?}[{i}]"), value);
                values.iter().enumerate().map(filled).collect()
            }
            value => Ok(vec![self.filled(format!("{field:?}"), value)?]),
        }
    }

    /// The value of a field.
    ///
    /// # Errors
    /// A field that is missing; says which are there.
    pub fn field(&self, field: &str, kind: &'static str) -> Result<&Value, DataError> {
        let object = self.object(kind)?;
        object.get(field).ok_or_else(|| {
            let present: Vec<_> = object.keys().map(|key| format!("{key:?}")).collect();
            DataError::MissingField {
                path: self.path.to_path_buf(),
                line: self.number,
                field: field.to_owned(),
                kind,
                present: if present.is_empty() { "none".to_owned() } else { present.join(", ") },
                fix: "is this another file of the data set?".to_owned(),
            }
        })
    }

    /// A field that holds something else than expected.
    pub fn wrong(&self, field: String, found: String, expected: &str) -> DataError {
        let (path, line, expected) = (self.path.to_path_buf(), self.number, expected.to_owned());
        DataError::Field { path, line, field, found, expected }
    }

    fn filled(&self, field: String, value: &Value) -> Result<String, DataError> {
        match value {
            Value::String(text) if text.trim().is_empty() => {
                Err(self.wrong(field, "a blank string".to_owned(), "some text"))
            }
            Value::String(text) => Ok(text.clone()),
            other => Err(self.wrong(field, describe(other), "a string")),
        }
    }
}

/// A JSON value in words.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("the truth value {value}"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// Splits of a data set folder, each once; none where it is no such folder.
pub fn splits(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = data_files(folder).into_iter().map(|(split, _)| split).collect();
    names.dedup();
    names
}

/// Data files of a data set folder with their splits, in the order of their names: `SPLIT.EXT` or `SPLIT-00000-of-00002.EXT`, in the
/// folder itself or in its folder `data`.
fn data_files(folder: &Path) -> Vec<(String, PathBuf)> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for place in [folder.to_owned(), folder.join("data")] {
        let entries = fs::read_dir(&place).into_iter().flatten().flatten();
        found.extend(entries.filter_map(|entry| Some((split_of(&entry.path())?, entry.path()))));
        if !found.is_empty() {
            break;
        }
    }
    found.sort();
    found
}

/// Files of one split of a data set folder.
fn files_of(folder: &Path, split: Option<&str>) -> Result<Vec<PathBuf>, DataError> {
    let found = data_files(folder);
    let mut names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    let name = match (split, names.as_slice()) {
        (_, []) => {
            let hint = listing("; it holds ", folder);
            return Err(DataError::NotJsonLines {
                path: folder.to_owned(),
                found: "a folder without data files (an Arrow data set has to be saved as Parquet or JSON)",
                hint,
            });
        }
        (Some(split), names) if names.contains(&split) => split.to_owned(),
        (None, [single]) => (*single).to_owned(),
        (split, names) => {
            return Err(DataError::Split {
                path: folder.to_owned(),
                split: split.unwrap_or("none was named").to_owned(),
                found: format!("a folder with the splits {}", names.join(", ")),
            });
        }
    };
    Ok(found.into_iter().filter(|(split, _)| *split == name).map(|(_, path)| path).collect())
}

/// The split that a data file's name tells of.
fn split_of(path: &Path) -> Option<String> {
    let extension = path.extension()?.to_str()?;
    let stem = path.file_stem()?.to_str()?;
    let about = ["dataset_info", "dataset_infos", "dataset_dict", "state", "config"];
    if !FORMATS.contains(&extension) || about.contains(&stem) {
        return None;
    }
    let part = |text: &str| {
        let (split, of) = text.rsplit_once("-of-")?;
        let (split, number) = split.rsplit_once('-')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        (digits(of) && digits(number)).then(|| split.to_owned())
    };
    Some(part(stem).unwrap_or_else(|| stem.to_owned()))
}

fn rows_of_file(path: &Path) -> Result<Rows, DataError> {
    let mut file = BufReader::new(File::open(path).map_err(|e| unreadable(path, e))?);
    let first = file.fill_buf().map_err(|e| unreadable(path, e))?;
    let text = first.strip_prefix(BYTE_ORDER_MARK).unwrap_or(first).trim_ascii_start();
    if first.starts_with(b"PAR1") {
        return parquet_rows(path);
    }
    if first.starts_with(b"\x1f\x8b") {
        let (hint, found) = (format!("; unpack it: gunzip {}", path.display()), "a gzip file");
        return Err(DataError::NotJsonLines { path: path.to_owned(), found, hint });
    }
    if first.starts_with(b"ARROW1") {
        let hint = "; write it with datasets' to_parquet(...)".to_owned();
        return Err(DataError::NotJsonLines { path: path.to_owned(), found: "an Arrow file", hint });
    }
    if text.starts_with(b"[") { array_rows(path, file) } else { Ok(line_rows(path, file)) }
}

fn line_rows(path: &Path, file: BufReader<File>) -> Rows {
    let path: Rc<Path> = path.into();
    let row = move |(index, bytes): (usize, std::io::Result<Vec<u8>>)| {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => return Some(Err(unreadable(&path, error))),
        };
        let number = index + 1;
        let bytes = if index == 0 { bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes) } else { &bytes };
        let value = parse_line(&path, number, bytes).transpose()?;
        Some(value.map(|value| Row { path: Rc::clone(&path), number, value }))
    };
    Box::new(file.split(b'\n').enumerate().filter_map(row))
}

/// None for a blank line.
fn parse_line(path: &Path, line: usize, bytes: &[u8]) -> Result<Option<Value>, DataError> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let byte = e.valid_up_to() + 1;
        DataError::Utf8 { path: path.to_owned(), line, byte }
    })?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    serde_json::from_str(text).map(Some).map_err(|e| {
        let hint = if e.is_eof() { "; a JSON object must stand on one line" } else { "" };
        // the parser saw this line alone
        let reason = e.to_string().replace(" at line 1 column ", " at column ");
        DataError::Json { path: path.to_owned(), line, reason: format!("{reason}{hint}") }
    })
}

fn array_rows(path: &Path, mut file: BufReader<File>) -> Result<Rows, DataError> {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(|e| unreadable(path, e))?;
    let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    let values: Vec<Value> = serde_json::from_slice(text).map_err(|e| DataError::Json {
        path: path.to_owned(),
        line: e.line(),
        reason: format!("{e}; the file begins with [ and so was read as one JSON array"),
    })?;
    let path: Rc<Path> = path.into();
    let row = move |(index, value)| Ok(Row { path: Rc::clone(&path), number: index + 1, value });
    Ok(Box::new(values.into_iter().enumerate().map(row)))
}

fn parquet_rows(path: &Path) -> Result<Rows, DataError> {
    let path: Rc<Path> = path.into();
    let wrong = |path: &Path, reason: String| DataError::Parquet { path: path.to_owned(), reason };
    let file = File::open(&path).map_err(|e| unreadable(&path, e))?;
    let reader = SerializedFileReader::new(file).map_err(|e| wrong(&path, e.to_string()))?;
    let row = move |(index, row): (usize, parquet::errors::Result<parquet::record::Row>)| {
        let row = row.map_err(|e| wrong(&path, format!("row {}: {e}", index + 1)))?;
        Ok(Row { path: Rc::clone(&path), number: index + 1, value: row.to_json_value() })
    };
    Ok(Box::new(reader.into_iter().enumerate().map(row)))
}

fn unreadable(path: &Path, source: std::io::Error) -> DataError {
    let hint = match source.kind() {
        ErrorKind::NotFound => listing("; beside it are ", path.parent().unwrap_or(Path::new("."))),
        _ => String::new(),
    };
    DataError::Read { path: path.to_owned(), source, hint }
}

/// The first few data files of a folder, in alphabetical order.
fn listing(before: &str, folder: &Path) -> String {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let is_data = |name: &str| FORMATS.iter().any(|extension| name.ends_with(&format!(".{extension}")));
    names.retain(|name| is_data(name));
    names.sort();
    match names.len() {
        0 => String::new(),
        1..=6 => format!("{before}{}", names.join(", ")),
        n => format!("{before}{} and {} more", names[..6].join(", "), n - 6),
    }
}
