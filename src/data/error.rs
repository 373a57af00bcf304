//! What can be wrong with a user's data, tokenizer or template. Every message says where, what was found and what to
//! write.

use std::io;
use std::path::{Path, PathBuf};

/// An error of the data room.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read {}: {source}{hint}", path.display())]
    Read { path: PathBuf, source: io::Error, hint: String },

    #[error("{} is {found}, expected JSON lines, a JSON array, Parquet or a folder of such files{hint}", path.display())]
    NotJsonLines { path: PathBuf, found: &'static str, hint: String },

    #[error("{} is no Parquet file that can be read: {reason}", path.display())]
    Parquet { path: PathBuf, reason: String },

    #[error("no split {split:?}: {} is {found}: write split = \"...\" with one of them", path.display())]
    Split { path: PathBuf, split: String, found: String },

    #[error("no {name}.jsonl, {name}.json, {name}.parquet or folder {name} in {}{hint}", folder.display())]
    NoSet { folder: PathBuf, name: String, hint: String },

    #[error("{}:{line}: byte {byte} of the line is not UTF-8", path.display())]
    Utf8 { path: PathBuf, line: usize, byte: usize },

    #[error("{}:{line}: invalid JSON: {reason}", path.display())]
    Json { path: PathBuf, line: usize, reason: String },

    #[error("{}:{line}: found {found}, expected an object with the fields of kind {kind:?}", path.display())]
    NotObject { path: PathBuf, line: usize, found: String, kind: &'static str },

    #[error(
        "{}:{line}: no field {field:?}, which kind {kind:?} needs; the fields there: {present}; {fix}",
        path.display()
    )]
    MissingField { path: PathBuf, line: usize, field: String, kind: &'static str, present: String, fix: String },

    #[error("{}:{line}: field {field}: found {found}, expected {expected}", path.display())]
    Field { path: PathBuf, line: usize, field: String, found: String, expected: String },

    #[error("{name}.kind is {kind:?}: the method needs another answer to each question, expected kind {expected}")]
    NoPair { name: String, kind: &'static str, expected: &'static str },

    #[error("{} holds no refusal: expected one a line, as text or as an object {{\"text\": ...}}", path.display())]
    NoRefusal { path: PathBuf },

    #[error("{} holds no sample: {reason}", path.display())]
    NoSample { path: PathBuf, reason: String },

    /// An error that belongs to one sample.
    #[error("{}:{line}: {source}", path.display())]
    Sample { path: PathBuf, line: usize, source: Box<DataError> },

    #[error("{}", prompt_fills_window(self))]
    PromptFillsWindow {
        path: PathBuf,
        /// Samples of which no scored token is left, of `samples` in all.
        count: usize,
        samples: usize,
        /// The first of them, and its prompt's length in tokens.
        line: usize,
        prompt: usize,
        max_length: usize,
        /// Smallest `max_length` that leaves every sample a scored token, and the length of the longest sample.
        least: usize,
        longest: usize,
    },

    #[error("data.max_length is {found}, expected at least 2: a token is predicted from the one before it")]
    MaxLength { found: usize },

    #[error("no tokenizer.json in {}{hint}", folder.display())]
    NoTokenizer { folder: PathBuf, hint: String },

    #[error("{}: {reason}", path.display())]
    TokenizerFile { path: PathBuf, reason: String },

    #[error("{}: {key} is {token:?}, which tokenizer.json does not have as a token", path.display())]
    UnknownToken { path: PathBuf, key: &'static str, token: String },

    #[error(
        "no end-of-text token in {}: expected eos_token in tokenizer_config.json, or eos_token_id in \
         generation_config.json or config.json",
        folder.display()
    )]
    NoEos { folder: PathBuf },

    #[error(
        "no chat template in {} (neither chat_template.jinja nor chat_template in tokenizer_config.json): write \
         data.template = {{ prompt = \"Question: {{question}}\\nAnswer:\", answer = \" {{answer}}\" }}",
        folder.display()
    )]
    NoChatTemplate { folder: PathBuf },

    #[error("kind \"chat\" needs data.template = \"chat\": a prompt and answer template has no place for roles")]
    ChatNeedsChatTemplate,

    #[error(
        "data.system has no effect on a prompt and answer template: put its text into data.template.prompt, or use \
         data.template = \"chat\""
    )]
    SystemWithoutChat,

    #[error("{key} is {found:?}, expected text that holds {placeholder}")]
    Placeholder { key: &'static str, found: String, placeholder: &'static str },

    #[error("{key} is {found:?}, which holds {placeholder}: that belongs into {other}")]
    MisplacedPlaceholder { key: &'static str, found: String, placeholder: &'static str, other: &'static str },

    #[error("the chat template of {} does not parse: {reason}", path.display())]
    TemplateSyntax { path: PathBuf, reason: String },

    #[error("the chat template of {} refused the messages: {reason}", path.display())]
    TemplateRender { path: PathBuf, reason: String },

    #[error("the tokenizer failed: {reason}")]
    Tokenize { reason: String },

    #[error("the template leaves nothing to score: no token belongs to an assistant's turn")]
    NothingScored,

    #[error("{key} is {found}, expected {expected}")]
    Option { key: &'static str, found: String, expected: String },

    #[error("{} is not empty: choose another folder, or force to overwrite the files in it", path.display())]
    NotEmpty { path: PathBuf },

    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl DataError {
    /// Adds file and line, unless every sample would meet the same error.
    pub fn in_sample(self, path: &Path, line: usize) -> Self {
        match self {
            Self::NoChatTemplate { .. } | Self::ChatNeedsChatTemplate | Self::MaxLength { .. } => self,
            source => Self::Sample { path: path.to_owned(), line, source: Box::new(source) },
        }
    }
}

fn prompt_fills_window(error: &DataError) -> String {
    let DataError::PromptFillsWindow { path, count, samples, line, prompt, max_length, least, longest } = error else {
        unreachable!("only called for its own variant");
    };
    format!(
        "{}: {count} of {samples} samples have a prompt of data.max_length = {max_length} tokens or more, so that \
         nothing of their answer is left to score; the first is line {line} with a prompt of {prompt} tokens; set \
         data.max_length to at least {least} ({longest} cuts no sample), or remove them",
        path.display()
    )
}
