//! Typed access to `config.json` with errors that name file, key and value.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::ModelError;

/// A model folder's `config.json`.
#[derive(Clone, Debug)]
pub struct ConfigJson {
    path: PathBuf,
    map: Map<String, Value>,
}

impl ConfigJson {
    /// Reads `config.json` in a model folder.
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Read { path: path.clone(), source })?;
        Self::parse(&path, &text)
    }

    /// The same from its text; `path` is for messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ModelError> {
        let path = path.to_owned();
        let map = serde_json::from_str(text).map_err(|error| ModelError::Config {
            path: path.clone(),
            reason: format!("is not a JSON object: {error}"),
        })?;
        Ok(Self { path, map })
    }

    /// An error about this file.
    pub fn refuse(&self, reason: impl Into<String>) -> ModelError {
        ModelError::Config { path: self.path.clone(), reason: reason.into() }
    }

    /// An error about a key whose value this program does not support.
    pub fn unsupported(&self, key: &str, reason: &str) -> ModelError {
        let value = self.map.get(key).map_or_else(|| "missing".to_owned(), Value::to_string);
        self.refuse(format!("{key} = {value} is not supported: {reason}"))
    }

    /// Whether the key is there, be it null.
    pub fn mentions(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// A value that is there and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    pub fn integer(&self, key: &str) -> Result<Option<i64>, ModelError> {
        self.typed(key, "an integer", Value::as_i64)
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn flag(&self, key: &str) -> Result<bool, ModelError> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A positive integer that must be there.
    pub fn size(&self, key: &str) -> Result<i64, ModelError> {
        match self.integer(key)? {
            Some(n) if n > 0 => Ok(n),
            Some(n) => Err(self.refuse(format!("{key} = {n}, expected a positive integer"))),
            None => Err(self.refuse(format!("{key} is missing, expected a positive integer"))),
        }
    }

    /// A table inside the file, as a file of its own for further look-ups.
    pub fn table(&self, key: &str) -> Result<Option<Self>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { path: self.path.clone(), map: map.clone() })),
            Some(other) => Err(self.refuse(format!("{key} = {other}, expected an object"))),
        }
    }

    /// A list of numbers.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f64>>, ModelError> {
        self.typed(key, "a list of numbers", |value| value.as_array()?.iter().map(Value::as_f64).collect())
    }

    /// A list of words.
    pub fn words(&self, key: &str) -> Result<Option<Vec<String>>, ModelError> {
        let read = |value: &Value| value.as_array()?.iter().map(|v| v.as_str().map(str::to_owned)).collect();
        self.typed(key, "a list of strings", read)
    }

    fn typed<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(found) => Ok(Some(found)),
                None => Err(self.refuse(format!("{key} = {value}, expected {expected}"))),
            },
        }
    }
}
