//! Records of a source: one row becomes one [`Record`], or an error that names file, line, field, what is there and what to write.

#[cfg(test)]
mod tests;

use std::path::Path;

use serde_json::{Map, Value};

use super::error::DataError;
use super::rows::{describe, rows};
use crate::config::{Kind, Source};

/// One sample as the file has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Line (or row) in the file, counted from 1.
    pub line: usize,
    pub content: Content,
    /// Answers that are to take the place of the sample's own, where they were asked for; see [`Wanted`].
    pub preferred: Vec<String>,
}

impl Record {
    /// A record without preferred answers.
    pub fn plain(line: usize, content: Content) -> Self {
        Self { line, content, preferred: Vec::new() }
    }
}

/// Which answers a method prefers to a sample's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// None: nothing besides the samples themselves is read.
    #[default]
    Nothing,
    /// A refusal: the field `idk` where a sample has one, else one of the refusals of the run.
    Refusal,
    /// Other answers to the same question: `alternates`, or the other `choices`.
    Alternates,
    /// The `chosen` answer of a `preference` sample.
    Chosen,
}

/// What a line holds, by kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Qa { question: String, answer: String },
    Chat(Vec<Message>),
    Text(String),
}

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
}

impl Role {
    const ALL: [Self; 4] = [Self::System, Self::User, Self::Assistant, Self::Tool];

    /// The name used in files and templates.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// Reads the samples of `source` in file order; blank lines are skipped, further fields of a line are ignored.
///
/// `name` is the configuration key of the source, such as `data.forget`: errors say which key to set.
///
/// # Errors
/// A file that cannot be read, is of no known format or holds no sample; a row that is not of the source's kind.
pub fn read(name: &str, source: &Source, wanted: Wanted) -> Result<Vec<Record>, DataError> {
    if source.limit == Some(0) {
        return Err(DataError::NoSample {
            path: source.path.clone(),
            reason: format!("{name}.limit is 0, expected at least 1 or no limit"),
        });
    }
    let limit = source.limit.unwrap_or(usize::MAX);
    let mut records = Vec::new();
    for row in rows(&source.path, source.split.as_deref())? {
        let row = row?;
        let line = Line { name, source, path: &row.path, number: row.number, wanted };
        let object = row.object(source.kind.name())?;
        let (content, preferred) = (line.content(object)?, line.preferred(object)?);
        records.push(Record { line: row.number, content, preferred });
        if records.len() == limit {
            break;
        }
    }
    if records.is_empty() {
        let reason = "it is empty or all its lines are blank".to_owned();
        return Err(DataError::NoSample { path: source.path.clone(), reason });
    }
    Ok(records)
}

/// One line and where it stands.
struct Line<'a> {
    name: &'a str,
    source: &'a Source,
    /// File that holds it.
    path: &'a Path,
    number: usize,
    wanted: Wanted,
}

