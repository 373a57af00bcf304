//! From a record to tokens: joint tokenisation of prompt and answer, and which tokens are scored.
//!
//! Prompt and answer are tokenised as one text, as the model will read them, and the tokenizer's offsets say which
//! tokens reach into the answer. Tokenising the two apart and joining them gives other tokens at the border.

mod chat;
mod folder;
mod score;
#[cfg(test)]
pub(super) mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use score::{Passage, Scored, ids, score};
use tokenizers::Tokenizer;

use super::error::DataError;
use super::record::{Content, Message, Record, Role};
use super::template::{ChatTemplate, PromptAnswer};
use crate::config::Template;

/// One sequence for the model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sample {
    pub tokens: Vec<i32>,
    /// Positions `p >= 1`, ascending, of the tokens whose log-probability counts. Token `p` is predicted at position `p
    /// - 1`.
    pub scored: Vec<u32>,
}

/// What one record became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// One sample, or the windows of a long text. Empty if no scored token fits into `max_length`.
    pub samples: Vec<Sample>,
    /// Length before anything was cut or split. Unit: tokens.
    pub len: usize,
    /// Length of the prompt: position of the first scored token. Unit: tokens.
    pub prompt_len: usize,
    /// Tokens cut off at `max_length`, or left over as a text's last window of one token. Unit: tokens.
    pub lost: usize,
    /// A token holds both the end of the prompt and the beginning of the answer; it is scored.
    pub straddles: bool,
    /// The chat template writes the turns before an answer otherwise once the answer is there.
    pub prefix_broken: bool,
    /// The template writes a begin-of-text token and the tokenizer adds another.
    pub doubled_bos: bool,
}

/// A tokenizer with its template: everything that turns records into samples.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Tokenizer,
    form: Form,
    system: Option<String>,
    bos: Option<i32>,
    /// End-of-text tokens; the first is the one that is appended.
    eos: Vec<i32>,
    /// Ids of the special tokens, end-of-text tokens included.
    special: BTreeSet<i32>,
    folder: PathBuf,
}

#[derive(Debug)]
enum Form {
    PromptAnswer(PromptAnswer),
    /// `None` if the folder has no template, which is an error only once a sample needs one.
    Chat(Option<Box<ChatTemplate>>),
}

impl Encoder {
    /// Loads `tokenizer.json`, the special tokens and the chat template of a Hugging Face folder.
    ///
    /// `system` is put before the question of `qa` samples; it needs the chat template.
    ///
    /// # Errors
    /// Files that are missing or do not parse, no end-of-text token, a template without its placeholders. A missing
    /// chat template is an error of [`Encoder::encode`], since texts need none.
    pub fn from_folder(folder: &Path, template: &Template, system: Option<&str>) -> Result<Self, DataError> {
        folder::load(folder, template, system)
    }

    /// Samples of at most `max_length` tokens: `qa` and `chat` are cut at the end, texts are split into windows.
    ///
    /// # Errors
    /// A chat template that is missing or refuses the messages; a `chat` record with a prompt and answer template.
    pub fn encode(&self, record: &Record, max_length: usize) -> Result<Encoded, DataError> {
        if max_length < 2 {
            return Err(DataError::MaxLength { found: max_length });
        }
        match &record.content {
            Content::Text(text) => self.windows(text, max_length),
            _ => self.sample(&self.passage(record)?, max_length),
        }
    }

    /// The text of a question with its answer, or of a chat, and where its answers are.
    fn passage(&self, record: &Record) -> Result<Passage, DataError> {
        Ok(match (&record.content, &self.form) {
            (Content::Text(_), _) => return Err(DataError::NothingScored),
            (Content::Qa { question, answer }, Form::PromptAnswer(template)) => {
                let (prompt, answer) = template.fill(question, answer);
                let text = prompt.clone() + &answer;
                let turns = std::iter::once(prompt.len()..text.len()).collect();
                Passage { text, turns, is_chat: false, prefix_broken: false }
            }
            (Content::Qa { question, answer }, Form::Chat(template)) => {
                let system = self.system.iter().map(|text| Message { role: Role::System, content: text.clone() });
                let user = Message { role: Role::User, content: question.clone() };
                let assistant = Message { role: Role::Assistant, content: answer.clone() };
                let messages: Vec<_> = system.chain([user, assistant]).collect();
                chat::passage(self.required(template)?, &messages)?
            }
            (Content::Chat(messages), Form::Chat(template)) => chat::passage(self.required(template)?, messages)?,
            (Content::Chat(_), Form::PromptAnswer(_)) => return Err(DataError::ChatNeedsChatTemplate),
        })
    }

