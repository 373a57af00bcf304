//! MUSE (arXiv 2407.06460): does the model continue passages verbatim, does it still answer questions about them, and about what was
//! to be kept? ROUGE-L F1 without stemmer, prompts as in its code, without a chat template.

use std::path::Path;

use super::aggregate::{give, mean_of};
use super::questions::{digest, filled, first};
use super::requests::{Prompt, Requests, Seen};
use super::{Reading, Suite};
use crate::config::Muse;
use crate::data::{Row, rows};
use crate::eval::error::EvalError;
use crate::eval::record::{Better, Evaluation, Item};
use crate::eval::text::{RougeTokens, rouge_l};

const KIND: &str = "muse";
/// Tokens of a passage's continuation and of an answer.
const VERBATIM_TOKENS: usize = 128;
const ANSWER_TOKENS: usize = 32;
/// Where an answer ends.
const STOP: &[&str] = &["\n\n", "\nQuestion", "Question:"];

/// The sets that are given.
pub(super) struct MuseSuite {
    sets: Vec<Set>,
}

struct Set {
    name: &'static str,
    better: Better,
    entries: Vec<(Prompt, Item)>,
    digest: String,
}

impl MuseSuite {
    pub(super) fn read(config: &Muse, reading: Reading) -> Result<Self, EvalError> {
        let mut sets = Vec::new();
        if let Some(path) = &config.verbmem {
            let rows = read(path, config.limit)?;
            let entry = |(index, at): (usize, &Row)| {
                let (prompt, answer) = (at.text("prompt", KIND)?, at.text("gt", KIND)?);
                entry(at, index, &prompt, prompt.clone(), answer, (VERBATIM_TOKENS, &[]), reading)
            };
            sets.push(Set::new("muse_verbmem", Better::Lower, rows.iter().enumerate().map(entry))?);
        }
        for (name, better, questions, examples) in [
            ("muse_knowmem_forget", Better::Lower, &config.knowmem_forget, &config.knowmem_forget_icl),
            ("muse_knowmem_retain", Better::Higher, &config.knowmem_retain, &config.knowmem_retain_icl),
        ] {
            let Some(questions) = questions else { continue };
            let mut shots = String::new();
            for row in examples.as_deref().map_or_else(|| Ok(Vec::new()), |path| read(path, 0))? {
                let (question, answer) = (row.text("question", KIND)?, row.text("answer", KIND)?);
                shots += &format!("Question: {question}\nAnswer: {answer}\n\n");
            }
            let rows = read(questions, config.limit)?;
            let entry = |(index, at): (usize, &Row)| {
                let (question, answer) = (at.text("question", KIND)?, at.text("answer", KIND)?);
                let prompt = format!("{shots}Question: {question}\nAnswer:");
                entry(at, index, &prompt, question, answer, (ANSWER_TOKENS, STOP), reading)
            };
            sets.push(Set::new(name, better, rows.iter().enumerate().map(entry))?);
        }
        Ok(Self { sets })
    }
}

impl Set {
    fn new(
        name: &'static str,
        better: Better,
        entries: impl Iterator<Item = Result<(Prompt, Item), EvalError>>,
    ) -> Result<Self, EvalError> {
        let entries: Vec<(Prompt, Item)> = entries.collect::<Result<_, _>>()?;
        let digest = digest(entries.iter().flat_map(|(_, item)| [item.prompt.as_str(), item.answer.as_str()]));
        Ok(Self { name, better, entries, digest })
    }
}

fn read(path: &Path, limit: usize) -> Result<Vec<Row>, EvalError> {
    Ok(filled(first(rows(path, None)?, limit)?, path)?)
}

fn entry(
    row: &Row,
    index: usize,
    prompt: &str,
    shown: String,
    answer: String,
    (max_new_tokens, stop): (usize, &'static [&'static str]),
    reading: Reading,
) -> Result<(Prompt, Item), EvalError> {
    let tokens = reading.encoder.text(prompt).map_err(|error| error.in_sample(&row.path, row.number))?;
    let item = Item { index, prompt: shown, answer, ..Item::default() };
    Ok((Prompt { tokens, max_new_tokens, stop }, item))
}

impl Suite for MuseSuite {
    fn name(&self) -> &'static str {
        "muse"
    }

    fn sets(&self) -> Vec<(String, String)> {
        self.sets.iter().map(|set| (set.name.to_owned(), set.digest.clone())).collect()
    }

    fn ask<'a>(&'a self, requests: &mut Requests<'a>) {
        self.sets.iter().flat_map(|set| &set.entries).for_each(|(prompt, _)| requests.continue_greedily(prompt));
    }

    fn tell(&self, seen: &Seen, out: &mut Evaluation) {
        for set in &self.sets {
            let item = |(prompt, item): &(Prompt, Item)| {
                let (mut item, written) = (item.clone(), seen.continuation(prompt));
                let (target, words) = (RougeTokens::new(&item.answer, false), RougeTokens::new(written, false));
                if !target.is_empty() && !words.is_empty() {
                    give(&mut item, "rouge_l_f1", Some(rouge_l(&target, &words).f1));
                }
                item.generation = Some(written.to_owned());
                item
            };
            out.items.insert(set.name.to_owned(), set.entries.iter().map(item).collect());
            mean_of(out, set.name, "rouge_l_f1", "rouge_l_f1", set.better);
        }
    }
}
