use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// Ids of the special tokens of [`byte_tokenizer`].
const BOS: i32 = 256;
const EOS: i32 = 257;
const END: i32 = 258;
/// Id of the first merge.
const MERGED: i32 = 259;

/// A folder with a tokenizer whose tokens are bytes: the id of a byte is its value, so that expected tokens can be
/// written down. Each of `merges`, of two bytes, becomes a token from [`MERGED`] on.
pub(in crate::data) struct Folder(TempDir);

impl Folder {
    pub(in crate::data) fn new(merges: &[[u8; 2]], patch: impl FnOnce(&mut Value)) -> Self {
        let mut tokenizer = byte_tokenizer(merges);
        patch(&mut tokenizer);
        let folder = Self(TempDir::new().unwrap());
        folder.write("tokenizer.json", &tokenizer.to_string());
        folder.config(json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" } }));
        folder
    }

    fn config(&self, config: Value) {
        self.write("tokenizer_config.json", &config.to_string());
    }

    pub(in crate::data) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(in crate::data) fn write(&self, name: &str, text: &str) {
        fs::write(self.path().join(name), text).unwrap();
    }

    /// An encoder with a prompt and answer template.
    pub(in crate::data) fn explicit(&self, prompt: &str, answer: &str) -> Encoder {
        let template = serde_json::from_value(json!({ "prompt": prompt, "answer": answer })).unwrap();
        Encoder::from_folder(self.path(), &template, None).unwrap()
    }

    /// An encoder with the chat template `source`.
    fn chat(&self, source: &str) -> Encoder {
        self.write("chat_template.jinja", source);
        Encoder::from_folder(self.path(), &chat_template(), None).unwrap()
    }

    fn refusal(&self) -> String {
        let error = Encoder::from_folder(self.path(), &chat_template(), None).unwrap_err().to_string();
        error.replace(&self.path().display().to_string(), "FOLDER")
    }
}

fn chat_template() -> Template {
    serde_json::from_value(json!("chat")).unwrap()
}

fn byte_tokenizer(merges: &[[u8; 2]]) -> Value {
    // GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let others: Vec<u8> = (0..=255).filter(|&b| !printable(b)).collect();
    let symbol = |b: u8| match others.iter().position(|&other| other == b) {
        Some(i) => char::from_u32(256 + i as u32).unwrap(),
        None => char::from(b),
    };
    let bytes = (0..=255u8).map(|b| (symbol(b).to_string(), json!(b)));
    let pair = |[a, b]: [u8; 2]| [symbol(a).to_string(), symbol(b).to_string()];
    let merged = merges.iter().enumerate().map(|(i, &m)| (pair(m).concat(), json!(MERGED + i as i32)));
    let special = [(BOS, "<s>"), (EOS, "</s>"), (END, "<end>")];
    let named = special.map(|(id, content)| (content.to_owned(), json!(id)));
    let added = special.map(|(id, content)| {
        json!({ "id": id, "content": content, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false })
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": bytes.chain(named).chain(merged).collect::<serde_json::Map<_, _>>(),
            "merges": merges.iter().map(|&m| pair(m)).collect::<Vec<_>>(),
        },
    })
}

/// A post-processor that puts special tokens around a text.
fn around(begin: bool, end: bool) -> Value {
    let token = |name: &str| json!({ "SpecialToken": { "id": name, "type_id": 0 } });
    let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let single = [begin.then(|| token("<s>")), Some(text), end.then(|| token("</s>"))];
    json!({
        "type": "TemplateProcessing", "single": single.iter().flatten().collect::<Vec<_>>(), "pair": [],
        "special_tokens": {
            "<s>": { "id": "<s>", "ids": [BOS], "tokens": ["<s>"] },
            "</s>": { "id": "</s>", "ids": [EOS], "tokens": ["</s>"] },
        },
    })
}

pub(in crate::data) fn qa(question: &str, answer: &str) -> Record {
    Record::plain(1, Content::Qa { question: question.to_owned(), answer: answer.to_owned() })
}

fn bytes(text: &str) -> Vec<i32> {
    text.bytes().map(i32::from).collect()
}

/// The only sample of `record`, and everything else that was found.
fn only(encoder: &Encoder, record: &Record) -> (Sample, Encoded) {
    let encoded = encoder.encode(record, 1000).unwrap();
    assert_eq!(encoded.samples.len(), 1);
    (encoded.samples[0].clone(), encoded)
}

