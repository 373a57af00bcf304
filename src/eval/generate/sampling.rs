//! Choosing a token from logits. Draws are a function of (seed, prompt, position), so that every layout makes the same ones.

use crate::abi::parallel;
use crate::model::init::Stream;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Sampling {
    /// The likeliest.
    #[default]
    Greedy,
    /// Drawn from `softmax(logits / temperature)` of those that are left by `top_k`, then by `top_p` (arXiv 1904.09751), as in
    /// transformers.
    Random {
        /// Above 0.
        temperature: f64,
        /// The k likeliest are left, and those equal to the k-th; 0: all.
        top_k: usize,
        /// The likeliest that together have at least this probability are left; 1: all.
        top_p: f64,
        seed: u64,
    },
}

impl Sampling {
    pub fn is_greedy(&self) -> bool {
        *self == Self::Greedy
    }

    /// One token for each row of `logits: [rows, vocabulary]`; `places`: prompt and position of each row.
    pub(super) fn choose(&self, logits: &[f32], places: &[(usize, usize)]) -> Vec<i32> {
        let width = logits.len() / places.len().max(1);
        let mut chosen = vec![0; places.len()];
        parallel::for_chunks(&mut chosen, 1, 1, |row, out| {
            let (prompt, position) = places[row];
            out[0] = self.choose_one(&logits[row * width..][..width], prompt, position);
        });
        chosen
    }

    fn choose_one(&self, logits: &[f32], prompt: usize, position: usize) -> i32 {
        let Self::Random { temperature, top_k, top_p, seed } = *self else { return first_maximum(logits) };
        let mut left = left(logits, temperature, top_k, top_p);
        // in the order of ids: two tokens whose probabilities differ by a rounding do not change places
        left.sort_unstable_by_key(|(token, _)| *token);
        let total: f64 = left.iter().map(|(_, weight)| weight).sum();
        let mut rest = uniform(seed, prompt, position) * total;
        for &(token, weight) in &left {
            rest -= weight;
            if rest < 0.0 {
                return token as i32;
            }
        }
        // a draw next to 1 may outlast the sum by a rounding
        left.last().map_or(0, |(token, _)| *token as i32)
    }
}

/// In [0, 1).
fn uniform(seed: u64, prompt: usize, position: usize) -> f64 {
    let bits = Stream::new(seed, &format!("prompt {prompt}")).bits(position as u64);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

fn first_maximum(logits: &[f32]) -> i32 {
    let best = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
    (0..logits.len()).fold(0, best) as i32
}

/// Tokens that may be drawn, each with a weight proportional to its probability.
fn left(logits: &[f32], temperature: f64, top_k: usize, top_p: f64) -> Vec<(usize, f64)> {
    let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |token: usize| (f64::from(logits[token] - maximum) / temperature).exp();
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    // likeliest first, the first of equals before the others
    let order = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if top_k > 0 && top_k < tokens.len() {
        let (_, &mut last, _) = tokens.select_nth_unstable_by(top_k - 1, order);
        tokens.retain(|&token| logits[token] >= logits[last]);
    }
    if top_p >= 1.0 {
        tokens.sort_unstable();
        return tokens.into_iter().map(|token| (token, weight(token))).collect();
    }
    let total: f64 = tokens.iter().map(|&token| weight(token)).sum();
    // more and more of the likeliest are sorted, until they have the probability
    let mut sorted = 0;
    let mut kept = Vec::new();
    let mut sum = 0.0;
    while sorted < tokens.len() {
        let more = (2 * sorted).max(64).min(tokens.len());
        if more < tokens.len() {
            tokens[sorted..].select_nth_unstable_by(more - sorted - 1, order);
        }
        tokens[sorted..more].sort_unstable_by(order);
        for &token in &tokens[sorted..more] {
            kept.push((token, weight(token)));
            sum += weight(token);
            if sum >= top_p * total {
                return kept;
            }
        }
        sorted = more;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(logits: &[f32], temperature: f64, top_k: usize, top_p: f64) -> Vec<usize> {
        left(logits, temperature, top_k, top_p).into_iter().map(|(token, _)| token).collect()
    }

    /// Probabilities 0.1, 0.4, 0.2, 0.3 at temperature 1.
    fn four() -> Vec<f32> {
        [0.1f32, 0.4, 0.2, 0.3].map(f32::ln).to_vec()
    }

    #[test]
    fn what_may_be_drawn() {
        assert_eq!(tokens(&four(), 1.0, 0, 1.0), [0, 1, 2, 3]);
        assert_eq!(tokens(&four(), 1.0, 2, 1.0), [1, 3]);
        assert_eq!(tokens(&four(), 1.0, 0, 0.65), [1, 3]);
        assert_eq!(tokens(&four(), 1.0, 0, 0.71), [1, 3, 2]);
        assert_eq!(tokens(&four(), 1.0, 0, 0.01), [1], "at least one is left");
        // top_p counts within what top_k has left: 0.4 / 0.7 and 0.3 / 0.7
        assert_eq!(tokens(&four(), 1.0, 2, 0.5), [1]);
        // squared probabilities 0.01 0.16 0.04 0.09 of 0.30: the first has 0.53
        assert_eq!(tokens(&four(), 0.5, 0, 0.5), [1]);
        assert_eq!(tokens(&[1.0, 2.0, 2.0, 0.0], 1.0, 1, 1.0), [1, 2], "equals of the k-th are left");
    }

    #[test]
    fn the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort() {
        let stream = Stream::new(3, "logits");
        let logits: Vec<f32> = (0..5000).map(|i| 3.0 * stream.normal(i) as f32).collect();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let weight = |token: usize| f64::from(logits[token]).exp();
        let total: f64 = (0..logits.len()).map(weight).sum();
        for top_p in [0.05, 0.3, 0.9, 0.999] {
            let mut sum = 0.0;
            let needed = order.iter().take_while(|&&token| {
                let before = sum;
                sum += weight(token);
                before < top_p * total
            });
            assert_eq!(tokens(&logits, 1.0, 0, top_p), needed.copied().collect::<Vec<_>>(), "{top_p}");
        }
    }

    #[test]
    fn frequencies_are_the_probabilities() {
        let sampling = Sampling::Random { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 4 };
        let mut counts = [0.0; 4];
        let draws = 40_000;
        for draw in 0..draws {
            counts[sampling.choose_one(&four(), draw / 200, draw % 200) as usize] += 1.0 / draws as f64;
        }
        // standard errors up to 0.0025
        for (count, p) in counts.iter().zip([0.1, 0.4, 0.2, 0.3]) {
            assert!((count - p).abs() < 0.01, "{counts:?}");
        }
    }

    #[test]
    fn draws_depend_on_seed_prompt_and_position() {
        let draw = |seed, prompt, position| uniform(seed, prompt, position).to_bits();
        let all = [draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)];
        assert!((0..4).all(|i| (0..i).all(|j| all[i] != all[j])));
        assert_eq!(draw(7, 8, 9), draw(7, 8, 9));
    }

    #[test]
    fn the_first_of_equal_logits_is_greedys_choice() {
        assert_eq!(first_maximum(&[0.0, 3.0, 3.0, -1.0]), 1);
    }
}