impl Line<'_> {
    fn content(&self, object: &Map<String, Value>) -> Result<Content, DataError> {
        let fields = &self.source.fields;
        match self.source.kind {
            Kind::Qa => Ok(Content::Qa {
                question: self.text(object, "question", fields.question.as_deref())?,
                answer: self.text(object, "answer", fields.answer.as_deref())?,
            }),
            Kind::Text => Ok(Content::Text(self.text(object, "text", fields.text.as_deref())?)),
            Kind::Chat => self.messages(object, fields.messages.as_deref()).map(Content::Chat),
            Kind::Preference => Ok(Content::Qa {
                question: self.text(object, "prompt", fields.prompt.as_deref())?,
                answer: self.text(object, "rejected", fields.rejected.as_deref())?,
            }),
            Kind::Choice => {
                let question = self.text(object, "question", fields.question.as_deref())?;
                let (mut choices, right) = self.choices(object)?;
                Ok(Content::Qa { question, answer: choices.swap_remove(right) })
            }
        }
    }

    /// The preferred answers that this sample brings itself.
    fn preferred(&self, object: &Map<String, Value>) -> Result<Vec<String>, DataError> {
        let fields = &self.source.fields;
        let refuse = |expected: &'static str| {
            Err(DataError::NoPair { name: self.name.to_owned(), kind: self.source.kind.name(), expected })
        };
        match (self.wanted, self.source.kind) {
            (Wanted::Nothing, _) => Ok(Vec::new()),
            (_, Kind::Text | Kind::Chat) => refuse("\"qa\", \"choice\" or \"preference\": a question with one answer"),
            (Wanted::Refusal, _) => match fields.idk.as_deref().or(object.get("idk").map(|_| "idk")) {
                Some(field) => Ok(vec![self.text(object, "idk", Some(field))?]),
                None => Ok(Vec::new()),
            },
            (Wanted::Alternates, Kind::Choice) => {
                let (mut choices, right) = self.choices(object)?;
                choices.remove(right);
                Ok(choices)
            }
            (Wanted::Alternates, Kind::Qa) => {
                let (field, value) = self.field(object, "alternates", fields.alternates.as_deref())?;
                match value {
                    Value::Array(values) => self.strings(&field, values),
                    value => Ok(vec![self.filled(field, value)?]),
                }
            }
            (Wanted::Alternates, _) => refuse("\"qa\" with the field alternates, or \"choice\""),
            (Wanted::Chosen, Kind::Preference) => Ok(vec![self.text(object, "chosen", fields.chosen.as_deref())?]),
            (Wanted::Chosen, _) => refuse(
                "\"preference\"; with another kind write objective \"idk_dpo\" (refusals) or \"altpo\" (alternates)",
            ),
        }
    }

    /// The choices of a `choice` sample and the index of the right one, which is given as an index from 0, a letter or the text.
    fn choices(&self, object: &Map<String, Value>) -> Result<(Vec<String>, usize), DataError> {
        let (field, value) = self.field(object, "choices", self.source.fields.choices.as_deref())?;
        let Value::Array(values) = value else {
            return Err(self.wrong(field, describe(value), "a list of strings"));
        };
        let choices = self.strings(&field, values)?;
        let (field, value) = self.field(object, "answer", self.source.fields.answer.as_deref())?;
        let letter = |text: &str| match text.trim().as_bytes() {
            [letter] if letter.is_ascii_uppercase() => Some(usize::from(letter - b'A')),
            _ => None,
        };
        let right = match value {
            Value::Number(index) => index.as_u64().map(|index| index as usize),
            Value::String(text) => choices.iter().position(|choice| choice == text).or_else(|| letter(text)),
            _ => None,
        };
        match right.filter(|&right| right < choices.len() && choices.len() > 1) {
            Some(right) => Ok((choices, right)),
            None => {
                let expected = format!("the index from 0, the letter or the text of one of {} choices", choices.len());
                Err(self.wrong(field, value.to_string(), &expected))
            }
        }
    }

    fn strings(&self, field: &str, values: &[Value]) -> Result<Vec<String>, DataError> {
        if values.is_empty() {
            return Err(self.wrong(field.to_owned(), "an empty list".to_owned(), "at least one string"));
        }
        let filled = |(i, value): (usize, &Value)| self.filled(format!("{field}[{i}]"), value);
        values.iter().enumerate().map(filled).collect()
    }

    /// The value of the field that stands for `key`, a kind's own field name.
    fn field<'v>(
        &self,
        object: &'v Map<String, Value>,
        key: &str,
        mapped: Option<&str>,
    ) -> Result<(String, &'v Value), DataError> {
        let field = mapped.unwrap_or(key);
        if let Some(value) = object.get(field) {
            return Ok((format!("{field:?}"), value));
        }
        let present: Vec<_> = object.keys().map(|key| format!("{key:?}")).collect();
        let other = [
            (Kind::Choice, "choices"),
            (Kind::Preference, "rejected"),
            (Kind::Qa, "question"),
            (Kind::Chat, "messages"),
            (Kind::Text, "text"),
        ]
        .into_iter()
        .find(|(kind, own)| *kind != self.source.kind && object.contains_key(*own));
        let mut fix = format!("if one of them is the {key}, set {}.fields.{key} = \"...\"", self.name);
        if let Some((kind, _)) = other {
            fix.push_str(&format!("; this looks like {}.kind = \"{}\"", self.name, kind.name()));
        }
        Err(DataError::MissingField {
            path: self.path.to_owned(),
            line: self.number,
            field: field.to_owned(),
            kind: self.source.kind.name(),
            present: if present.is_empty() { "none".to_owned() } else { present.join(", ") },
            fix,
        })
    }

    fn text(&self, object: &Map<String, Value>, key: &str, mapped: Option<&str>) -> Result<String, DataError> {
        let (field, value) = self.field(object, key, mapped)?;
        match value {
            Value::Array(_) if key == "answer" => Err(self.wrong(
                field,
                describe(value),
                "a string (several answers to one question are not supported: write one line for each)",
            )),
            value => self.filled(field, value),
        }
    }

    /// A string that is not blank.
    fn filled(&self, field: String, value: &Value) -> Result<String, DataError> {
        match value {
            Value::String(text) if text.trim().is_empty() => {
                Err(self.wrong(field, "a blank string".to_owned(), "some text"))
            }
            Value::String(text) => Ok(text.clone()),
            other => Err(self.wrong(field, describe(other), "a string")),
        }
    }

    fn messages(&self, object: &Map<String, Value>, mapped: Option<&str>) -> Result<Vec<Message>, DataError> {
        let (field, value) = self.field(object, "messages", mapped)?;
        let expected = "a list of {role, content} objects";
        let Value::Array(turns) = value else {
            return Err(self.wrong(field, describe(value), expected));
        };
        let messages: Vec<_> = turns
            .iter()
            .enumerate()
            .map(|(i, turn)| self.message(&format!("{field}[{i}]"), turn))
            .collect::<Result<_, _>>()?;
        match messages.iter().position(|m| m.role == Role::Assistant) {
            None => Err(self.wrong(field, "no assistant turn".to_owned(), "at least one, since only those are scored")),
            Some(0) => Err(self.wrong(field, "an assistant turn first".to_owned(), "a user turn before it")),
            Some(_) => Ok(messages),
        }
    }

    fn message(&self, at: &str, turn: &Value) -> Result<Message, DataError> {
        let Value::Object(turn) = turn else {
            return Err(self.wrong(at.to_owned(), describe(turn), "a {role, content} object"));
        };
        if turn.get("tool_calls").is_some_and(|calls| !calls.is_null()) {
            let expected = "no such field (tool calls are not supported: write the call into content)";
            return Err(self.wrong(format!("{at}.tool_calls"), "tool calls".to_owned(), expected));
        }
        let part = |key: &str| {
            let keys = || turn.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            turn.get(key).ok_or_else(|| self.wrong(format!("{at}.{key}"), format!("only {{{}}}", keys()), "a string"))
        };
        let (role, content) = (part("role")?, part("content")?);
        let known = Role::ALL.into_iter().find(|known| role.as_str() == Some(known.name()));
        let role = known.ok_or_else(|| {
            let expected = "\"system\", \"user\", \"assistant\" or \"tool\"";
            self.wrong(format!("{at}.role"), role.to_string(), expected)
        })?;
        let at = format!("{at}.content");
        let content = match (role, content) {
            (Role::User | Role::Assistant, content) => self.filled(at, content)?,
            (_, Value::String(text)) => text.clone(),
            (_, other) => return Err(self.wrong(at, describe(other), "a string")),
        };
        Ok(Message { role, content })
    }

    fn wrong(&self, field: String, found: String, expected: &str) -> DataError {
        DataError::Field { path: self.path.to_owned(), line: self.number, field, found, expected: expected.to_owned() }
    }
}