#[test]
fn the_answer_and_the_end_are_scored() {
    let encoder = Folder::new(&[], |_| {}).explicit("Q: {question}\nA:", " {answer}");
    let (sample, encoded) = only(&encoder, &qa("why", "so"));
    let (prompt, answer) = (bytes("Q: why\nA:"), bytes(" so"));
    assert_eq!(sample.tokens, [prompt.clone(), answer.clone(), vec![EOS]].concat());
    let first = prompt.len() as u32;
    assert_eq!(sample.scored, (first..first + 4).collect::<Vec<_>>());
    assert_eq!((encoded.len, encoded.prompt_len, encoded.lost), (13, 9, 0));
    assert_eq!((encoded.straddles, encoded.prefix_broken, encoded.doubled_bos), (false, false, false));
}

#[test]
fn offsets_are_bytes_and_keep_their_white_space() {
    let trimming = |t: &mut Value| {
        t["post_processor"] = json!({ "type": "Sequence", "processors": [
            { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
            around(true, false)
        ] });
    };
    let encoder = Folder::new(&[], trimming).explicit("{question}: ", "\n {answer}");
    let (sample, encoded) = only(&encoder, &qa("Wörk 🦀", "ä \u{3000}b"));
    let (prompt, answer) = (bytes("Wörk 🦀: "), bytes("\n ä \u{3000}b"));
    assert_eq!(sample.tokens, [vec![BOS], prompt.clone(), answer.clone(), vec![EOS]].concat());
    let first = 1 + prompt.len() as u32;
    assert_eq!(sample.scored, (first..=first + answer.len() as u32).collect::<Vec<_>>());
    assert!(!encoded.straddles);
}

#[test]
fn the_tokenizers_own_end_is_scored_and_not_doubled() {
    let encoder = Folder::new(&[], |t| t["post_processor"] = around(true, true)).explicit("{question}", "{answer}");
    let (sample, _) = only(&encoder, &qa("q", "a"));
    assert_eq!(sample.tokens, [BOS, b'q' as i32, b'a' as i32, EOS]);
    assert_eq!(sample.scored, [2, 3]);
}

#[test]
fn a_normalizer_moves_no_border() {
    let encoder = Folder::new(&[], |t| t["normalizer"] = json!({ "type": "NFC" })).explicit("{question}:", "{answer}");
    let (sample, _) = only(&encoder, &qa("e\u{301}e\u{301}", "o\u{308}!"));
    assert_eq!(sample.tokens, [bytes("éé:ö!"), vec![EOS]].concat());
    assert_eq!(sample.scored, [5, 6, 7, 8]);
}

#[test]
fn a_marker_of_spaces_put_before_the_text_moves_no_border() {
    // as the tokenizers of Llama 2 and Mistral do: the text begins with a marker that stands for no byte of it
    let marking = |t: &mut Value| {
        t["normalizer"] = json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "\u{2581}" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        ] });
        t["pre_tokenizer"] = Value::Null;
        t["post_processor"] = around(true, false);
        t["model"]["vocab"] = json!({ "\u{2581}": 0, "q": 1, ":": 2, "a": 3, "<s>": BOS, "</s>": EOS, "<end>": END });
    };
    let encoder = Folder::new(&[], marking).explicit("{question}:", " {answer}");
    let (sample, encoded) = only(&encoder, &qa("q", "a a"));
    assert_eq!(sample.tokens, [BOS, 0, 1, 2, 0, 3, 0, 3, EOS]);
    assert_eq!((sample.scored.as_slice(), encoded.straddles), ([4, 5, 6, 7, 8].as_slice(), false));
}

#[test]
fn a_token_across_the_border_is_scored_and_counted() {
    let folder = Folder::new(&[[b' ', b'x'], [b'x', b'y']], |t| {
        t["post_processor"] = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true });
    });
    let (sample, encoded) = only(&folder.explicit("{question}: ", "{answer}"), &qa("q", "xz"));
    assert_eq!(sample.tokens, [b'q' as i32, b':' as i32, MERGED, b'z' as i32, EOS]);
    assert_eq!((sample.scored.as_slice(), encoded.straddles), ([2, 3, 4].as_slice(), true));
    let (sample, encoded) = only(&folder.explicit("{question}:", " {answer}"), &qa("q", "xz"));
    assert_eq!((sample.scored.as_slice(), encoded.straddles), ([2, 3, 4].as_slice(), false));
    // nothing predicts the first token
    let (sample, encoded) = only(&folder.explicit("{question}", "{answer}"), &qa("x", "y"));
    assert_eq!((sample.tokens.as_slice(), sample.scored.as_slice()), ([MERGED + 1, EOS].as_slice(), [1].as_slice()));
    assert!(encoded.straddles);
}

