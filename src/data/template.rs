//! Templates: how a question and its answer, or a list of messages, become text.
//!
//! A tokenizer's chat template is Jinja, rendered as Hugging Face transformers renders it (`apply_chat_template`),
//! except that `strftime_now` always returns 26 July 2024: the same run must see the same text on any day. That is the
//! date the Llama 3 templates fall back to.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value as Jinja};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};

use super::error::DataError;
use super::record::Message;

/// Special tokens that a template may name, by the name transformers gives them (`bos_token`, ...).
pub type TokenNames = BTreeMap<String, String>;

const NAME: &str = "chat";

/// What follows the last message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continue {
    /// Nothing: the text ends with it.
    No,
    /// The header of an assistant's turn (`add_generation_prompt`).
    Answer,
    /// As `Answer` with `enable_thinking = false`, for templates that know it.
    AnswerWithoutThinking,
}

/// The chat template of a tokenizer's folder.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: TokenNames,
    origin: PathBuf,
}

impl ChatTemplate {
    /// The template in `chat_template.jinja`, else in `chat_template` of `tokenizer_config.json` (`config`): a string,
    /// or a list of `{name, template}` of which `default` is taken. `None` if the folder has neither.
    ///
    /// # Errors
    /// A template that does not parse, or of another type.
    pub fn from_folder(
        folder: &Path,
        config: &Map<String, Value>,
        tokens: TokenNames,
    ) -> Result<Option<Self>, DataError> {
        let file = folder.join("chat_template.jinja");
        if file.is_file() {
            let source = fs::read_to_string(&file).map_err(|source| {
                let hint = String::new();
                DataError::Read { path: file.clone(), source, hint }
            })?;
            return Self::new(&file, &source, tokens).map(Some);
        }
        let file = folder.join("tokenizer_config.json");
        let refuse = |found: String| DataError::TokenizerFile {
            path: file.clone(),
            reason: format!(
                "chat_template is {found}, expected a string or a list of {{name, template}} with a \"default\""
            ),
        };
        match config.get("chat_template") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(source)) => Self::new(&file, source, tokens).map(Some),
            Some(Value::Array(named)) => {
                let name = |entry: &Value| entry.get("name").and_then(Value::as_str).unwrap_or("?").to_owned();
                let default = named.iter().find(|entry| name(entry) == "default");
                let source = default.and_then(|entry| entry.get("template")).and_then(Value::as_str);
                let names = || named.iter().map(name).collect::<Vec<_>>().join(", ");
                let source = source.ok_or_else(|| refuse(format!("a list of templates named {}", names())))?;
                Self::new(&file, source, tokens).map(Some)
            }
            Some(other) => Err(refuse(other.to_string())),
        }
    }

    /// Compiles `source`; `origin` is the file named in errors.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn new(origin: &Path, source: &str, tokens: TokenNames) -> Result<Self, DataError> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax());
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_fixed);
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| DataError::TemplateSyntax { path: origin.to_owned(), reason: reason(&error) })?;
        Ok(Self { environment, tokens, origin: origin.to_owned() })
    }

    /// The text of `messages`.
    ///
    /// # Errors
    /// A template that refuses the messages (`raise_exception`) or uses what this renderer does not know.
    pub fn render(&self, messages: &[Message], how: Continue) -> Result<String, DataError> {
        let message = |m: &Message| Jinja::from_pairs([("role", m.role.name()), ("content", m.content.as_str())]);
        let fixed = [
            ("messages", messages.iter().map(message).collect::<Jinja>()),
            ("add_generation_prompt", Jinja::from(how != Continue::No)),
            ("tools", Jinja::from(())),
            ("documents", Jinja::from(())),
        ];
        let tokens = self.tokens.iter().map(|(name, token)| (name.as_str(), Jinja::from(token.as_str())));
        let thinking = (how == Continue::AnswerWithoutThinking).then(|| ("enable_thinking", Jinja::from(false)));
        let context = Jinja::from_pairs(tokens.chain(fixed).chain(thinking));
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(|error| DataError::TemplateRender { path: self.origin.clone(), reason: reason(&error) })
    }
}

