//! Multiple choice in the prompt form of the lm-evaluation-harness: the letters A, B, ... behind "Answer:" are scored by their
//! log-probability. MMLU with or without examples, and WMDP's three subjects.

use std::collections::BTreeMap;

use super::aggregate::{give, put};
use super::questions::{digest, filled, spread};
use super::requests::{Requests, Seen};
use super::{Reading, Suite};
use crate::config::{Choice, Wmdp};
use crate::data::{DataError, Row, find, rows};
use crate::eval::error::EvalError;
use crate::eval::record::{Better, Evaluation, Item, Metric};
use crate::eval::scores::{Text, TextScore};
use crate::eval::statistics;

const KIND: &str = "choice";

/// Questions in one or more sets.
pub(super) struct ChoiceSuite {
    name: &'static str,
    better: Better,
    sets: Vec<Set>,
}

struct Set {
    name: String,
    questions: Vec<Question>,
    digest: String,
}

struct Question {
    subject: Option<String>,
    shown: String,
    right: usize,
    scored: Scored,
}

/// The letters, all at one position where each is one token.
enum Scored {
    Together(Text),
    Apart(Vec<Text>),
}

/// A row as it stands in the file.
struct Raw {
    subject: Option<String>,
    /// Question and choices, up to "Answer:".
    asked: String,
    choices: usize,
    right: usize,
}

impl ChoiceSuite {
    /// `[eval.choice]`.
    pub(super) fn read(config: &Choice, reading: Reading) -> Result<Self, EvalError> {
        let rows = spread(rows(&config.path, config.split.as_deref())?, config.limit)?;
        let rows = filled(rows, &config.path)?;
        let mut examples = BTreeMap::<Option<String>, Vec<Raw>>::new();
        if let Some(path) = &config.examples {
            for row in crate::data::rows(path, None)? {
                let raw = raw(&row?, None)?;
                examples.entry(raw.subject.clone()).or_default().push(raw);
            }
        }
        let shots = |raw: &Raw, row: &Row| -> Result<String, EvalError> {
            let known = examples.get(&raw.subject).map_or(&[][..], Vec::as_slice);
            if known.len() < config.shots {
                let subject = raw.subject.as_deref().unwrap_or("none");
                return Err(EvalError::Refused(format!(
                    "eval.choice.shots is {}, but there are only {} examples of subject {subject:?}, which {}:{} asks about",
                    config.shots,
                    known.len(),
                    row.path.display(),
                    row.number
                )));
            }
            let shot = |raw: &Raw| format!("{} {}\n\n", raw.asked, letter(raw.right));
            Ok(known[..config.shots].iter().map(shot).collect())
        };
        let description = |raw: &Raw| raw.subject.as_ref().map(|subject| subject.replace('_', " "));
        let set = Set::read("choice", &rows, None, description, shots, reading)?;
        Ok(Self { name: "choice", better: Better::Higher, sets: vec![set] })
    }

    /// `[eval.wmdp]`.
    pub(super) fn wmdp(config: &Wmdp, reading: Reading) -> Result<Self, EvalError> {
        let mut sets = Vec::new();
        let mut missing = None;
        for (short, about) in [("bio", "biology"), ("cyber", "cybersecurity"), ("chem", "chemistry")] {
            let path = find(&config.path, short).or_else(|_| find(&config.path, &format!("wmdp-{short}")));
            let path = match path {
                Ok(path) => path,
                Err(error) => {
                    missing.get_or_insert(error);
                    continue;
                }
            };
            let rows = filled(spread(rows(&path, None)?, config.limit)?, &path)?;
            let description = |_: &Raw| Some(about.to_owned());
            let name = format!("wmdp_{short}");
            sets.push(Set::read(&name, &rows, Some(4), description, |_, _| Ok(String::new()), reading)?);
        }
        match missing {
            Some(error) if sets.is_empty() => Err(error.into()),
            _ => Ok(Self { name: "wmdp", better: Better::Lower, sets }),
        }
    }
}

