//! Questions and answers as a suite reads them: rows of a file, encoded with the run's template.

use super::Reading;
use crate::data::{Content, DataError, Record, Row, Rows, Sample};
use crate::eval::error::EvalError;
use crate::eval::scores::Text;

impl Reading<'_> {
    /// A question with one of its answers.
    pub(super) fn answer(&self, row: &Row, question: &str, answer: &str) -> Result<Text, EvalError> {
        let content = Content::Qa { question: question.to_owned(), answer: answer.to_owned() };
        let encoded = self.encoder.encode(&Record::plain(row.number, content), self.max_length);
        let encoded = encoded.map_err(|error| error.in_sample(&row.path, row.number))?;
        let sample = encoded.samples.first().filter(|_| encoded.lost == 0).ok_or_else(|| {
            let (found, at) = (encoded.len, row.path.display());
            EvalError::Refused(format!(
                "{at}:{}: question and answer have {found} tokens, data.max_length is {}: a cut answer would be another item; \
                 set data.max_length to at least {found}",
                row.number, self.max_length
            ))
        })?;
        Ok(self.text(sample))
    }

    /// `prompt` as it stands and a text behind it.
    pub(super) fn continuation(&self, row: &Row, prompt: &str, text: &str) -> Result<Sample, EvalError> {
        let sample = self.encoder.continuation(prompt, text);
        Ok(sample.map_err(|error| error.in_sample(&row.path, row.number))?)
    }

    fn text(&self, sample: &Sample) -> Text {
        Text::of(sample, sample.tokens.last().is_some_and(|&token| self.encoder.is_special(token)))
    }
}

/// Reads rows; `limit` 0 means all, otherwise so many spread evenly over the file.
pub(super) fn spread(rows: Rows, limit: usize) -> Result<Vec<Row>, DataError> {
    let rows: Vec<Row> = rows.collect::<Result<_, _>>()?;
    if limit == 0 || limit >= rows.len() {
        return Ok(rows);
    }
    let count = rows.len();
    let chosen: Vec<usize> = (0..limit).map(|i| i * count / limit).collect();
    Ok(rows
        .into_iter()
        .enumerate()
        .filter(|(index, _)| chosen.binary_search(index).is_ok())
        .map(|(_, row)| row)
        .collect())
}

/// The first `limit` rows; 0 means all.
pub(super) fn first(rows: Rows, limit: usize) -> Result<Vec<Row>, DataError> {
    rows.take(if limit == 0 { usize::MAX } else { limit }).collect()
}

/// Digest of raw texts: the same items under every tokenizer and template have the same.
pub(super) fn digest<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Refuses a set without rows.
pub(super) fn filled(rows: Vec<Row>, path: &std::path::Path) -> Result<Vec<Row>, DataError> {
    if rows.is_empty() {
        return Err(DataError::NoSample { path: path.to_owned(), reason: "it has no rows".to_owned() });
    }
    Ok(rows)
}
