//! MUSE (arXiv 2407.06460): does the model continue passages verbatim, does it still answer questions about them, and about what was
//! to be kept? ROUGE-L F1 without stemmer, prompts as in its code, without a chat template.

use std::path::{Path, PathBuf};

use super::aggregate::{give, mean_of};
use super::questions::{digest, filled, first};
use super::requests::{Prompt, Requests, Seen};
use super::{Reading, Suite};
use crate::config::{Kind, Muse, Source};
use crate::data::{Row, rows, splits};
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

/// A set of the published data: the key that names another file in its place, its folder, and its split by all the names that it had.
struct Part {
    key: &'static str,
    folder: &'static str,
    splits: &'static [&'static str],
}

const VERBMEM: Part = Part { key: "verbmem", folder: "verbmem", splits: &["forget"] };
/// Questions and the examples before them.
const KNOWMEM: [[Part; 2]; 2] = [
    [
        Part { key: "knowmem_forget", folder: "knowmem", splits: &["forget_qa"] },
        Part { key: "knowmem_forget_icl", folder: "knowmem", splits: &["forget_qa_icl"] },
    ],
    [
        Part { key: "knowmem_retain", folder: "knowmem", splits: &["retain_qa", "retain2_qa"] },
        Part { key: "knowmem_retain_icl", folder: "knowmem", splits: &["retain_qa_icl", "retain2_qa_icl"] },
    ],
];
const PRIVLEAK: [Part; 2] = [
    Part { key: "", folder: "privleak", splits: &["forget"] },
    Part { key: "", folder: "privleak", splits: &["holdout"] },
];

/// Where rows are read from.
type Place = (PathBuf, Option<String>);

impl Part {
    /// The file that is named, otherwise the part of the published folder where there is one.
    fn place(&self, named: Option<&PathBuf>, published: Option<&PathBuf>) -> Option<Place> {
        named.map(|file| (file.clone(), None)).or_else(|| self.within(published?))
    }

    fn within(&self, published: &Path) -> Option<Place> {
        let folder = published.join(self.folder);
        let there = splits(&folder);
        let split = self.splits.iter().find(|split| there.iter().any(|other| other == *split))?;
        Some((folder, Some((*split).to_owned())))
    }
}

/// Says all parts that a published folder lacks, and where they were looked for.
fn check(published: &Path, parts: &[&Part]) -> Result<(), EvalError> {
    let lacking: Vec<&&Part> = parts.iter().filter(|part| part.within(published).is_none()).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let name = |part: &&&Part| part.splits.iter().map(|split| format!("{}/{split}", part.folder)).collect::<Vec<_>>();
    let names: Vec<String> = lacking.iter().map(|part| name(part).join(" or ")).collect();
    let mut folders: Vec<String> = lacking.iter().map(|part| part.folder.to_owned()).collect();
    folders.dedup();
    let holds = folders.iter().map(|folder| match splits(&published.join(folder)) {
        there if there.is_empty() => format!("{folder} is not there or holds no data"),
        there => format!("{folder} holds {}", there.join(", ")),
    });
    let keys: Vec<String> =
        lacking.iter().filter(|part| !part.key.is_empty()).map(|part| format!("eval.muse.{}", part.key)).collect();
    let instead = if keys.is_empty() { "eval.mia.forget and eval.mia.holdout".to_owned() } else { keys.join(", ") };
    Err(EvalError::Refused(format!(
        "eval.muse.path: {} lacks {}; looked for NAME.jsonl, NAME.json, NAME.parquet and NAME-00000-of-00001.parquet: {}; \
         give a folder as muse-bench/MUSE-News publishes it, or name files with {instead}",
        published.display(),
        names.join(", "),
        holds.collect::<Vec<_>>().join(", ")
    )))
}

/// The texts of PrivLeak in a published folder, forget and holdout.
///
/// # Errors
/// They are not there.
pub(super) fn privleak(published: &Path) -> Result<[Source; 2], EvalError> {
    let [forget, holdout] = &PRIVLEAK;
    check(published, &[forget, holdout])?;
    Ok([forget, holdout].map(|part| {
        let (path, split) = part.within(published).expect("invariant: just checked");
        Source { path, split, kind: Kind::Text, fields: Default::default(), limit: None }
    }))
}

impl MuseSuite {
    pub(super) fn read(config: &Muse, reading: Reading) -> Result<Self, EvalError> {
        let named = [
            [&config.knowmem_forget, &config.knowmem_forget_icl],
            [&config.knowmem_retain, &config.knowmem_retain_icl],
        ];
        let published = config.path.as_ref();
        if let Some(published) = published {
            let all = KNOWMEM.iter().flatten().zip(named.iter().flatten());
            let all = std::iter::once((&VERBMEM, &config.verbmem)).chain(all.map(|(part, named)| (part, *named)));
            let wanted: Vec<&Part> = all.filter(|(_, named)| named.is_none()).map(|(part, _)| part).collect();
            check(published, &wanted)?;
        }
        let mut sets = Vec::new();
        if let Some(place) = VERBMEM.place(config.verbmem.as_ref(), published) {
            let rows = read(&place, config.limit)?;
            let entry = |(index, at): (usize, &Row)| {
                let (prompt, answer) = (at.text("prompt", KIND)?, at.text("gt", KIND)?);
                entry(at, index, &prompt, prompt.clone(), answer, (VERBATIM_TOKENS, &[]), reading)
            };
            sets.push(Set::new("muse_verbmem", Better::Lower, rows.iter().enumerate().map(entry))?);
        }
        let names = [("muse_knowmem_forget", Better::Lower), ("muse_knowmem_retain", Better::Higher)];
        for ((name, better), (parts, named)) in names.into_iter().zip(KNOWMEM.iter().zip(named)) {
            let place = |at: usize| parts[at].place(named[at].as_ref(), published);
            let Some(questions) = place(0) else { continue };
            let mut shots = String::new();
            for row in place(1).map_or_else(|| Ok(Vec::new()), |place| read(&place, 0))? {
                let (question, answer) = (row.text("question", KIND)?, row.text("answer", KIND)?);
                shots += &format!("Question: {question}\nAnswer: {answer}\n\n");
            }
            let rows = read(&questions, config.limit)?;
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

fn read((path, split): &Place, limit: usize) -> Result<Vec<Row>, EvalError> {
    Ok(filled(first(rows(path, split.as_deref())?, limit)?, path)?)
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