impl Set {
    fn read(
        name: &str,
        rows: &[Row],
        choices: Option<usize>,
        description: impl Fn(&Raw) -> Option<String>,
        shots: impl Fn(&Raw, &Row) -> Result<String, EvalError>,
        reading: Reading,
    ) -> Result<Self, EvalError> {
        let mut questions = Vec::with_capacity(rows.len());
        let mut choices = choices;
        for row in rows {
            let raw = raw(row, choices)?;
            choices = Some(raw.choices);
            let about = description(&raw).map_or_else(String::new, |subject| {
                format!("The following are multiple choice questions (with answers) about {subject}.\n\n")
            });
            let prompt = format!("{about}{}{}", shots(&raw, row)?, raw.asked);
            let scored = letters(row, &prompt, raw.choices, reading)?;
            questions.push(Question { subject: raw.subject, shown: raw.asked, right: raw.right, scored });
        }
        let parts: Vec<String> = questions.iter().flat_map(|q| [q.shown.clone(), q.right.to_string()]).collect();
        Ok(Self { name: name.to_owned(), questions, digest: digest(parts.iter().map(String::as_str)) })
    }

    fn item(&self, index: usize, question: &Question, seen: &Seen) -> Item {
        let mut item = Item {
            index,
            prompt: question.shown.clone(),
            answer: letter(question.right).to_string(),
            group: question.subject.clone(),
            ..Item::default()
        };
        let sum = |score: &TextScore| score.logprobs.iter().map(|&x| f64::from(x)).sum::<f64>();
        let logprobs: Vec<f64> = match &question.scored {
            Scored::Together(text) => seen.score(text).logprobs.iter().map(|&x| f64::from(x)).collect(),
            Scored::Apart(texts) => texts.iter().map(|text| sum(seen.score(text))).collect(),
        };
        for (i, &logprob) in logprobs.iter().enumerate() {
            give(&mut item, &format!("logprob_{}", letter(i).to_ascii_lowercase()), Some(logprob));
        }
        // a NaN is no answer, right or wrong
        if logprobs.iter().all(|x| !x.is_nan()) {
            let best = (0..logprobs.len()).fold(0, |best, i| if logprobs[i] > logprobs[best] { i } else { best });
            give(&mut item, "correct", Some(f64::from(u8::from(best == question.right))));
        }
        item
    }
}

impl Suite for ChoiceSuite {
    fn name(&self) -> &'static str {
        self.name
    }

    fn sets(&self) -> Vec<(String, String)> {
        self.sets.iter().map(|set| (set.name.clone(), set.digest.clone())).collect()
    }

    fn ask<'a>(&'a self, requests: &mut Requests<'a>) {
        for question in self.sets.iter().flat_map(|set| &set.questions) {
            match &question.scored {
                Scored::Together(text) => requests.score(text, false),
                Scored::Apart(texts) => texts.iter().for_each(|text| requests.score(text, false)),
            }
        }
    }

    fn tell(&self, seen: &Seen, out: &mut Evaluation) {
        for set in &self.sets {
            let items: Vec<Item> = set.questions.iter().enumerate().map(|(i, q)| set.item(i, q, seen)).collect();
            let correct: Vec<f64> = items.iter().filter_map(|item| item.numbers.get("correct").copied()).collect();
            out.items.insert(set.name.clone(), items);
            let name = format!("{}.accuracy", set.name);
            let lacking = set.questions.len() - correct.len();
            if lacking > 0 {
                out.warn(format!("{name}: {lacking} questions have no answer, as a log-probability is no number"));
            }
            match statistics::mean(&correct) {
                Ok(share) => {
                    let (low, high) = wilson(share, correct.len());
                    out.put(&name, Some(&set.name), Metric::new(share, correct.len(), self.better).within(low, high));
                }
                Err(error) => put(out, &name, Some(&set.name), Err(error), 0, self.better),
            }
        }
    }
}

/// Ends of Wilson's 95% interval of a share of `n`.
fn wilson(share: f64, n: usize) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    let n = n as f64;
    let middle = share + Z * Z / (2.0 * n);
    let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    ((middle - half) / scale, (middle + half) / scale)
}

fn letter(index: usize) -> char {
    char::from(b'A' + index as u8)
}