#[test]
fn a_special_token_of_the_prompt_is_not_the_answer() {
    let swallowing = |t: &mut Value| t["added_tokens"][2]["rstrip"] = json!(true);
    let encoder = Folder::new(&[], swallowing).explicit("{question}<end>", "{answer}");
    let (sample, encoded) = only(&encoder, &qa("q", "  a"));
    assert_eq!(sample.tokens, [b'q' as i32, END, b'a' as i32, EOS]);
    assert_eq!((sample.scored.as_slice(), encoded.straddles), ([2, 3].as_slice(), false));
}

#[test]
fn the_files_own_truncation_and_padding_are_switched_off() {
    let switched_on = |t: &mut Value| {
        t["truncation"] = json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
        t["padding"] = json!({ "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
                               "pad_id": 0, "pad_type_id": 0, "pad_token": "!" });
    };
    let (sample, _) = only(&Folder::new(&[], switched_on).explicit("{question}:", "{answer}"), &qa("long", "long"));
    assert_eq!(sample.tokens, [bytes("long:long"), vec![EOS]].concat());
}

#[test]
fn long_samples_are_cut_at_the_end() {
    let encoder = Folder::new(&[], |_| {}).explicit("{question}:", "{answer}");
    let encoded = encoder.encode(&qa("1234", "abc"), 6).unwrap();
    assert_eq!(encoded.samples, [Sample { tokens: bytes("1234:a"), scored: vec![5] }]);
    assert_eq!((encoded.len, encoded.prompt_len, encoded.lost), (9, 5, 3));
    let encoded = encoder.encode(&qa("1234", "abc"), 5).unwrap();
    assert_eq!((encoded.samples.len(), encoded.prompt_len, encoded.len), (0, 5, 9));
    let error = encoder.encode(&qa("1234", "abc"), 1).unwrap_err().to_string();
    assert_eq!(error, "data.max_length is 1, expected at least 2: a token is predicted from the one before it");
}

#[test]
fn texts_become_windows() {
    let encoder = Folder::new(&[], |t| t["post_processor"] = around(true, false)).explicit("{question}", "{answer}");
    let windows = |text: &str, max_length| {
        let encoded = encoder.encode(&Record::plain(1, Content::Text(text.to_owned())), max_length).unwrap();
        let tokens: Vec<_> = encoded.samples.iter().map(|s| s.tokens.clone()).collect();
        for Sample { tokens, scored } in &encoded.samples {
            assert_eq!(*scored, (1..tokens.len() as u32).collect::<Vec<_>>());
        }
        (tokens, encoded.lost)
    };
    assert_eq!(windows("abc", 5), (vec![[vec![BOS], bytes("abc"), vec![EOS]].concat()], 0));
    let split = vec![[vec![BOS], bytes("abc")].concat(), bytes("defg"), vec![b'h' as i32, EOS]];
    assert_eq!(windows("abcdefgh", 4), (split.clone(), 0));
    assert_eq!(windows("abcdefg", 4), (split[..2].to_vec(), 1));
}

/// A chat template with a marker before and a token behind each turn.
const TURNS: &str = "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content + '<end>\n' }}{% endfor %}\
                     {% if add_generation_prompt %}{{ 'a:' }}{% endif %}";

fn conversation(turns: &[(Role, &str)]) -> Record {
    let messages = turns.iter().map(|&(role, content)| Message { role, content: content.to_owned() });
    Record::plain(1, Content::Chat(messages.collect()))
}

/// The sample as text, with each run of scored tokens in brackets.
fn marked(sample: &Sample) -> String {
    let name = |token: i32| match token {
        BOS => "<s>".to_owned(),
        EOS => "</s>".to_owned(),
        END => "<end>".to_owned(),
        byte => char::from(byte as u8).to_string(),
    };
    let mut text = String::new();
    for (p, &token) in sample.tokens.iter().enumerate() {
        let is_scored = |p: usize| sample.scored.contains(&(p as u32));
        let (before, now) = (p > 0 && is_scored(p - 1), is_scored(p));
        text.push_str(if now && !before {
            "["
        } else if before && !now {
            "]"
        } else {
            ""
        });
        text.push_str(&name(token));
    }
    text + if sample.scored.last().map(|&p| p as usize + 1) == Some(sample.tokens.len()) { "]" } else { "" }
}

