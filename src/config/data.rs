//! `[data]`: which samples are forgotten, kept or trained on, and how a sample becomes text.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::de::{self, Deserializer, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Serialize};

/// What one line of a data file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `{question, answer}`: the answer is scored, the question is not.
    Qa,
    /// `{messages: [{role, content}, ...]}`: every assistant turn is scored.
    Chat,
    /// `{text}`: every token but the first is scored; longer texts are split into windows of `max_length`.
    Text,
    /// `{prompt, chosen, rejected}`: the rejected answer is the sample, the chosen one takes its place in preference objectives.
    Preference,
    /// `{question, choices, answer}`: the right choice is the answer, the others are its alternates.
    Choice,
}

impl Kind {
    /// The name used in TOML.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qa => "qa",
            Self::Chat => "chat",
            Self::Text => "text",
            Self::Preference => "preference",
            Self::Choice => "choice",
        }
    }
}

/// Names of the fields in the file where they differ from the kind's own names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fields {
    /// Field that holds the question of a `qa` or `choice` sample. Default `question`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// Field that holds the answer of a `qa` sample, or the right choice (its index from 0, letter or text). Default `answer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Field that holds the list of messages of a `chat` sample. Default `messages`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    /// Field that holds the text of a `text` sample. Default `text`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Field that holds a sample's own refusal, for methods that use refusals. Default `idk`, where it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idk: Option<String>,
    /// Field that holds a `qa` sample's other answers, a list of strings; for `altpo`. Default `alternates`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alternates: Option<String>,
    /// Field that holds the prompt of a `preference` sample. Default `prompt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Field that holds the answer to prefer of a `preference` sample. Default `chosen`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<String>,
    /// Field that holds the answer to forget of a `preference` sample. Default `rejected`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
    /// Field that holds the list of choices of a `choice` sample. Default `choices`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choices: Option<String>,
}

impl Fields {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// One data file, or one split of a Hugging Face data set folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// JSON lines, a JSON array, Parquet, or a folder of such files. Relative to the working directory.
    pub path: PathBuf,
    /// What a line holds: `qa`, `chat`, `text`, `preference` or `choice`.
    pub kind: Kind,
    /// Names of the fields where the file uses others than the kind's own.
    #[serde(default, skip_serializing_if = "Fields::is_default")]
    pub fields: Fields,
    /// Which split of a data set folder; needed where the folder has several (`train`, `test`, ...).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Use only the first `limit` samples. Unit: samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// How a question and its answer become the text that the model reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Template {
    /// `"chat"`: the tokenizer's own chat template.
    Named(TemplateName),
    /// `{ prompt = "Question: {question}\nAnswer:", answer = " {answer}" }`.
    Explicit(ExplicitTemplate),
}

/// Templates with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TemplateName {
    /// The chat template in the tokenizer's folder.
    Chat,
}

/// Text around a question and an answer. The answer's text and an end-of-text token are scored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExplicitTemplate {
    /// Text before the answer; must hold `{question}`. Do not end it in a space: most tokenizers join a space to the next word.
    pub prompt: String,
    /// Text of the answer; must hold `{answer}`.
    pub answer: String,
}

impl<'de> Deserialize<'de> for Template {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TemplateVisitor;
        impl<'de> Visitor<'de> for TemplateVisitor {
            type Value = Template;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str(r#""chat" or a table { prompt = "... {question} ...", answer = "{answer}" }"#)
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Template, E> {
                match name {
                    "chat" => Ok(Template::Named(TemplateName::Chat)),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Template, A::Error> {
                ExplicitTemplate::deserialize(MapAccessDeserializer::new(map)).map(Template::Explicit)
            }
        }
        deserializer.deserialize_any(TemplateVisitor)
    }
}
