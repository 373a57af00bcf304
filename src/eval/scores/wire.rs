//! Scores on their way between ranks, little endian.

use super::TextScore;

/// Each score as `index, targets, targets with moments, ended` (u64), log-probabilities (f32), first choices (a byte each), moments (f64).
pub(super) fn encode(scores: &[(usize, TextScore)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, score) in scores {
        let head = [*index, score.logprobs.len(), score.moments.len(), usize::from(score.ended)];
        bytes.extend(head.iter().flat_map(|&number| (number as u64).to_le_bytes()));
        bytes.extend(score.logprobs.iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend(score.correct.iter().map(|&x| u8::from(x)));
        bytes.extend(score.moments.iter().flatten().flat_map(|x| x.to_le_bytes()));
    }
    bytes
}

pub(super) fn decode(mut bytes: &[u8]) -> Vec<(usize, TextScore)> {
    let mut take = |len: usize| {
        let (part, rest) = bytes.split_at_checked(len)?;
        bytes = rest;
        Some(part)
    };
    let mut scores = Vec::new();
    while let Some(head) = take(32).filter(|head| !head.is_empty()) {
        let head: Vec<usize> = head.as_chunks::<8>().0.iter().map(|x| u64::from_le_bytes(*x) as usize).collect();
        let [index, len, spread, ended] = head[..] else { unreachable!("invariant: 32 bytes are 4 numbers") };
        let whole = "invariant: a rank sends whole scores";
        let logprobs = take(4 * len).expect(whole).as_chunks::<4>().0;
        let correct = take(len).expect(whole).iter().map(|&x| x != 0).collect();
        let moments = take(16 * spread).expect(whole).as_chunks::<8>().0;
        let moments: Vec<f64> = moments.iter().map(|x| f64::from_le_bytes(*x)).collect();
        let score = TextScore {
            logprobs: logprobs.iter().map(|x| f32::from_le_bytes(*x)).collect(),
            correct,
            moments: moments.as_chunks::<2>().0.to_vec(),
            ended: ended != 0,
        };
        scores.push((index, score));
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_survive_the_way_between_ranks() {
        let score = |logprobs: &[f32], correct: &[bool], moments: &[[f64; 2]], ended| TextScore {
            logprobs: logprobs.to_vec(),
            correct: correct.to_vec(),
            moments: moments.to_vec(),
            ended,
        };
        let scores = vec![
            (7, score(&[-0.5, -1.25], &[true, false], &[[-3.0, 0.5], [-2.0, 1e-9]], true)),
            (1 << 40, score(&[], &[], &[], false)),
            (3, score(&[f32::NEG_INFINITY], &[false], &[], false)),
        ];
        assert_eq!(decode(&encode(&scores)), scores);
        assert_eq!(decode(&[]), []);
    }
}