#[test]
fn every_assistant_turn_is_scored_up_to_its_end() {
    let encoder = Folder::new(&[], |_| {}).chat(TURNS);
    let turns = [
        (Role::System, "sys"),
        (Role::User, "one"),
        (Role::Assistant, "uno "),
        (Role::User, "two"),
        (Role::Assistant, "dos"),
        (Role::User, "never answered"),
    ];
    let (sample, encoded) = only(&encoder, &conversation(&turns));
    assert_eq!(marked(&sample), "<s>s:sys<end>\nu:one<end>\na:[uno <end>]\nu:two<end>\na:[dos<end>]");
    assert!(!encoded.prefix_broken && !encoded.straddles && !encoded.doubled_bos);
}

#[test]
fn a_question_is_a_chat_with_the_system_message_before_it() {
    let folder = Folder::new(&[], |t| t["post_processor"] = around(true, true));
    folder.write("chat_template.jinja", TURNS);
    let encoder = Encoder::from_folder(folder.path(), &chat_template(), Some("S")).unwrap();
    // the template writes its own special tokens: the tokenizer adds none
    assert_eq!(marked(&only(&encoder, &qa("q", "a")).0), "<s>s:S<end>\nu:q<end>\na:[a<end>]");
}

#[test]
fn a_turn_without_an_end_of_its_own_gets_one() {
    let plain = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}\
                 {% if add_generation_prompt %}{{ 'a:' }}{% endif %}";
    let encoder = Folder::new(&[], |_| {}).chat(plain);
    assert_eq!(marked(&only(&encoder, &qa("q", "x")).0), "u:q\na:[x\n</s>]");
}

#[test]
fn a_generation_prompt_that_the_answer_does_not_follow_is_marked() {
    let thinking = TURNS.replace("{{ 'a:' }}", "{{ 'a:<think>' }}");
    let (sample, encoded) = only(&Folder::new(&[], |_| {}).chat(&thinking), &qa("a", "<a> a"));
    assert_eq!(marked(&sample), "<s>u:a<end>\na:[<a> a<end>]");
    assert!(encoded.prefix_broken);
}

/// Qwen3 writes an empty block of reasoning before the last answer, and into the prompt of a model that shall not reason.
#[test]
fn an_empty_block_of_reasoning_is_no_part_of_the_answer() {
    let source = "{% for m in messages %}{{ m.role[0] + ':' }}{% if m.role == 'assistant' and loop.last %}{{ '()' }}{% endif %}\
                  {{ m.content + '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}\
                  {% if enable_thinking is defined and enable_thinking is false %}{{ '()' }}{% endif %}{% endif %}";
    let (sample, encoded) = only(&Folder::new(&[], |_| {}).chat(source), &qa("q", "xy"));
    assert!(!encoded.prefix_broken);
    assert_eq!(marked(&sample), "u:q<end>a:()[xy<end>]");
}

/// Phi-3 writes an end-of-text token behind the last turn's own end, which a model never gets to write.
#[test]
fn a_turn_ends_at_the_first_token_that_ends_a_generation() {
    let folder = Folder::new(&[], |_| {});
    folder.write("generation_config.json", &json!({ "eos_token_id": [EOS, END] }).to_string());
    let source = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<end>\n' }}{% endfor %}\
                  {% if add_generation_prompt %}{{ 'a:' }}{% else %}{{ eos_token }}{% endif %}";
    let (sample, _) = only(&folder.chat(source), &qa("q", "xy"));
    assert_eq!(marked(&sample), "u:q<end>\na:[xy<end>]");
}