/// `{ prompt = "... {question} ...", answer = "... {answer} ..." }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptAnswer {
    prompt: String,
    answer: String,
}

impl PromptAnswer {
    /// # Errors
    /// A prompt without `{question}`, an answer without `{answer}`, or one that holds the other's placeholder.
    pub fn new(prompt: &str, answer: &str) -> Result<Self, DataError> {
        let keys = [
            ("data.template.prompt", prompt, "{question}", "{answer}", "data.template.answer"),
            ("data.template.answer", answer, "{answer}", "{question}", "data.template.prompt"),
        ];
        for (key, text, placeholder, misplaced, other) in keys {
            let found = text.to_owned();
            if text.contains(misplaced) {
                return Err(DataError::MisplacedPlaceholder { key, found, placeholder: misplaced, other });
            }
            if !text.contains(placeholder) {
                return Err(DataError::Placeholder { key, found, placeholder });
            }
        }
        Ok(Self { prompt: prompt.to_owned(), answer: answer.to_owned() })
    }

    /// Text of the prompt and text of the answer. Braces in the question, the answer or elsewhere mean nothing.
    pub fn fill(&self, question: &str, answer: &str) -> (String, String) {
        (self.prompt.replace("{question}", question), self.answer.replace("{answer}", answer))
    }
}

/// Turns `{% generation %}` ... `{% endgeneration %}`, with which transformers marks assistant turns, into a block that
/// prints what is in it, so that the white space around the tags is treated as before.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let (open, close) = (start + 2, start + len);
        let tag = &rest[open..close];
        let word = tag.trim_matches(['-', '+']).trim();
        result.push_str(&rest[..open]);
        match word {
            "generation" => result.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => result.push_str(&tag.replace("endgeneration", "endif")),
            _ => result.push_str(tag),
        }
        rest = &rest[close..];
    }
    result + rest
}

/// White space around block tags as transformers has it: `trim_blocks` and `lstrip_blocks`.
fn syntax() -> SyntaxConfig {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("the default delimiters are valid")
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, which transformers puts in place of Jinja's filter:
/// that one writes `<`, `>`, `&` and `'` as escapes.
fn tojson(value: &Jinja, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let json_error = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let escaped = minijinja::filters::tojson(value, None, std::iter::empty::<(String, Jinja)>().collect())?;
    let plain: Value = serde_json::from_str(escaped.as_str().unwrap_or_default()).map_err(json_error)?;
    let mut bytes = Vec::new();
    let indent = indent.map(|width| b" ".repeat(width));
    match &indent {
        Some(indent) => {
            plain.serialize(&mut Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(indent)))
        }
        None => plain.serialize(&mut Serializer::with_formatter(&mut bytes, PythonStyle)),
    }
    .map_err(json_error)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// One line with a space after each comma and colon.
struct PythonStyle;

impl Formatter for PythonStyle {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `strftime` of Friday, 26 July 2024, midnight.
fn strftime_fixed(format: &str) -> Result<String, Error> {
    let mut result = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            result.push(c);
            continue;
        }
        let mut code = chars.next();
        let no_zero = code == Some('-');
        if no_zero {
            code = chars.next();
        }
        let text = match code {
            Some('Y') => "2024",
            Some('y') => "24",
            Some('m') => "07",
            Some('d' | 'e') => "26",
            Some('B') => "July",
            Some('b' | 'h') => "Jul",
            Some('A') => "Friday",
            Some('a') => "Fri",
            Some('j') => "208",
            Some('H' | 'M' | 'S') => "00",
            Some('I') => "12",
            Some('p') => "AM",
            Some('F') => "2024-07-26",
            Some('D' | 'x') => "07/26/24",
            Some('T' | 'X') => "00:00:00",
            Some('%') => "%",
            _ => {
                let message = format!("strftime_now does not know the format {format:?}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
        result.push_str(if no_zero && text.len() == 2 { text.strip_prefix('0').unwrap_or(text) } else { text });
    }
    Ok(result)
}

fn reason(error: &Error) -> String {
    let text = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{text} (line {line} of the template)"),
        None => text,
    }
}
