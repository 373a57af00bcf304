//! Loads a tokenizer, its special tokens and its chat template from a Hugging Face folder.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{PostProcessorWrapper, Tokenizer};

use super::{Encoder, Form};
use crate::config::Template;
use crate::data::error::DataError;
use crate::data::template::{ChatTemplate, PromptAnswer, TokenNames};

/// Names under which transformers hands special tokens to a chat template.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

pub(super) fn load(folder: &Path, template: &Template, system: Option<&str>) -> Result<Encoder, DataError> {
    let tokenizer = tokenizer(folder)?;
    let config_path = folder.join("tokenizer_config.json");
    let config = json_object(&config_path)?.unwrap_or_default();
    let mut names = token_names(&config);
    let eos = eos(folder, &tokenizer, &config_path, names.get("eos_token"))?;
    if let Some(name) = tokenizer.id_to_token(eos[0] as u32) {
        names.entry("eos_token".to_owned()).or_insert(name);
    }
    let bos = names.get("bos_token").and_then(|name| tokenizer.token_to_id(name)).map(|id| id as i32);
    let added = tokenizer.get_added_tokens_decoder();
    let special: BTreeSet<i32> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id as i32).collect();
    let form = match template {
        Template::Named(_) => Form::Chat(ChatTemplate::from_folder(folder, &config, names)?.map(Box::new)),
        Template::Explicit(_) if system.is_some() => return Err(DataError::SystemWithoutChat),
        Template::Explicit(parts) => Form::PromptAnswer(PromptAnswer::new(&parts.prompt, &parts.answer)?),
    };
    Ok(Encoder {
        tokenizer,
        form,
        system: system.map(str::to_owned),
        bos,
        special: special.into_iter().chain(eos.iter().copied()).collect(),
        eos,
        folder: folder.to_owned(),
    })
}

fn tokenizer(folder: &Path) -> Result<Tokenizer, DataError> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Err(DataError::NoTokenizer { folder: folder.to_owned(), hint: missing_hint(folder) });
    }
    let refuse = |reason: String| DataError::TokenizerFile { path: path.clone(), reason };
    let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| refuse(e.to_string()))?;
    // length and padding are this crate's business; some published files have them switched on
    tokenizer.with_truncation(None).map_err(|e| refuse(e.to_string()))?;
    tokenizer.with_padding(None);
    if let Some(processor) = tokenizer.get_post_processor() {
        let processor = with_whole_offsets(processor).map_err(|e| refuse(e.to_string()))?;
        tokenizer.with_post_processor(Some(processor));
    }
    Ok(tokenizer)
}

/// The same post-processor without `trim_offsets`, which takes white space out of the span of the token that holds it
/// and so hides on which side of the border between prompt and answer it stands.
fn with_whole_offsets(processor: &PostProcessorWrapper) -> serde_json::Result<PostProcessorWrapper> {
    fn visit(value: &mut Value) {
        match value {
            Value::Array(values) => values.iter_mut().for_each(visit),
            Value::Object(object) => {
                if let Some(trim) = object.get_mut("trim_offsets") {
                    *trim = Value::Bool(false);
                }
                object.values_mut().for_each(visit);
            }
            _ => {}
        }
    }
    let mut value = serde_json::to_value(processor)?;
    visit(&mut value);
    serde_json::from_value(value)
}

fn missing_hint(folder: &Path) -> String {
    if !folder.is_dir() {
        return ": there is no such folder".to_owned();
    }
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let others = ["tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt"];
    found.retain(|name| others.contains(&name.as_str()) || name.ends_with(".tiktoken"));
    found.sort();
    match found.is_empty() {
        true => ", nor any other tokenizer file; copy it there from the model's publisher".to_owned(),
        false => format!(
            "; found {}: write it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            found.join(", ")
        ),
    }
}

/// `None` if there is no such file.
fn json_object(path: &Path) -> Result<Option<Map<String, Value>>, DataError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(DataError::Read { path: path.to_owned(), source, hint: String::new() });
        }
    };
    let parsed: Result<Map<String, Value>, _> = serde_json::from_str(&text);
    parsed.map(Some).map_err(|e| DataError::TokenizerFile { path: path.to_owned(), reason: e.to_string() })
}

/// Special tokens by name; each is a string or `{content}`.
fn token_names(config: &Map<String, Value>) -> TokenNames {
    let content = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
    NAMES.iter().filter_map(|&name| Some((name.to_owned(), content(config.get(name)?)?))).collect()
}

/// End-of-text tokens: `eos_token` first, then those on which generation stops.
fn eos(folder: &Path, tokenizer: &Tokenizer, config_path: &Path, name: Option<&String>) -> Result<Vec<i32>, DataError> {
    let mut ids = Vec::new();
    if let Some(name) = name {
        let id = tokenizer.token_to_id(name).ok_or_else(|| DataError::UnknownToken {
            path: config_path.to_owned(),
            key: "eos_token",
            token: name.clone(),
        })?;
        ids.push(id as i32);
    }
    for file in ["generation_config.json", "config.json"] {
        let path = folder.join(file);
        let listed = match json_object(&path)? {
            Some(object) => eos_ids(&path, object.get("eos_token_id"), tokenizer)?,
            None => Vec::new(),
        };
        if !listed.is_empty() {
            ids.extend(listed);
            break;
        }
    }
    let mut seen = BTreeSet::new();
    ids.retain(|id| seen.insert(*id));
    if ids.is_empty() { Err(DataError::NoEos { folder: folder.to_owned() }) } else { Ok(ids) }
}

/// `eos_token_id`: nothing, a number or a list of numbers.
fn eos_ids(path: &Path, value: Option<&Value>, tokenizer: &Tokenizer) -> Result<Vec<i32>, DataError> {
    let values = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    let known = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.filter(|&id| tokenizer.id_to_token(id).is_some()).map(|id| id as i32).ok_or_else(|| {
            DataError::TokenizerFile {
                path: path.to_owned(),
                reason: format!("eos_token_id holds {value}, expected the number of a token in tokenizer.json"),
            }
        })
    };
    values.iter().map(known).collect()
}