#[test]
fn turns_that_are_written_otherwise_once_others_follow_are_found() {
    // reasoning stays only in the last turn, and so does the end-of-text token
    let forgetful = "{% for m in messages %}{% if loop.last %}\
                     {{ m.role[0] + ':' + m.content + '<end>\n</s>' }}{% else %}\
                     {{ m.role[0] + ':' + m.content.split('#')[-1] + '<end>\n' }}{% endif %}{% endfor %}\
                     {% if add_generation_prompt %}{{ 'a:' }}{% endif %}";
    let turns = [(Role::User, "two"), (Role::Assistant, "hm#two"), (Role::User, "two"), (Role::Assistant, "hm#2")];
    let (sample, _) = only(&Folder::new(&[], |_| {}).chat(forgetful), &conversation(&turns));
    assert_eq!(marked(&sample), "u:two<end>\na:[two<end>]\nu:two<end>\na:[hm#2<end>\n</s>]");

    // earlier turns end in another token
    let other_end = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}\
                     {{ '</s>' if loop.last and m.role == 'assistant' else '<end>' }}{% endfor %}\
                     {% if add_generation_prompt %}{{ 'a:' }}{% endif %}";
    let (sample, encoded) = only(&Folder::new(&[], |_| {}).chat(other_end), &conversation(&turns));
    assert_eq!(marked(&sample), "u:two<end>a:[hm#two<end>]u:two<end>a:[hm#2</s>]");
    assert!(!encoded.prefix_broken);
}

#[test]
fn two_begin_of_text_tokens_are_noticed() {
    let folder = Folder::new(&[], |t| t["post_processor"] = around(true, false));
    assert!(only(&folder.explicit("<s>{question}:", "{answer}"), &qa("q", "a")).1.doubled_bos);
    assert!(!only(&folder.explicit("{question}:", "{answer}"), &qa("q", "a")).1.doubled_bos);
}

#[test]
fn a_template_fits_its_kind() {
    let folder = Folder::new(&[], |_| {});
    let encode = |encoder: Encoder, record: &Record| encoder.encode(record, 9).map(|_| ()).map_err(|e| e.to_string());
    let chat = conversation(&[(Role::User, "q"), (Role::Assistant, "a")]);
    let error = encode(folder.explicit("{question}", "{answer}"), &chat).unwrap_err();
    assert!(error.starts_with("kind \"chat\" needs data.template = \"chat\""), "{error}");
    // a folder without a chat template is good for texts
    let without = || Encoder::from_folder(folder.path(), &chat_template(), None).unwrap();
    assert_eq!(encode(without(), &Record::plain(1, Content::Text("abc".to_owned()))), Ok(()));
    let error = encode(without(), &chat).unwrap_err();
    assert!(
        error.starts_with("no chat template in ") && error.contains("write data.template = { prompt = "),
        "{error}"
    );
    let template = serde_json::from_value(json!({ "prompt": "{question}", "answer": "{answer}" })).unwrap();
    let error = Encoder::from_folder(folder.path(), &template, Some("S")).unwrap_err().to_string();
    assert!(error.starts_with("data.system has no effect on a prompt and answer template"), "{error}");
}

#[test]
fn the_end_of_text_token_comes_from_the_first_file_that_has_it() {
    let folder = Folder::new(&[], |_| {});
    let eos = || Encoder::from_folder(folder.path(), &chat_template(), None).unwrap().eos;
    folder.write("config.json", r#"{"eos_token_id": 7}"#);
    assert_eq!(eos(), [EOS, 7]);
    folder.write("generation_config.json", r#"{"eos_token_id": [258, 257]}"#);
    assert_eq!(eos(), [EOS, END]);
    folder.config(json!({ "eos_token": null }));
    assert_eq!(eos(), [END, EOS]);
    folder.write("generation_config.json", "{}");
    assert_eq!(eos(), [7]);

    folder.write("config.json", r#"{"eos_token_id": 5000}"#);
    let expected = "FOLDER/config.json: eos_token_id holds 5000, expected the number of a token in tokenizer.json";
    assert_eq!(folder.refusal(), expected);
    fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(
        folder.refusal().starts_with("no end-of-text token in FOLDER: expected eos_token in tokenizer_config.json")
    );
    folder.config(json!({ "eos_token": "<eos>" }));
    let expected =
        "FOLDER/tokenizer_config.json: eos_token is \"<eos>\", which tokenizer.json does not have as a token";
    assert_eq!(folder.refusal(), expected);
}

#[test]
fn a_folder_without_a_tokenizer_says_what_it_has() {
    let folder = Folder(TempDir::new().unwrap());
    assert!(folder.refusal().starts_with("no tokenizer.json in FOLDER, nor any other tokenizer file"));
    folder.write("tokenizer.model", "");
    folder.write("merges.txt", "");
    let expected =
        "no tokenizer.json in FOLDER; found merges.txt, tokenizer.model: write it with transformers' AutoTokenizer";
    assert!(folder.refusal().starts_with(expected), "{}", folder.refusal());
    folder.write("tokenizer.json", "{}");
    assert!(folder.refusal().starts_with("FOLDER/tokenizer.json: "));
}
