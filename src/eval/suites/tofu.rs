//! TOFU (arXiv 2401.06121), with the arithmetic of its code: probability, ROUGE-L and truth ratio on four sets, forget quality
//! against a retrained model, model utility.
//!
//! Every answer is scored as the mean log-probability of its tokens, the end-of-text token included.

use super::aggregate::{aggregate, give, mean_of, numbers, put};
use super::questions::{digest, filled, first};
use super::requests::{Prompt, Requests, Seen};
use super::samples::basics;
use super::{Others, Reading, Suite};
use crate::config::Tofu;
use crate::data::{Row, find, rows};
use crate::eval::error::EvalError;
use crate::eval::record::{Better, Evaluation, Item};
use crate::eval::scores::{Floor, Text, TextScore};
use crate::eval::statistics::{self, ModelUtility, SetUtility};
use crate::eval::text::{RougeTokens, fluency, rouge_l};

const KIND: &str = "tofu";
const FORGET: &str = "tofu_forget";
const RETAIN: &str = "tofu_retain";

/// The four sets.
pub(super) struct TofuSuite {
    sets: Vec<Set>,
}

/// One set.
struct Set {
    name: &'static str,
    questions: Vec<Question>,
    digest: String,
    floor: Floor,
}

/// One question.
struct Question {
    question: String,
    answer: String,
    text: Text,
    /// The true answer in other words, where the set has one.
    paraphrase: Option<Text>,
    wrong: Vec<Text>,
    prompt: Option<Prompt>,
}

impl TofuSuite {
    pub(super) fn read(config: &Tofu, reading: Reading) -> Result<Self, EvalError> {
        let forget = format!("{}_perturbed", config.forget);
        let files = [
            (FORGET, forget.as_str(), true),
            (RETAIN, "retain_perturbed", true),
            ("tofu_real_authors", "real_authors_perturbed", false),
            ("tofu_world_facts", "world_facts_perturbed", false),
        ];
        let read = |(name, file, paraphrased)| Set::read(name, file, paraphrased, config, reading);
        Ok(Self { sets: files.into_iter().map(read).collect::<Result<_, _>>()? })
    }
}

impl Set {
    fn read(
        name: &'static str,
        file: &str,
        paraphrased: bool,
        config: &Tofu,
        reading: Reading,
    ) -> Result<Self, EvalError> {
        let path = find(&config.path, file)?;
        let rows = filled(first(rows(&path, None)?, config.limit)?, &path)?;
        let mut questions = Vec::with_capacity(rows.len());
        let mut hashed = Vec::new();
        let mut wrong_of_first = None;
        for row in &rows {
            let question = row.text("question", KIND)?;
            let answer = row.text("answer", KIND)?;
            let paraphrase = paraphrased.then(|| row.text("paraphrased_answer", KIND)).transpose()?;
            let wrong = row.texts("perturbed_answer", KIND)?;
            let expected = *wrong_of_first.get_or_insert(wrong.len());
            if wrong.len() != expected {
                let expected = format!("{expected}, as in the first row: lists of unequal length cannot be compared");
                return Err(row
                    .wrong("\"perturbed_answer\"".into(), format!("a list of {}", wrong.len()), &expected)
                    .into());
            }
            let encode = |answer: &str| reading.answer(row, &question, answer);
            questions.push(Question {
                text: encode(&answer)?,
                paraphrase: paraphrase.as_deref().map(encode).transpose()?,
                wrong: wrong.iter().map(|answer| encode(answer)).collect::<Result<_, _>>()?,
                prompt: config.rouge.then(|| prompt(row, &question, config, reading)).transpose()?,
                question: question.clone(),
                answer: answer.clone(),
            });
            hashed.extend([question, answer]);
            hashed.extend(paraphrase.into_iter().chain(wrong));
        }
        Ok(Self { name, questions, digest: digest(hashed.iter().map(String::as_str)), floor: reading.floor })
    }

    fn item(&self, index: usize, question: &Question, seen: &Seen) -> Item {
        let Question { question: prompt, answer, text, paraphrase, wrong, .. } = question;
        let mut item = Item { index, prompt: prompt.clone(), answer: answer.clone(), ..Item::default() };
        let score = seen.score(text);
        basics(&mut item, score, self.floor);
        let logp = |score: &TextScore| score.nll().map(|nll| -nll);
        let right = paraphrase.as_ref().map_or(score, |text| seen.score(text));
        let wrong: Option<Vec<f64>> = wrong.iter().map(|text| logp(seen.score(text))).collect();
        if let (Some(own), Some(right), Some(wrong)) = (logp(score), logp(right), wrong) {
            for (i, wrong) in wrong.iter().enumerate() {
                give(&mut item, &format!("wrong_{i}_loss"), Some(-wrong));
            }
            if paraphrase.is_some() {
                give(&mut item, "paraphrase_loss", Some(-right));
                give(&mut item, "paraphrase_probability", Some(right.exp()));
            }
            give(&mut item, "choice_probability", statistics::choice_probability(own, &wrong).ok());
            give(&mut item, "truth_ratio", statistics::truth_ratio(right, &wrong).ok());
            // the test looks at the order alone, and a logarithm does not overflow
            let log_ratio = wrong.iter().sum::<f64>() / wrong.len() as f64 - right;
            give(&mut item, "log_truth_ratio", Some(log_ratio).filter(|x| x.is_finite()));
            give(&mut item, "knowledge_extent", statistics::knowledge_extent(right, &wrong).ok());
        }
        if let Some(prompt) = &question.prompt {
            let written = seen.continuation(prompt);
            let (target, written_words) = (RougeTokens::new(answer, true), RougeTokens::new(written, true));
            // a model without log-probabilities writes the first token of its vocabulary over and over
            let answers = score.nll().is_some_and(|nll| !nll.is_nan());
            if answers && !written_words.is_empty() && !target.is_empty() {
                let rouge = rouge_l(&target, &written_words);
                give(&mut item, "rouge_l_recall", Some(rouge.recall));
                give(&mut item, "rouge_l_f1", Some(rouge.f1));
            }
            if let Some(fluency) = fluency(written) {
                give(&mut item, "variety", Some(fluency.variety));
                give(&mut item, "repetition", Some(fluency.repetition));
            }
            item.generation = Some(written.to_owned());
        }
        item
    }
}

