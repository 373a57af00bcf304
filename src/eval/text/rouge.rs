//! ROUGE-L as Google's `rouge-score` computes it, which TOFU (with stemmer) and MUSE (without) use.

use super::porter::stem;

/// Overlap of a prediction with a target, by their longest common subsequence of words.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rouge {
    /// Share of the target's words.
    pub recall: f64,
    /// Share of the prediction's words.
    pub precision: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
}

/// A text as words, for texts that are compared more than once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RougeTokens(Vec<String>);

impl RougeTokens {
    /// Runs of ASCII letters and digits of the lower-cased text; with `stemmer`, words of more than three letters are stemmed.
    pub fn new(text: &str, stemmer: bool) -> Self {
        let text = text.to_lowercase();
        let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
        Self(words.map(|word| if stemmer && word.len() > 3 { stem(word) } else { word.to_owned() }).collect())
    }

    /// Whether there is no word to compare: every score is then 0, and says nothing about the model.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// All three are 0 where either text has no word, as in `rouge-score`; [`RougeTokens::is_empty`] tells that case apart.
pub fn rouge_l(target: &RougeTokens, prediction: &RougeTokens) -> Rouge {
    let (RougeTokens(target), RougeTokens(prediction)) = (target, prediction);
    if target.is_empty() || prediction.is_empty() {
        return Rouge::default();
    }
    let common = longest_common_subsequence(target, prediction) as f64;
    let (recall, precision) = (common / target.len() as f64, common / prediction.len() as f64);
    let f1 = if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 };
    Rouge { recall, precision, f1 }
}

/// Its length, by the usual table, of which one row is kept.
fn longest_common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut above_left = 0;
        for (j, other) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other { above_left + 1 } else { above.max(row[j]) };
            above_left = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(target: &str, prediction: &str) -> Rouge {
        rouge_l(&RougeTokens::new(target, false), &RougeTokens::new(prediction, false))
    }

    #[test]
    fn words_in_order_count() {
        let found = score("the cat sat on the mat", "on the mat the cat sat, the end");
        assert_eq!((found.recall, found.precision), (4.0 / 6.0, 4.0 / 8.0));
        assert!((found.f1 - 4.0 / 7.0).abs() < 1e-15);
    }

    #[test]
    fn a_text_without_words_is_told_apart() {
        assert!(RougeTokens::new("…?! 你好", true).is_empty());
        assert_eq!(score("a", ""), Rouge::default());
        assert_eq!(score("a b", "c d"), Rouge::default());
    }
}
