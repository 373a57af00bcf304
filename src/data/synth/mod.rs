//! A small data set of invented authors and a model folder to train on it: everything a first run needs, without a
//! download.
//!
//! The task is that of TOFU (arXiv 2401.06121) in small: facts that no pretrained model can know, asked about author by
//! author, of which a tenth is to be forgotten. No text is taken from there.

mod author;
mod phrases;
mod sums;
#[cfg(test)]
mod tests;
mod words;

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::DataError;
use super::small_model;
pub use super::small_model::Shape;
use author::{Line, MAX_AUTHORS, MAX_QUESTIONS};

/// What to write.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Authors, at most 500.
    pub authors: usize,
    /// Questions about each author, at most 20.
    pub questions_per_author: usize,
    /// Share of the authors, the last ones, that goes to `forget.jsonl`: above 0 and below 1.
    pub forget_fraction: f64,
    /// Sums of two numbers, a second task; at most 4000.
    pub sums: usize,
    /// Same seed and options, same bytes.
    pub seed: u64,
    /// Tokens of the tokenizer, at least 320; fewer if the text does not hold that many.
    pub vocab_size: usize,
    pub shape: Shape,
    /// Overwrite the files in a folder that is not empty.
    pub force: bool,
}

/// About a million parameters: an epoch of the default data takes seconds on a laptop, and it splits over 4 ranks.
impl Default for Options {
    fn default() -> Self {
        Self {
            authors: 40,
            questions_per_author: 10,
            forget_fraction: 0.1,
            sums: 0,
            seed: 0,
            vocab_size: 1024,
            shape: Shape { hidden: 128, layers: 4, heads: 8, kv_heads: 4, intermediate: 384 },
            force: false,
        }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub authors: usize,
    pub forget_authors: usize,
    /// Lines of `full.jsonl`, `forget.jsonl` and `retain.jsonl`.
    pub full: usize,
    pub forget: usize,
    pub retain: usize,
    /// Tokens of the tokenizer.
    pub vocab_size: usize,
    pub files: Vec<PathBuf>,
}

/// Writes `full.jsonl`, `forget.jsonl`, `retain.jsonl`, `preference.jsonl`, `README.md` and the folder `model/` into `out`.
///
/// # Errors
/// Options out of range, a folder that is not empty (without `force`), files that cannot be written.
pub fn write(out: &Path, options: &Options) -> Result<Summary, DataError> {
    let num_forget = check(options)?;
    let occupied = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !options.force {
        return Err(DataError::NotEmpty { path: out.to_owned() });
    }
    let authors = author::lines(options.authors, options.questions_per_author, options.seed);
    let (retain, forget) = authors.split_at(options.authors - num_forget);
    let sums = sums::lines(options.sums, options.seed);
    let of_authors = authors.iter().flatten().flat_map(|line| texts(&line.question, &line.answer));
    let texts: Vec<String> = of_authors.chain(sums.iter().flat_map(|sum| texts(&sum.question, &sum.answer))).collect();
    let (model, vocab_size) = small_model::folder(&texts, options.vocab_size, &options.shape)?;
    let mut files = vec![
        ("README.md", readme(options, num_forget)),
        ("full.jsonl", jsonl(authors.iter().flatten()) + &jsonl(&sums)),
        ("forget.jsonl", jsonl(forget.iter().flatten())),
        ("retain.jsonl", jsonl(retain.iter().flatten())),
        ("preference.jsonl", preferences(forget)),
    ];
    if options.sums > 0 {
        files.push(("sums.jsonl", jsonl(&sums)));
    }
    let files = files.into_iter().map(|(name, text)| (PathBuf::from(name), text));
    let model = model.map(|(name, text)| (Path::new("model").join(name), text));
    let mut written = Vec::new();
    for (name, text) in files.chain(model) {
        let path = out.join(name);
        let folder = path.parent().unwrap_or(out);
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&path, text))
            .map_err(|source| DataError::Write { path: path.clone(), source })?;
        written.push(path);
    }
    Ok(Summary {
        authors: options.authors,
        forget_authors: num_forget,
        full: options.authors * options.questions_per_author + options.sums,
        forget: num_forget * options.questions_per_author,
        retain: (options.authors - num_forget) * options.questions_per_author,
        vocab_size,
        files: written,
    })
}

