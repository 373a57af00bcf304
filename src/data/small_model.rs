//! The folder a small model is trained in from random weights: configuration, a byte-level BPE tokenizer trained on the
//! texts at hand, and its chat template.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::sequence::Sequence;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

use super::error::DataError;

/// Sizes of the Llama in `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub intermediate: usize,
}

impl Shape {
    /// # Errors
    /// Sizes of 0, or that do not divide each other; names the first.
    pub(super) fn check(&self) -> Result<(), DataError> {
        let refuse = |key, found: String, expected: String| Err(DataError::Option { key, found, expected });
        let Self { hidden, layers, heads, kv_heads, intermediate } = *self;
        let sizes = [("layers", layers), ("heads", heads), ("kv_heads", kv_heads), ("intermediate", intermediate)];
        if let Some((key, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return refuse(key, "0".to_owned(), "at least 1".to_owned());
        }
        if !heads.is_multiple_of(kv_heads) {
            return refuse("heads", heads.to_string(), format!("a multiple of kv_heads = {kv_heads}"));
        }
        if hidden == 0 || !hidden.is_multiple_of(2 * heads) {
            let expected = format!("a multiple of {}: an even number for each of {heads} heads", 2 * heads);
            return refuse("hidden", hidden.to_string(), expected);
        }
        Ok(())
    }
}

/// Writes `config.json` and a tokenizer of at most `vocab_size` tokens, learnt from all strings of JSON lines files, into `out`; gives
/// the number of tokens. The same files give the same bytes.
///
/// # Errors
/// Options out of range, a folder that is not empty (without `force`), a line that is no JSON, files that cannot be read or written.
pub fn from_files(
    out: &Path,
    files: &[PathBuf],
    vocab_size: usize,
    shape: &Shape,
    force: bool,
) -> Result<usize, DataError> {
    check_vocab(vocab_size)?;
    shape.check()?;
    if !force && fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(DataError::NotEmpty { path: out.to_owned() });
    }
    let mut texts = Vec::new();
    for path in files {
        let text = fs::read_to_string(path).map_err(|source| DataError::Read {
            path: path.clone(),
            source,
            hint: String::new(),
        })?;
        for (line, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
            let value: Value = serde_json::from_str(text).map_err(|e| DataError::Json {
                path: path.clone(),
                line: line + 1,
                reason: e.to_string(),
            })?;
            strings(&value, &mut texts);
        }
    }
    let (files, num_tokens) = folder(&texts, vocab_size, shape)?;
    fs::create_dir_all(out).map_err(|source| DataError::Write { path: out.to_owned(), source })?;
    for (name, text) in files {
        let path = out.join(name);
        fs::write(&path, text).map_err(|source| DataError::Write { path, source })?;
    }
    Ok(num_tokens)
}

/// Every string inside a JSON value.
fn strings(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => found.push(text.clone()),
        Value::Array(values) => values.iter().for_each(|value| strings(value, found)),
        Value::Object(fields) => fields.values().for_each(|value| strings(value, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) => (),
    }
}

pub(super) fn check_vocab(vocab_size: usize) -> Result<(), DataError> {
    let (found, expected) = (vocab_size.to_string(), format!("at least {MIN_VOCAB}"));
    if vocab_size < MIN_VOCAB { Err(DataError::Option { key: "vocab_size", found, expected }) } else { Ok(()) }
}

/// The files of a model folder without weights, by name, and the number of tokens.
pub(super) fn folder(
    texts: &[String],
    vocab_size: usize,
    shape: &Shape,
) -> Result<([(&'static str, String); 4], usize), DataError> {
    let failed = |e: tokenizers::Error| DataError::Tokenize { reason: e.to_string() };
    let tokenizer = train_tokenizer(texts, vocab_size).map_err(failed)?;
    let num_tokens = tokenizer.get_vocab_size(true);
    let json = |value: &Value| format!("{value:#}\n");
    let files = [
        ("config.json", json(&config(shape, num_tokens))),
        ("generation_config.json", json(&generation_config())),
        ("tokenizer.json", tokenizer.to_string(true).map_err(failed)? + "\n"),
        ("tokenizer_config.json", json(&tokenizer_config())),
    ];
    Ok((files, num_tokens))
}

/// Special tokens in the order of their ids. The last three mark who speaks in the chat template.
const SPECIAL: [&str; 6] = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"];
const PAD: u32 = 0;
const BOS: u32 = 1;
const EOS: u32 = 2;
/// Smallest vocabulary: the special tokens, every byte and a few merges.
const MIN_VOCAB: usize = 320;
/// Embedding rows come in multiples of this, so that vocabulary-parallel ranks get equal shares.
const ROWS: usize = 64;
const MAX_POSITIONS: usize = 512;

const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}\
    {% if message['role'] == 'tool' %}{{ raise_exception('the roles are system, user and assistant') }}{% endif %}\
    {{ '<|' + message['role'] + '|>' + message['content'] }}\
    {% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

/// Trains a byte-level BPE tokenizer of at most `vocab_size` tokens; same texts, same tokenizer. Text gets a
/// begin-of-text token when special tokens are asked for.
fn train_tokenizer(texts: &[String], vocab_size: usize) -> tokenizers::Result<Tokenizer> {
    let bytes = ByteLevel::default().add_prefix_space(false).trim_offsets(false);
    let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(BPE::default()));
    tokenizer.with_pre_tokenizer(Some(bytes));
    tokenizer.with_decoder(Some(bytes));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(SPECIAL.iter().map(|&token| AddedToken::from(token, true)).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts.iter())?;
    let begin = TemplateProcessing::builder()
        .try_single(format!("{} $A", SPECIAL[BOS as usize]))?
        .special_tokens(vec![(SPECIAL[BOS as usize], BOS)])
        .build()?;
    let steps = vec![PostProcessorWrapper::ByteLevel(bytes), PostProcessorWrapper::Template(begin)];
    tokenizer.with_post_processor(Some(PostProcessorWrapper::Sequence(Sequence::new(steps))));
    Ok(tokenizer)
}

/// `config.json`: a Llama with at least `num_tokens` embedding rows.
fn config(shape: &Shape, num_tokens: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden / shape.heads,
        "hidden_act": "silu",
        "vocab_size": num_tokens.next_multiple_of(ROWS),
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "initializer_range": 0.02,
        "use_cache": true,
        "torch_dtype": "float32",
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    })
}

/// `tokenizer_config.json`.
fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD as usize],
        "bos_token": SPECIAL[BOS as usize],
        "eos_token": SPECIAL[EOS as usize],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    })
}

/// `generation_config.json`: greedy.
fn generation_config() -> Value {
    json!({ "do_sample": false, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS })
}