/// Question, choices and the right one, given as an index from 0, a letter or the text.
fn raw(row: &Row, expected: Option<usize>) -> Result<Raw, DataError> {
    let question = row.text("question", KIND)?;
    let choices = row.texts("choices", KIND)?;
    if !(2..=26).contains(&choices.len()) {
        return Err(row.wrong("\"choices\"".into(), format!("a list of {}", choices.len()), "2 to 26 choices"));
    }
    if let Some(expected) = expected.filter(|&expected| expected != choices.len()) {
        let expected =
            format!("{expected}, as in the rows before: lists of unequal length have no common chance level");
        return Err(row.wrong("\"choices\"".into(), format!("a list of {}", choices.len()), &expected));
    }
    let value = row.field("answer", KIND)?;
    let from_text = |text: &str| {
        let by_letter = match text.trim().as_bytes() {
            [letter] if letter.is_ascii_uppercase() => Some(usize::from(letter - b'A')),
            _ => None,
        };
        choices.iter().position(|choice| choice == text).or(by_letter)
    };
    let right = match value {
        serde_json::Value::Number(index) => index.as_u64().map(|index| index as usize),
        serde_json::Value::String(text) => from_text(text),
        _ => None,
    };
    let right = right.filter(|&right| right < choices.len()).ok_or_else(|| {
        let expected = format!("the index from 0, the letter or the text of one of {} choices", choices.len());
        row.wrong("\"answer\"".into(), value.to_string(), &expected)
    })?;
    let subject = row.object(KIND)?.get("subject").and_then(|subject| subject.as_str()).map(str::to_owned);
    let listed = choices.iter().enumerate().map(|(i, choice)| format!("{}. {choice}\n", letter(i)));
    let asked = format!("{}\n{}Answer:", question.trim(), listed.collect::<String>());
    Ok(Raw { subject, asked, choices: choices.len(), right })
}

fn letters(row: &Row, prompt: &str, choices: usize, reading: Reading) -> Result<Scored, EvalError> {
    let mut texts = Vec::with_capacity(choices);
    for i in 0..choices {
        let sample = reading.continuation(row, prompt, &format!(" {}", letter(i)))?;
        texts.push(Text::of(&sample, false));
    }
    let first = &texts[0];
    let last = first.tokens.len() - 1;
    let alike = |text: &Text| text.targets.len() == 1 && text.tokens[..text.tokens.len() - 1] == first.tokens[..last];
    if !texts.iter().all(alike) {
        return Ok(Scored::Apart(texts));
    }
    let targets = texts.iter().map(|text| text.targets[0]).collect();
    Ok(Scored::Together(Text { tokens: first.tokens[..last].to_vec(), targets, ended: false }))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_interval_of_a_share_is_wilsons() {
        // the textbook's 0.2189 to 0.3958 for 30 of 100
        let (low, high) = wilson(0.3, 100);
        assert!((low - 0.218_949).abs() < 1e-6 && (high - 0.395_849).abs() < 1e-6, "{low} {high}");
        assert!(wilson(0.0, 10).0.abs() < 1e-15);
    }

    fn row(value: serde_json::Value) -> Row {
        Row { path: Path::new("mmlu.jsonl").into(), number: 7, value }
    }

    #[test]
    fn prompts_have_the_harness_form() {
        let row = row(
            serde_json::json!({ "question": " What? ", "choices": ["one", "two"], "answer": "B", "subject": "a_b" }),
        );
        let raw = raw(&row, None).unwrap();
        assert_eq!(raw.asked, "What?\nA. one\nB. two\nAnswer:");
        assert_eq!((raw.right, raw.subject.as_deref()), (1, Some("a_b")));
    }

    #[test]
    fn unequal_lists_and_answers_that_are_none_are_refused() {
        let message = |value, expected| raw(&row(value), expected).err().unwrap().to_string();
        let three = serde_json::json!({ "question": "q", "choices": ["a", "b", "c"], "answer": 0 });
        let error = message(three, Some(4));
        assert!(error.starts_with("mmlu.jsonl:7: field \"choices\": found a list of 3, expected 4"), "{error}");
        let error = message(serde_json::json!({ "question": "q", "choices": ["a", "b"], "answer": 2 }), None);
        assert_eq!(
            error,
            "mmlu.jsonl:7: field \"answer\": found 2, expected the index from 0, the letter or the text of one of 2 choices"
        );
        let error = message(serde_json::json!({ "question": "q", "answer": 2 }), None);
        assert!(error.contains("no field \"choices\""), "{error}");
    }
}
