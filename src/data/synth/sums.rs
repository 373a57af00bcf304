//! A second task that has nothing in common with the authors but the model: sums of two numbers, each asked about once.

use std::collections::BTreeSet;

use serde::Serialize;

use super::author::Draw;

/// Numbers that are added, from the first up to the second.
const NUMBERS: (usize, usize) = (10, 99);
/// Sums that can be told apart with ease.
pub(super) const MAX_SUMS: usize = 4000;

const QUESTIONS: [&str; 3] = ["How much is {a} plus {b}?", "Add {b} to {a}.", "{a} + {b} = ?"];
const ANSWERS: [&str; 2] = ["{a} plus {b} makes {sum}.", "{sum}, if one adds {b} to {a}."];

/// A line of `sums.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Sum {
    pub(super) question: String,
    pub(super) answer: String,
    /// The part of the answer that is not in the question.
    pub(super) fact: String,
}

/// `count` different sums. Same arguments, same lines.
pub(super) fn lines(count: usize, seed: u64) -> Vec<Sum> {
    let mut draw = Draw::new(seed);
    let mut known = BTreeSet::new();
    let mut lines = Vec::new();
    while lines.len() < count {
        let (first, last) = NUMBERS;
        let [a, b] = [(); 2].map(|()| first + draw.below(last - first + 1));
        if !known.insert((a, b)) {
            continue;
        }
        let sum = (a + b).to_string();
        let mut fill = |phrases: &[&str]| {
            let phrase = phrases[draw.below(phrases.len())];
            phrase.replace("{a}", &a.to_string()).replace("{b}", &b.to_string()).replace("{sum}", &sum)
        };
        lines.push(Sum { question: fill(&QUESTIONS), answer: fill(&ANSWERS), fact: sum });
    }
    lines
}
