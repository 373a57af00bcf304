//! Which tokens of a passage are scored: those that reach into an assistant's turn, up to its end-of-turn token.

use std::collections::BTreeSet;
use std::ops::Range;

use tokenizers::Encoding;

/// A text and the parts of it that are scored.
pub(super) struct Passage {
    pub(super) text: String,
    /// Bytes of the text; ascending, disjoint.
    pub(super) turns: Vec<Range<usize>>,
    /// Special tokens are in the text already, and white space behind the last one belongs to no turn.
    pub(super) is_chat: bool,
    pub(super) prefix_broken: bool,
}

/// A passage as tokens.
pub(super) struct Scored {
    pub(super) tokens: Vec<i32>,
    /// Ascending positions, none of them 0.
    pub(super) scored: Vec<u32>,
    /// A scored token begins before its turn does.
    pub(super) straddles: bool,
}

/// Picks the scored tokens of `passage`, which the tokenizer turned into `encoding`. A last turn that does not end in
/// an end-of-text token (or another special token in a chat) gets `eos[0]`, scored.
pub(super) fn score(passage: &Passage, encoding: &Encoding, special: &BTreeSet<i32>, eos: &[i32]) -> Scored {
    let view = View {
        passage,
        tokens: ids(encoding),
        spans: encoding.get_offsets(),
        inserted: encoding.get_special_tokens_mask(),
        special,
        eos,
    };
    let mut scored = Vec::new();
    let mut straddles = false;
    let mut len = view.tokens.len();
    for (i, turn) in passage.turns.iter().enumerate() {
        let mut positions = view.overlapping(turn);
        straddles |= positions.first().is_some_and(|&p| view.inserted[p] == 0 && view.spans[p].0 < turn.start);
        if passage.is_chat {
            let ends = view.close(&mut positions);
            if ends && i + 1 == passage.turns.len() {
                len = positions.last().map_or(len, |&p| p + 1);
            }
        }
        scored.extend(positions);
    }
    let mut tokens = view.tokens;
    tokens.truncate(len);
    let ends = |token| eos.contains(token) || (passage.is_chat && special.contains(token));
    if !tokens.last().is_some_and(ends) {
        scored.push(tokens.len());
        tokens.push(eos[0]);
    }
    let scored = scored.into_iter().filter(|&p| p > 0).map(|p| p as u32).collect();
    Scored { tokens, scored, straddles }
}

pub(super) fn ids(encoding: &Encoding) -> Vec<i32> {
    encoding.get_ids().iter().map(|&id| id as i32).collect()
}

struct View<'a> {
    passage: &'a Passage,
    tokens: Vec<i32>,
    /// Bytes of the text that each token stands for; meaningless where the tokenizer inserted the token.
    spans: &'a [(usize, usize)],
    /// 1 for tokens that the tokenizer put around the text.
    inserted: &'a [u32],
    special: &'a BTreeSet<i32>,
    eos: &'a [i32],
}

impl View<'_> {
    fn is_special(&self, p: usize) -> bool {
        self.special.contains(&self.tokens[p])
    }

    /// Positions of the tokens that reach into `turn`. One that also reaches out of it counts, unless it is a special
    /// token: that belongs to one side only, though it may have swallowed white space of the other. Tokens that the
    /// tokenizer put behind the text belong to the last turn.
    fn overlapping(&self, turn: &Range<usize>) -> Vec<usize> {
        let end_of_text = self.inserted.iter().rposition(|&inserted| inserted == 0);
        let belongs = |&p: &usize| {
            let (start, end) = self.spans[p];
            match self.inserted[p] {
                0 if self.is_special(p) => start >= turn.start && end <= turn.end && start < end,
                0 => end > turn.start && start < turn.end,
                _ => Some(p) > end_of_text,
            }
        };
        (0..self.tokens.len()).filter(belongs).collect()
    }

    /// Ends a chat's turn with its end-of-turn token: the model stops there and never writes what the template puts behind it,
    /// white space or an end-of-text token after the last turn. Returns whether the turn has such a token.
    fn close(&self, positions: &mut Vec<usize>) -> bool {
        let blank = |&p: &usize| self.passage.text[self.spans[p].0..self.spans[p].1].trim().is_empty();
        // the special tokens and blanks that close the turn
        let tail = positions.iter().rposition(|p| !self.is_special(*p) && !blank(p)).map_or(0, |last| last + 1);
        let first_eos = positions[tail..].iter().position(|&p| self.eos.contains(&self.tokens[p]));
        let last_special = positions[tail..].iter().rposition(|&p| self.is_special(p));
        if let Some(end) = first_eos.or(last_special).map(|end| tail + end) {
            positions.truncate(end + 1);
            return true;
        }
        // a turn may end in another token when it is not the last one
        let next = positions.last().map_or(self.tokens.len(), |&p| p + 1);
        if next < self.tokens.len() && self.is_special(next) {
            positions.push(next);
            return true;
        }
        false
    }
}
