//! From the samples of a step to packed micro-batches: which rank takes which, and what the model reads.
//!
//! Nothing here changes a result: losses are sums over tokens with denominators of the whole step.

use std::ops::Range;

use super::Sample;

/// What a sample is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// To be forgotten; with `finetune`, to be learned.
    Forget,
    Retain,
}

/// One of a sample's texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Text {
    /// The sample itself.
    #[default]
    Answer,
    /// The same prompt with the answer that is to take its place.
    Preferred,
}

/// Which texts of a sample go through the model; they stay together in one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Texts {
    #[default]
    Answer,
    Preferred,
    /// The answer, then the preferred one.
    Both,
}

impl Texts {
    /// The texts in the order in which they stand in a micro-batch.
    pub fn each(self) -> &'static [Text] {
        match self {
            Self::Answer => &[Text::Answer],
            Self::Preferred => &[Text::Preferred],
            Self::Both => &[Text::Answer, Text::Preferred],
        }
    }
}

/// One sample of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    pub stream: Stream,
    /// Index in the stream's data set.
    pub sample: usize,
    /// Of all its texts that go through the model. Unit: tokens.
    pub len: usize,
}

/// Which positions of a sample get a row in the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowsOf {
    /// Those whose next token is scored.
    Scored,
    /// All of them; there may be no next token.
    Every,
}

/// Sequences that go through the model together, one after the other without padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    pub tokens: Vec<i64>,
    pub sequences: Vec<Sequence>,
    /// Token position of each row of the head.
    pub positions: Vec<i64>,
    /// Id of the token after each row, 0 where there is none.
    pub targets: Vec<i64>,
}

/// One text of a sample inside a micro-batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub stream: Stream,
    pub sample: usize,
    pub text: Text,
    pub len: usize,
    /// Its rows in the head.
    pub rows: Range<usize>,
}

/// Cuts the items of a step into one share for each rank, balanced by tokens.
///
/// Longest first, each to the rank with the fewest tokens so far; a pure function, so that all ranks agree.
pub fn share(items: &[Item], ranks: usize) -> Vec<Vec<Item>> {
    balance(items, ranks)
}

/// Cuts one rank's share into micro-batches of at most `budget` tokens, as few and as even as possible.
///
/// A sample longer than the budget gets a micro-batch of its own.
pub fn pack(items: &[Item], budget: usize) -> Vec<Vec<Item>> {
    let total: usize = items.iter().map(|item| item.len).sum();
    let mut count = total.div_ceil(budget).min(items.len());
    loop {
        let bins = balance(items, count);
        let fits = |bin: &Vec<Item>| bin.len() < 2 || bin.iter().map(|item| item.len).sum::<usize>() <= budget;
        if count >= items.len() || bins.iter().all(fits) {
            return bins.into_iter().filter(|bin| !bin.is_empty()).collect();
        }
        count += 1;
    }
}

impl MicroBatch {
    /// Lays out `items`: forget before retain, longest first.
    ///
    /// `sample`: the sample of an item; `rows`: which rows each stream needs.
    pub fn new<'a>(items: &[Item], sample: impl Fn(Item) -> &'a Sample, rows: impl Fn(Stream) -> RowsOf) -> Self {
        Self::with_texts(items, |_| Texts::Answer, |item, _| sample(item), rows)
    }

    /// As [`Self::new`] with several texts a sample, one after the other.
    pub fn with_texts<'a>(
        items: &[Item],
        texts: impl Fn(Stream) -> Texts,
        sample: impl Fn(Item, Text) -> &'a Sample,
        rows: impl Fn(Stream) -> RowsOf,
    ) -> Self {
        let mut items = items.to_vec();
        items.sort_by_key(|item| (item.stream, std::cmp::Reverse(item.len)));
        let mut batch = Self::default();
        for (item, text) in items.iter().flat_map(|&item| texts(item.stream).each().iter().map(move |&t| (item, t))) {
            let sample = sample(item, text);
            let (start, first_row) = (batch.tokens.len(), batch.positions.len());
            let tokens = sample.tokens.iter().map(|&id| i64::from(id));
            batch.tokens.extend(tokens);
            match rows(item.stream) {
                RowsOf::Scored => {
                    for &target in &sample.scored {
                        batch.positions.push((start + target as usize - 1) as i64);
                        batch.targets.push(batch.tokens[start + target as usize]);
                    }
                }
                RowsOf::Every => {
                    batch.positions.extend((start..batch.tokens.len()).map(|at| at as i64));
                    batch.targets.extend_from_slice(&batch.tokens[start + 1..]);
                    batch.targets.push(0);
                }
            }
            let rows = first_row..batch.positions.len();
            let (stream, len) = (item.stream, sample.tokens.len());
            batch.sequences.push(Sequence { stream, sample: item.sample, text, len, rows });
        }
        batch
    }

    /// Lengths of all sequences, in order.
    pub fn lengths(&self) -> Vec<usize> {
        self.sequences.iter().map(|sequence| sequence.len).collect()
    }

    /// Rows of one stream; they are consecutive.
    pub fn rows(&self, stream: Stream) -> Range<usize> {
        let mut rows = self.sequences.iter().filter(|sequence| sequence.stream == stream).map(|s| s.rows.clone());
        let first = rows.next().unwrap_or(0..0);
        let last = rows.next_back().unwrap_or_else(|| first.clone());
        first.start..last.end
    }
}

