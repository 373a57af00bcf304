//! Where the assistant's turns stand in the text that a chat template makes of the messages.
//!
//! A turn begins where the text of the messages before it, generation prompt included, ends: that is the text the model
//! is given when it has to answer. It ends where the text of the messages up to it ends. Most templates write the same
//! text in both places once further messages follow. Some do not (a generation prompt that opens a tag, reasoning that
//! is dropped from earlier turns, an end-of-text token behind the last turn); there the turn's content is found by
//! looking at what changes in the text when the content changes. A different beginning is marked: the model is asked in
//! other words than it was trained on.

use std::ops::Range;

use super::score::Passage;
use crate::data::error::DataError;
use crate::data::record::{Message, Role};
use crate::data::template::{ChatTemplate, Continue};

/// Stands for a turn's content to find out where it goes; from Unicode's private use area, so that no content has it.
const MARK: &str = "\u{f8f0}\u{f8f1}";

/// The text of `messages` up to the last assistant turn, with every assistant turn located in it.
pub(super) fn passage(template: &ChatTemplate, messages: &[Message]) -> Result<Passage, DataError> {
    let is_assistant = |message: &Message| message.role == Role::Assistant;
    let last = messages.iter().rposition(is_assistant).ok_or(DataError::NothingScored)?;
    let messages = &messages[..=last];
    let text = template.render(messages, Continue::No)?;
    let mut turns: Vec<Range<usize>> = Vec::new();
    let mut prefix_broken = false;
    for k in (0..=last).filter(|&k| is_assistant(&messages[k])) {
        // where a template puts an empty block of reasoning in front of an answer, a model that is asked not to reason is
        // given that block; the longer prompt is the one that leaves the answer alone
        let mut prompts = Vec::new();
        for how in [Continue::Answer, Continue::AnswerWithoutThinking] {
            prompts.push(template.render(&messages[..k], how)?);
        }
        let fitting = prompts.iter().filter(|prompt| text.starts_with(*prompt)).map(String::len).max();
        let start = match fitting {
            Some(len) => len,
            None => {
                prefix_broken = true;
                content(template, messages, k, &text)?.start
            }
        };
        let end = if k == last { text.len() } else { end(template, messages, k, &text)? };
        let after = turns.last().map_or(0, |turn| turn.end);
        turns.push(start.max(after)..end.max(start));
    }
    Ok(Passage { text, turns, is_chat: true, prefix_broken })
}

/// The text that a model is given which is to answer `messages`: as [`passage`] has it before the answer.
pub(super) fn prompt(template: &ChatTemplate, messages: &[Message]) -> Result<String, DataError> {
    let answer = Message { role: Role::Assistant, content: MARK.to_owned() };
    let messages: Vec<_> = messages.iter().cloned().chain([answer]).collect();
    let Passage { mut text, turns, prefix_broken, .. } = passage(template, &messages)?;
    if prefix_broken {
        // the template asks in other words than it records
        return template.render(&messages[..messages.len() - 1], Continue::Answer);
    }
    text.truncate(turns.last().map_or(0, |turn| turn.start));
    Ok(text)
}

/// Where turn `k` ends in `text`, the text of all messages.
fn end(template: &ChatTemplate, messages: &[Message], k: usize, text: &str) -> Result<usize, DataError> {
    let until = template.render(&messages[..=k], Continue::No)?;
    if text.starts_with(&until) {
        return Ok(until.len());
    }
    let end = content(template, messages, k, text)?.end;
    let end_in_until = content(template, &messages[..=k], k, &until)?.end;
    Ok(end + common_prefix(&until[end_in_until..], &text[end..]))
}

/// The bytes of `text`, the text of `messages`, that message `k` contributes: all but what stays the same when its
/// content is another.
fn content(template: &ChatTemplate, messages: &[Message], k: usize, text: &str) -> Result<Range<usize>, DataError> {
    let mut marked = messages.to_vec();
    marked[k].content = MARK.to_owned();
    let marked = template.render(&marked, Continue::No)?;
    let start = common_prefix(&marked, text);
    let same = marked[start..].chars().rev().zip(text[start..].chars().rev()).take_while(|(a, b)| a == b);
    let suffix: usize = same.map(|(c, _)| c.len_utf8()).sum();
    Ok(start..text.len() - suffix)
}

/// Length in bytes of the longest common prefix, on a character's border.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(c, _)| c.len_utf8()).sum()
}