impl Suite for TofuSuite {
    fn name(&self) -> &'static str {
        "tofu"
    }

    fn sets(&self) -> Vec<(String, String)> {
        self.sets.iter().map(|set| (set.name.to_owned(), set.digest.clone())).collect()
    }

    fn ask<'a>(&'a self, requests: &mut Requests<'a>) {
        for question in self.sets.iter().flat_map(|set| &set.questions) {
            let texts = std::iter::once(&question.text).chain(&question.paraphrase).chain(&question.wrong);
            texts.for_each(|text| requests.score(text, false));
            question.prompt.iter().for_each(|prompt| requests.continue_greedily(prompt));
        }
    }

    fn tell(&self, seen: &Seen, out: &mut Evaluation) {
        for set in &self.sets {
            let items = set.questions.iter().enumerate().map(|(i, question)| set.item(i, question, seen)).collect();
            out.items.insert(set.name.to_owned(), items);
            let forget = set.name == FORGET;
            let better = if forget { Better::Lower } else { Better::Higher };
            let is_choice = set.questions.iter().all(|question| question.paraphrase.is_none());
            let number = if is_choice { "choice_probability" } else { "probability" };
            mean_of(out, set.name, "probability", number, better);
            if forget {
                aggregate(
                    out,
                    set.name,
                    "truth_ratio",
                    "truth_ratio",
                    Better::Retrained,
                    statistics::forget_truth_ratio,
                );
                for name in ["extraction_strength", "exact_memorisation", "paraphrase_probability", "knowledge_extent"]
                {
                    mean_of(out, set.name, name, name, Better::Lower);
                }
            } else {
                aggregate(out, set.name, "truth_ratio", "truth_ratio", Better::Higher, statistics::utility_truth_ratio);
            }
            if set.name == RETAIN {
                mean_of(out, set.name, "extraction_strength", "extraction_strength", Better::Higher);
            }
            if set.questions.iter().any(|question| question.prompt.is_some()) {
                mean_of(out, set.name, "rouge_l_recall", "rouge_l_recall", better);
                if forget {
                    mean_of(out, set.name, "variety", "variety", Better::Higher);
                }
            }
        }
        utility(out);
    }

    fn compare(&self, others: &Others, out: &mut Evaluation) {
        let Some(retrained) = &others.retrained else {
            out.warn(
                "tofu.forget_quality was not computed: it needs eval.retrained, a model that never saw the forget data"
                    .into(),
            );
            return;
        };
        let ratios = |evaluation: &Evaluation| {
            evaluation.items.get(FORGET).map_or_else(Vec::new, |items| numbers(items, "log_truth_ratio"))
        };
        let (own, theirs) = (ratios(out), ratios(retrained));
        if own.len() != theirs.len() {
            out.warn(format!(
                "tofu.forget_quality compares {} items with {} of the retrained model; it depends strongly on their number",
                own.len(),
                theirs.len()
            ));
        }
        let test = statistics::kolmogorov_smirnov(&own, &theirs);
        let part = |value: fn(&statistics::KolmogorovSmirnov) -> f64| test.as_ref().map(value).map_err(Clone::clone);
        put(out, "tofu.forget_quality", Some(FORGET), part(|test| test.p_value), own.len(), Better::Higher);
        put(out, "tofu.log10_forget_quality", Some(FORGET), part(|test| test.log10_p), own.len(), Better::Higher);
        put(out, "tofu.ks_statistic", Some(FORGET), part(|test| test.statistic), own.len(), Better::Lower);
    }
}

/// The harmonic mean of the nine parts, where all are there.
fn utility(out: &mut Evaluation) {
    let part = |set: &str, metric: &str| {
        let name = format!("{set}.{metric}");
        out.value(&name).ok_or(name)
    };
    let set = |name: &str| {
        Ok::<_, String>(SetUtility {
            probability: part(name, "probability")?,
            rouge: part(name, "rouge_l_recall")?,
            truth_ratio: part(name, "truth_ratio")?,
        })
    };
    let parts = || {
        let (retain, real_authors, world_facts) = (set(RETAIN)?, set("tofu_real_authors")?, set("tofu_world_facts")?);
        Ok::<_, String>(ModelUtility { retain, real_authors, world_facts })
    };
    match parts() {
        Ok(parts) => put(out, "tofu.model_utility", None, parts.value(), 9, Better::Higher),
        Err(missing) => out.warn(format!("tofu.model_utility was not computed: {missing} is missing")),
    }
}

fn prompt(row: &Row, question: &str, config: &Tofu, reading: Reading) -> Result<Prompt, EvalError> {
    let tokens = reading.encoder.question(question).map_err(|error| error.in_sample(&row.path, row.number))?;
    Ok(Prompt { tokens, max_new_tokens: config.max_new_tokens, stop: &[] })
}