fn balance(items: &[Item], bins: usize) -> Vec<Vec<Item>> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(items[i].len), i));
    let mut result = vec![(0usize, Vec::new()); bins];
    for i in order {
        let (tokens, bin) = result.iter_mut().min_by_key(|(tokens, _)| *tokens).expect("invariant: at least one bin");
        *tokens += items[i].len;
        bin.push(items[i]);
    }
    result.into_iter().map(|(_, bin)| bin).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(lengths: &[usize]) -> Vec<Item> {
        lengths.iter().enumerate().map(|(sample, &len)| Item { stream: Stream::Forget, sample, len }).collect()
    }

    fn tokens(items: &[Item]) -> usize {
        items.iter().map(|item| item.len).sum()
    }

    #[test]
    fn shares_are_complete_and_balanced() {
        let all = items(&[90, 10, 40, 50, 30, 20, 60]);
        for ranks in [1, 2, 3, 10] {
            let shares = share(&all, ranks);
            assert_eq!(shares.len(), ranks);
            let mut samples: Vec<usize> = shares.iter().flatten().map(|item| item.sample).collect();
            samples.sort_unstable();
            assert_eq!(samples, (0..7).collect::<Vec<_>>());
        }
        let two = share(&all, 2);
        assert!(tokens(&two[0]).abs_diff(tokens(&two[1])) <= 10);
    }

    #[test]
    fn micro_batches_keep_the_budget_except_for_single_long_samples() {
        for lengths in [&[100usize, 20, 30, 40, 10][..], &[7; 13], &[55, 54, 53], &[]] {
            let bins = pack(&items(lengths), 60);
            assert_eq!(bins.iter().map(Vec::len).sum::<usize>(), lengths.len());
            assert!(bins.iter().all(|bin| bin.len() == 1 || tokens(bin) <= 60), "{bins:?}");
        }
        assert_eq!(pack(&items(&[20, 20, 20, 20]), 80).len(), 1);
    }

    #[test]
    fn a_micro_batch_holds_rows_before_their_targets() {
        let samples = [
            Sample { tokens: vec![5, 6, 7, 8], scored: vec![2, 3] },
            Sample { tokens: vec![9, 4, 3], scored: vec![2] },
        ];
        let items =
            [Item { stream: Stream::Retain, sample: 1, len: 3 }, Item { stream: Stream::Forget, sample: 0, len: 4 }];
        let batch = MicroBatch::new(&items, |item| &samples[item.sample], |_| RowsOf::Scored);
        assert_eq!(batch.tokens, [5, 6, 7, 8, 9, 4, 3]);
        assert_eq!(batch.positions, [1, 2, 5]);
        assert_eq!(batch.targets, [7, 8, 3]);
        assert_eq!(batch.lengths(), [4, 3]);
        assert_eq!((batch.rows(Stream::Forget), batch.rows(Stream::Retain)), (0..2, 2..3));

        let rows = |stream| {
            if stream == Stream::Retain { RowsOf::Every } else { RowsOf::Scored }
        };
        let batch = MicroBatch::new(&items, |item| &samples[item.sample], rows);
        assert_eq!(batch.positions, [1, 2, 4, 5, 6]);
        assert_eq!(batch.targets, [7, 8, 4, 3, 0]);
        assert_eq!((batch.rows(Stream::Forget), batch.rows(Stream::Retain)), (0..2, 2..5));
    }
}
