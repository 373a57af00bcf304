//! The folder a model is trained in from random weights: configuration, a byte-level BPE tokenizer trained on the
//! generated text, and its chat template.

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::sequence::Sequence;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

use super::Shape;

/// Special tokens in the order of their ids. The last three mark who speaks in the chat template.
const SPECIAL: [&str; 6] = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"];
const PAD: u32 = 0;
const BOS: u32 = 1;
const EOS: u32 = 2;
/// Smallest vocabulary: the special tokens, every byte and a few merges.
pub(super) const MIN_VOCAB: usize = 320;
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
pub(super) fn train_tokenizer(texts: &[String], vocab_size: usize) -> tokenizers::Result<Tokenizer> {
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
pub(super) fn config(shape: &Shape, num_tokens: usize) -> Value {
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
pub(super) fn tokenizer_config() -> Value {
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
pub(super) fn generation_config() -> Value {
    json!({ "do_sample": false, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS })
}
