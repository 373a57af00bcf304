//! Fluency without a downloaded classifier: a model that has collapsed repeats itself, and its n-grams have little entropy.

use std::collections::HashMap;
use std::hash::Hash;

/// How varied a text's words are. A property of the text alone: nonsense of many different words scores high too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fluency {
    /// Entropy of the text's bigrams. Unit: bits; at most log2 of their number.
    pub bigram_entropy: f64,
    /// Of its trigrams.
    pub trigram_entropy: f64,
    /// Mean of 2/3 of the former and 4/3 of the latter: the "fluency" of RWKU (arXiv 2406.10890) and of the ROME line of work, which
    /// print it times 100 for 100 new tokens. Grows with the length of the text: compare equal lengths only.
    pub weighted: f64,
    /// `weighted` over what it would be if no n-gram came twice: between 0 and 1, whatever the length. 0 for a text of one word over and over.
    pub variety: f64,
    /// Share of the bigrams that occurred before in the text, `1 - distinct-2`.
    pub repetition: f64,
}

/// Of texts of at least three tokens; None for shorter ones, of which nothing can be said.
///
/// A token is a run of letters and digits (with apostrophes and hyphens inside), or one other character that is no white space. The published numbers
/// split words with NLTK, which differs in contractions and abbreviations.
pub fn fluency(text: &str) -> Option<Fluency> {
    let tokens = tokens(text);
    if tokens.len() < 3 {
        return None;
    }
    let (bigrams, trigrams) = (counts(tokens.windows(2)), counts(tokens.windows(3)));
    let weighted = |bigram: f64, trigram: f64| (2.0 / 3.0 * bigram + 4.0 / 3.0 * trigram) / 2.0;
    let (bigram_entropy, trigram_entropy) = (entropy(&bigrams), entropy(&trigrams));
    let most = weighted(((tokens.len() - 1) as f64).log2(), ((tokens.len() - 2) as f64).log2());
    let value = weighted(bigram_entropy, trigram_entropy);
    Some(Fluency {
        bigram_entropy,
        trigram_entropy,
        weighted: value,
        variety: (value / most).min(1.0),
        repetition: 1.0 - bigrams.len() as f64 / (tokens.len() - 1) as f64,
    })
}

fn tokens(text: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let inside = |c: char| c.is_alphanumeric() || c == '\'' || c == '’' || c == '-';
        let len = if first.is_alphanumeric() {
            let run = rest.find(|c| !inside(c)).unwrap_or(rest.len());
            rest[..run].trim_end_matches(|c: char| !c.is_alphanumeric()).len()
        } else {
            first.len_utf8()
        };
        if !first.is_whitespace() {
            tokens.push(&rest[..len]);
        }
        rest = &rest[len..];
    }
    tokens
}

/// How often each comes, in the order of first occurrence: a hash map's order must not reach a sum.
fn counts<T: Eq + Hash>(all: impl Iterator<Item = T>) -> Vec<usize> {
    let mut places = HashMap::new();
    let mut counts = Vec::new();
    for one in all {
        let next = counts.len();
        let place = *places.entry(one).or_insert(next);
        if place == next {
            counts.push(0);
        }
        counts[place] += 1;
    }
    counts
}

/// Unit: bits.
fn entropy(counts: &[usize]) -> f64 {
    let total = counts.iter().sum::<usize>() as f64;
    counts.iter().map(|&count| count as f64 / total).map(|p| -p * p.log2()).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_words_have_the_entropy_of_their_number() {
        let found = fluency("one two three four five six").unwrap();
        assert!((found.bigram_entropy - 5f64.log2()).abs() < 1e-12);
        assert!((found.trigram_entropy - 2.0).abs() < 1e-12);
        assert!((found.weighted - (5f64.log2() + 4.0) / 3.0).abs() < 1e-12);
        assert_eq!((found.variety, found.repetition), (1.0, 0.0));
    }

    #[test]
    fn a_collapsed_text_has_none() {
        let found = fluency(&"the ".repeat(50)).unwrap();
        assert_eq!((found.weighted, found.variety), (0.0, 0.0));
        assert!((found.repetition - 48.0 / 49.0).abs() < 1e-12);
        assert!(fluency(&"!".repeat(50)).unwrap().variety == 0.0);
    }

    #[test]
    fn of_short_texts_nothing_is_said() {
        assert_eq!(fluency(""), None);
        assert_eq!(fluency(" two words "), None);
    }

    #[test]
    fn words_and_signs_are_tokens() {
        assert_eq!(
            tokens("She didn't re-read \"it\"—no."),
            ["She", "didn't", "re-read", "\"", "it", "\"", "—", "no", "."]
        );
        assert_eq!(tokens("rock'  - a-"), ["rock", "'", "-", "a", "-"]);
    }
}