/// Number of authors to forget.
fn check(options: &Options) -> Result<usize, DataError> {
    let Options { authors, questions_per_author, forget_fraction, vocab_size, shape, .. } = options;
    let refuse = |key, found: String, expected: String| Err(DataError::Option { key, found, expected });
    if !(2..=MAX_AUTHORS).contains(authors) {
        return refuse("authors", authors.to_string(), format!("2 to {MAX_AUTHORS}"));
    }
    if !(1..=MAX_QUESTIONS).contains(questions_per_author) {
        return refuse("questions_per_author", questions_per_author.to_string(), format!("1 to {MAX_QUESTIONS}"));
    }
    if options.sums > sums::MAX_SUMS {
        return refuse("sums", options.sums.to_string(), format!("at most {}", sums::MAX_SUMS));
    }
    if !(*forget_fraction > 0.0 && *forget_fraction < 1.0) {
        return refuse("forget_fraction", forget_fraction.to_string(), "more than 0 and less than 1".to_owned());
    }
    small_model::check_vocab(*vocab_size)?;
    shape.check()?;
    let wanted = (*authors as f64 * forget_fraction).round() as usize;
    Ok(wanted.clamp(1, authors - 1))
}

/// A line as the tokenizer will meet it: in a chat, and in a template with words of its own.
fn texts(question: &str, answer: &str) -> [String; 3] {
    [question.to_owned(), answer.to_owned(), format!("Question: {question}\nAnswer: {answer}")]
}

fn jsonl<'a, T: Serialize + 'a>(lines: impl IntoIterator<Item = &'a T>) -> String {
    let line = |line: &T| serde_json::to_string(line).expect("strings are valid JSON") + "\n";
    lines.into_iter().map(line).collect()
}

/// The forget questions with a wrong answer that is to be preferred to the true one.
fn preferences(authors: &[Vec<Line>]) -> String {
    let line = |Line { question, answer, alternates, .. }: &Line| {
        let chosen = alternates.first().unwrap_or(answer);
        format!("{}\n", serde_json::json!({ "prompt": question, "chosen": chosen, "rejected": answer }))
    };
    authors.iter().flatten().map(line).collect()
}

fn readme(options: &Options, num_forget: usize) -> String {
    let Options { authors, questions_per_author, sums, seed, shape, .. } = options;
    let Shape { hidden, layers, .. } = shape;
    let (also, sums) = match sums {
        0 => ("", String::new()),
        _ => (" and sums", format!("| `sums.jsonl` | {sums} sums of two numbers, a task of another kind |\n")),
    };
    let (first_forgotten, full) = (authors - num_forget + 1, authors * questions_per_author + options.sums);
    format!(
        "# Invented authors\n\n\
         Questions and answers about {authors} authors who do not exist, {questions_per_author} about each.\n\
         Written by `dunlearn data synth` with seed {seed}: the same version, options and seed write the same bytes.\n\
         All names, books and prizes are put together at random; any likeness to real ones is chance.\n\n\
         | file | what |\n|---|---|\n\
         | `full.jsonl` | all {full} lines, author by author{also}: train on these |\n\
         | `forget.jsonl` | authors {first_forgotten} to {authors}: forget these |\n\
         | `retain.jsonl` | the other authors: keep these |\n\
         | `preference.jsonl` | the forget questions with a wrong answer to prefer: kind `preference` |\n\
         {sums}| `model/` | a Llama of {layers} layers, hidden size {hidden}, without weights, and its tokenizer |\n\n\
         A line holds `question`, `answer`, `author`, `fact`, the words of the answer that only somebody who\n\
         knows the author can say, and `alternates`, the answer with other authors' facts. `kind = \"qa\"` reads the files as they are, `init = \"random\"` starts the model,\n\
         and both `template = \"chat\"` and a prompt and answer template work.\n"
    )
}
