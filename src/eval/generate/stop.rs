//! When a continuation ends.

use super::Ended;
use crate::data::Encoder;

/// What ends a continuation besides its length.
pub(super) struct Stops<'a> {
    pub(super) encoder: &'a Encoder,
    pub(super) texts: &'a [String],
    pub(super) at_eos: bool,
}

impl Stops<'_> {
    /// Whether `written`, whose last token is new, has ended.
    pub(super) fn ended(&self, written: &[i32], max_new_tokens: usize) -> Option<Ended> {
        let last = written.last()?;
        if self.at_eos && self.encoder.ends_text(*last) {
            return Some(Ended::Eos);
        }
        if !self.texts.is_empty() && self.first(&self.encoder.decode(written)).is_some() {
            return Some(Ended::Stop);
        }
        (written.len() >= max_new_tokens).then_some(Ended::Length)
    }

    /// The text of an ended continuation.
    pub(super) fn text(&self, tokens: &[i32], ended: Ended) -> String {
        let mut text = self.encoder.decode(tokens);
        if ended == Ended::Stop {
            text.truncate(self.first(&text).unwrap_or(text.len()));
        }
        text
    }

    /// Byte at which the first of the stop texts begins.
    fn first(&self, text: &str) -> Option<usize> {
        self.texts.iter().filter_map(|stop| text.find(stop)).min()
    }
}
