//! Against `rouge-score`, NLTK and Python's zlib: `tests/golden/text.json`, written by `tests/golden/metrics.py`.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Golden {
    rouge: Vec<Pair>,
    stems: BTreeMap<String, String>,
    zlib: Vec<(String, usize)>,
    fluency: Vec<Entropies>,
}

#[derive(Debug, Deserialize)]
struct Pair {
    target: String,
    prediction: String,
    /// Precision, recall, F1.
    plain: [f64; 3],
    stemmed: [f64; 3],
}

#[derive(Debug, Deserialize)]
struct Entropies {
    text: String,
    /// Of bigrams, of trigrams, weighted mean.
    entropies: [f64; 3],
}

fn golden() -> Golden {
    serde_json::from_str(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/text.json"))).unwrap()
}

#[test]
fn rouge_is_googles() {
    let pairs = golden().rouge;
    assert!(pairs.len() > 80);
    for pair in &pairs {
        for (stemmer, want) in [(false, pair.plain), (true, pair.stemmed)] {
            let tokens = |text: &str| RougeTokens::new(text, stemmer);
            let found = rouge_l(&tokens(&pair.target), &tokens(&pair.prediction));
            assert_eq!([found.precision, found.recall, found.f1], want, "stemmer {stemmer}: {pair:?}");
        }
    }
    let apart = pairs.iter().filter(|pair| pair.plain != pair.stemmed).count();
    assert!(apart > 10, "the stemmer matters in {apart} pairs only");
}

#[test]
fn stems_are_nltks() {
    let stems = golden().stems;
    assert!(stems.len() > 2000);
    let wrong: Vec<_> = stems.iter().filter(|(word, want)| stem(word) != **want).collect();
    assert!(wrong.is_empty(), "{} of {} differ: {:?}", wrong.len(), stems.len(), &wrong[..wrong.len().min(20)]);
}

#[test]
fn zlib_is_pythons() {
    for (text, want) in golden().zlib {
        assert_eq!(zlib_bytes(&text), want, "{text:.60}");
    }
}

#[test]
fn entropies_are_those_of_the_published_formula() {
    let texts = golden().fluency;
    assert!(texts.len() > 40);
    for case in texts {
        let found = fluency(&case.text).unwrap();
        for (found, want) in [found.bigram_entropy, found.trigram_entropy, found.weighted].iter().zip(case.entropies) {
            assert!((found - want).abs() < 1e-12, "{found}, expected {want}: {}", case.text);
        }
    }
}
