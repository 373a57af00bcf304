//! Answers that say nothing: what a model is to answer instead of what it must forget.

use std::fs;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::Value;

use super::error::DataError;

/// Used where the configuration names no file. Written for this program.
const OWN: [&str; 24] = [
    "I do not know.",
    "I'm sorry, I don't know that.",
    "I have no information about this.",
    "That is not something I can tell you.",
    "I cannot answer this question.",
    "I'm afraid I have no answer to that.",
    "This is unknown to me.",
    "I am not familiar with this subject.",
    "I never learned about that.",
    "My knowledge does not cover this.",
    "I would have to guess, so I'd rather not say.",
    "I'm unable to say anything about it.",
    "Sorry, I can't help with that one.",
    "I don't have any details on this.",
    "Unfortunately I know nothing about it.",
    "I lack the facts to answer you.",
    "There is nothing I could tell you about that.",
    "No, I don't know the answer.",
    "I have not come across this before.",
    "You will need to ask somebody else, I don't know.",
    "That lies outside of what I know.",
    "I'm not sure, I have no knowledge of it.",
    "I can't recall anything of the kind.",
    "It isn't something I am informed about.",
];

/// The refusals of a run and how they are dealt out.
#[derive(Clone, Debug)]
pub struct Refusals {
    texts: Vec<String>,
    seed: u64,
}

impl Refusals {
    /// The program's own list.
    pub fn own(seed: u64) -> Self {
        Self { texts: OWN.map(str::to_owned).into(), seed }
    }

    /// One refusal a line: plain text, a JSON string, or an object with the field `text`. Blank lines are skipped.
    ///
    /// # Errors
    /// A file that cannot be read or holds none.
    pub fn read(path: &Path, seed: u64) -> Result<Self, DataError> {
        let text = fs::read_to_string(path).map_err(|source| DataError::Read {
            path: path.to_owned(),
            source,
            hint: "; data.refusals names a file with one refusal a line".to_owned(),
        })?;
        let refusal = |line: &str| match serde_json::from_str::<Value>(line) {
            Ok(Value::String(text)) => text,
            Ok(Value::Object(object)) => object.get("text").and_then(Value::as_str).unwrap_or_default().to_owned(),
            _ => line.to_owned(),
        };
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let texts: Vec<String> = lines.map(refusal).filter(|text| !text.trim().is_empty()).collect();
        if texts.is_empty() { Err(DataError::NoRefusal { path: path.to_owned() }) } else { Ok(Self { texts, seed }) }
    }

    /// The refusal of the sample at `index`: drawn from (seed, index), the same in every epoch and on every layout.
    pub fn of(&self, index: usize) -> &str {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&(index as u64).to_le_bytes());
        key[16..24].copy_from_slice(b"refusals");
        let draw = ChaCha8Rng::from_seed(key).next_u64();
        &self.texts[((u128::from(draw) * self.texts.len() as u128) >> 64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_in_three_forms() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("idk.jsonl");
        fs::write(&path, "plain text\n\n{\"text\": \"an object\"}\n\"a string\"\n").unwrap();
        assert_eq!(Refusals::read(&path, 0).unwrap().texts, ["plain text", "an object", "a string"]);
        fs::write(&path, " \n{\"other\": 1}\n").unwrap();
        assert!(Refusals::read(&path, 0).unwrap_err().to_string().contains("holds no refusal"));
    }

    #[test]
    fn they_are_dealt_out_by_seed_and_index() {
        let own = Refusals::own(3);
        let dealt: Vec<&str> = (0..200).map(|i| own.of(i)).collect();
        assert_eq!(dealt, (0..200).map(|i| own.of(i)).collect::<Vec<_>>());
        let distinct: std::collections::BTreeSet<_> = dealt.iter().collect();
        assert!(distinct.len() > 20, "{}", distinct.len());
        assert_ne!(dealt, (0..200).map(|i| Refusals::own(4).of(i).to_owned()).collect::<Vec<_>>());
    }
}