    /// What a model is given that is to answer `question`: up to where the answer of a sample begins.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn question(&self, question: &str) -> Result<Vec<i32>, DataError> {
        match &self.form {
            Form::PromptAnswer(template) => self.text(&template.fill(question, "").0),
            Form::Chat(_) => self.turns(&[Message { role: Role::User, content: question.to_owned() }]),
        }
    }

    /// What a model is given that is to answer a chat of these turns, with the system message before them where the encoder has one
    /// and they have none.
    ///
    /// # Errors
    /// A chat template that is missing or refuses the messages; a prompt and answer template.
    pub fn turns(&self, messages: &[Message]) -> Result<Vec<i32>, DataError> {
        let Form::Chat(template) = &self.form else { return Err(DataError::ChatNeedsChatTemplate) };
        let own = messages.iter().any(|message| message.role == Role::System);
        let system = self.system.iter().filter(|_| !own);
        let system = system.map(|text| Message { role: Role::System, content: text.clone() });
        let messages: Vec<_> = system.chain(messages.iter().cloned()).collect();
        Ok(ids(&self.run(&chat::prompt(self.required(template)?, &messages)?, false)?))
    }

    /// A question with its answer, of which only that is scored, behind other questions with their answers.
    ///
    /// # Errors
    /// As [`Self::encode`]; a sample of more than `max_length` tokens is an error here.
    pub fn behind(
        &self,
        examples: &[(&str, &str)],
        question: &str,
        answer: &str,
        max_length: usize,
    ) -> Result<Sample, DataError> {
        let sample = match &self.form {
            Form::PromptAnswer(template) => {
                let shown = examples.iter().map(|(question, answer)| {
                    let (prompt, answer) = template.fill(question, answer);
                    format!("{prompt}{answer}\n\n")
                });
                let (prompt, answer) = template.fill(question, answer);
                let prompt = shown.chain([prompt]).collect::<String>();
                let mut sample = self.continuation(&prompt, &answer)?;
                sample.scored.push(sample.tokens.len() as u32);
                sample.tokens.push(self.eos[0]);
                sample
            }
            Form::Chat(_) => {
                let turn = |role, text: &str| Message { role, content: text.to_owned() };
                let pair = |question: &str, answer: &str| [turn(Role::User, question), turn(Role::Assistant, answer)];
                let shown = examples.iter().flat_map(|(question, answer)| pair(question, answer));
                let system = self.system.iter().map(|text| turn(Role::System, text));
                let messages: Vec<_> = system.chain(shown).chain(pair(question, answer)).collect();
                let asked = self.turns(&messages[..messages.len() - 1])?.len() as u32;
                let record = Record::plain(0, Content::Chat(messages));
                let mut samples = self.encode(&record, usize::MAX)?.samples;
                let mut sample = samples.pop().ok_or(DataError::NothingScored)?;
                sample.scored.retain(|&at| at >= asked);
                sample
            }
        };
        match sample.tokens.len() {
            len if len > max_length => Err(DataError::TooLong { len, max_length }),
            _ => Ok(sample),
        }
    }

    /// Positions of the tokens that reach into `part` of a record's last answer, in the sample that [`Self::encode`] makes; none where
    /// the answer does not hold it.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn part_of_answer(&self, record: &Record, part: &str) -> Result<Vec<u32>, DataError> {
        let passage = self.passage(record)?;
        let Some(turn) = passage.turns.last() else { return Ok(Vec::new()) };
        let Some(at) = passage.text[turn.clone()].find(part) else { return Ok(Vec::new()) };
        let (start, end) = (turn.start + at, turn.start + at + part.len());
        let encoding = self.run(&passage.text, !passage.is_chat)?;
        let reaches = |&p: &usize| {
            let (first, last) = encoding.get_offsets()[p];
            p > 0 && first < end && last > start
        };
        Ok((0..encoding.len()).filter(reaches).map(|p| p as u32).collect())
    }

    /// The tokens of a text that is to be continued; begin-of-text tokens where the tokenizer puts them.
    ///
    /// # Errors
    /// A tokenizer that refuses the text.
    pub fn text(&self, text: &str) -> Result<Vec<i32>, DataError> {
        let mut tokens = ids(&self.run(text, true)?);
        // some tokenizers end every text
        while tokens.len() > 1 && tokens.last().is_some_and(|&token| self.ends_text(token)) {
            tokens.pop();
        }
        Ok(tokens)
    }

    /// The text of `tokens` without special tokens.
    pub fn decode(&self, tokens: &[i32]) -> String {
        let ids: Vec<u32> = tokens.iter().map(|&token| token as u32).collect();
        self.tokenizer.decode(&ids, true).unwrap_or_default()
    }

    /// `prompt` and `text` as one text without template, with the tokens that reach into `text` scored; no end-of-text token is added.
    ///
    /// # Errors
    /// A tokenizer that refuses the text, or makes no token of `text`.
    pub fn continuation(&self, prompt: &str, text: &str) -> Result<Sample, DataError> {
        let encoding = self.run(&[prompt, text].concat(), true)?;
        let own = |at: &usize| encoding.get_special_tokens_mask()[*at] == 0;
        let end = (0..encoding.len()).rfind(own).map_or(0, |last| last + 1);
        let reaches = |&at: &usize| at > 0 && own(&at) && encoding.get_offsets()[at].1 > prompt.len();
        let scored: Vec<u32> = (0..end).filter(reaches).map(|at| at as u32).collect();
        if scored.is_empty() {
            return Err(DataError::NothingScored);
        }
        Ok(Sample { tokens: ids(&encoding)[..end].to_vec(), scored })
    }

    /// Whether a token is none of the text: an end of text or of a turn, for example.
    pub fn is_special(&self, token: i32) -> bool {
        self.special.contains(&token)
    }

    /// Whether a token stands before every text.
    pub fn begins_text(&self, token: i32) -> bool {
        self.bos == Some(token)
    }

    /// Whether generation stops at a token.
    pub fn ends_text(&self, token: i32) -> bool {
        self.eos.contains(&token)
    }

    /// Whether the folder has a chat template, where one was asked for.
    pub fn has_chat_template(&self) -> bool {
        matches!(self.form, Form::Chat(Some(_)))
    }

    fn required<'a>(&self, template: &'a Option<Box<ChatTemplate>>) -> Result<&'a ChatTemplate, DataError> {
        template.as_deref().ok_or_else(|| DataError::NoChatTemplate { folder: self.folder.clone() })
    }

    fn sample(&self, passage: &Passage, max_length: usize) -> Result<Encoded, DataError> {
        let encoding = self.run(&passage.text, !passage.is_chat)?;
        let Scored { mut tokens, mut scored, straddles } = score(passage, &encoding, &self.special, &self.eos);
        let len = tokens.len();
        let prompt_len = *scored.first().ok_or(DataError::NothingScored)? as usize;
        let doubled_bos = self.doubled_bos(&tokens);
        tokens.truncate(max_length);
        scored.retain(|&p| (p as usize) < max_length);
        let lost = len - tokens.len();
        let samples = if scored.is_empty() { Vec::new() } else { vec![Sample { tokens, scored }] };
        Ok(Encoded { samples, len, prompt_len, lost, straddles, prefix_broken: passage.prefix_broken, doubled_bos })
    }

    /// Splits a text into windows in which every token but the first is scored.
    fn windows(&self, text: &str, max_length: usize) -> Result<Encoded, DataError> {
        let mut tokens = ids(&self.run(text, true)?);
        if !tokens.last().is_some_and(|token| self.eos.contains(token)) {
            tokens.push(self.eos[0]);
        }
        let window = |tokens: &[i32]| Sample { tokens: tokens.to_vec(), scored: (1..tokens.len() as u32).collect() };
        let samples: Vec<_> = tokens.chunks(max_length).filter(|tokens| tokens.len() > 1).map(window).collect();
        if samples.is_empty() {
            return Err(DataError::NothingScored);
        }
        let kept: usize = samples.iter().map(|sample| sample.tokens.len()).sum();
        Ok(Encoded {
            samples,
            len: tokens.len(),
            prompt_len: 1,
            lost: tokens.len() - kept,
            straddles: false,
            prefix_broken: false,
            doubled_bos: self.doubled_bos(&tokens),
        })
    }

    fn doubled_bos(&self, tokens: &[i32]) -> bool {
        tokens.len() > 2 && self.bos == Some(tokens[0]) && tokens[0] == tokens[1]
    }

    fn run(&self, text: &str, add_special_tokens: bool) -> Result<tokenizers::Encoding, DataError> {
        self.tokenizer.encode(text, add_special_tokens).map_err(|e| DataError::Tokenize { reason: e.to_string() })
    }
}

#[cfg(test)]
impl Encoder {
    pub(in crate::data) fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }
}
