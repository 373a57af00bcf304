//! Bytes to and from a file at the disk's own pace.
//!
//! Out: pieces of a size that the page cache takes without searching for large pages, and the disk at work from the first of them instead
//! of from the last `fsync`. In: only what is asked for, read and not mapped, so that a file which another program cuts is an error and
//! what was read does not count as this process's memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::abi::host;

/// Bytes that are handed to the system at once. Of 0.25 to 32 MiB, writes of up to 4 were equally fast, of 32 up to five times slower.
pub const PIECE: usize = 1 << 20;
/// Bytes after which the disk is told to begin.
const BEHIND: u64 = 8 << 20;

/// Appends to a part of a file.
pub struct Stream {
    file: File,
    /// Place in the file of the next byte that is handed on.
    at: u64,
    /// Up to where the disk has begun.
    begun: u64,
    /// Small parts that wait for company.
    small: Vec<u8>,
}

impl Stream {
    /// `at`: place in the file of the first byte.
    pub fn new(file: File, at: u64) -> Self {
        Self { file, at, begun: at, small: Vec::new() }
    }

    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.small.len() + bytes.len() <= PIECE {
            self.small.extend_from_slice(bytes);
            return Ok(());
        }
        self.hand_on()?;
        if bytes.len() <= PIECE {
            self.small.extend_from_slice(bytes);
            return Ok(());
        }
        bytes.chunks(PIECE).try_for_each(|piece| self.put(piece))
    }

    fn hand_on(&mut self) -> io::Result<()> {
        let mut small = std::mem::take(&mut self.small);
        self.put(&small)?;
        small.clear();
        self.small = small;
        Ok(())
    }

    fn put(&mut self, piece: &[u8]) -> io::Result<()> {
        self.file.write_all_at(piece, self.at)?;
        self.at += piece.len() as u64;
        if self.at - self.begun >= BEHIND {
            host::begin_to_write(&self.file, self.begun..self.at);
            self.begun = self.at;
        }
        Ok(())
    }

    /// Hands everything to the system; the file is not on disk before it is synchronised.
    pub fn finish(mut self) -> io::Result<File> {
        self.hand_on()?;
        Ok(self.file)
    }
}

/// A stretch of elements that lie side by side in a file and side by side where they go. Unit: elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// In the file, counted from the start of the stored tensor.
    pub from: usize,
    /// Where it goes.
    pub to: usize,
    pub len: usize,
}

/// Adds a run, to the last one where it goes on from there.
pub fn join(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.from + last.len == run.from && last.to + last.len == run.to => last.len += run.len,
        _ => runs.push(run),
    }
}

/// Cuts ascending runs into what is read at once: groups of at most [`PIECE`] bytes from the first to the last, those that lie far apart
/// in groups of their own.
///
/// `width`: bytes of an element.
pub fn groups(runs: &[Run], width: usize) -> Vec<Vec<Run>> {
    let most = PIECE / width;
    // reading across a smaller gap is cheaper than reading twice
    let gap = most / 16;
    let mut groups: Vec<Vec<Run>> = Vec::new();
    for run in runs {
        let mut done = 0;
        while done < run.len {
            let from = run.from + done;
            let open = groups.last().and_then(|group| Some((group.first()?.from, group.last()?)));
            // a run that does not fit as a whole begins a group of its own
            let fits = open.is_some_and(|(first, last)| {
                let end = last.from + last.len;
                (end..=end + gap).contains(&from) && run.from + run.len <= first + most
            });
            let len = (run.len - done).min(most);
            let part = Run { from, to: run.to + done, len };
            match groups.last_mut() {
                Some(group) if fits => group.push(part),
                _ => groups.push(vec![part]),
            }
            done += len;
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_writes_what_it_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, b"head").unwrap();
        let all: Vec<u8> = (0..20 * PIECE as u32 + 77).map(|i| ((i * 7) >> 3) as u8).collect();
        let mut stream = Stream::new(File::options().write(true).open(&path).unwrap(), 4);
        let mut rest = &all[..];
        for len in [1, 3, PIECE - 4, 0, 1, PIECE, PIECE + 1, 5, 9 * PIECE, 100_000].into_iter().chain([usize::MAX]) {
            let (part, behind) = rest.split_at(len.min(rest.len()));
            stream.append(part).unwrap();
            rest = behind;
        }
        stream.finish().unwrap();
        let found = std::fs::read(&path).unwrap();
        assert!(found[..4] == *b"head" && found[4..] == all);
    }

    #[test]
    fn runs_are_joined_and_grouped() {
        let mut runs = Vec::new();
        for (from, to, len) in [(0, 5, 10), (10, 15, 10), (30, 25, 2), (32, 28, 1)] {
            join(&mut runs, Run { from, to, len });
        }
        let run = |from, to, len| Run { from, to, len };
        assert_eq!(runs, [run(0, 5, 20), run(30, 25, 2), run(32, 28, 1)]);
        assert_eq!(groups(&runs, 4), [runs.clone()], "they lie close together");
        let far = PIECE;
        assert_eq!(groups(&[run(0, 0, 3), run(far, 3, 3)], 4).len(), 2);
    }

    /// Rows of a column shard, long runs, single elements: every element once, in order, and no group longer than a piece.
    #[test]
    fn groups_hold_every_element_once() {
        for (width, len, stride, count) in
            [(4, 100, 800, 5000), (2, 1 << 20, 1 << 20, 3), (1, 1, 2, 3_000_000), (4, 70_000, 70_001, 40)]
        {
            let runs: Vec<Run> = (0..count).map(|i| Run { from: i * stride, to: i * len, len }).collect();
            let groups = groups(&runs, width);
            let mut joined = Vec::new();
            for group in &groups {
                let (first, last) = (group[0], group[group.len() - 1]);
                assert!((last.from + last.len - first.from) * width <= PIECE);
                group.iter().for_each(|&run| join(&mut joined, run));
            }
            let mut expected = Vec::new();
            runs.iter().for_each(|&run| join(&mut expected, run));
            assert_eq!(joined, expected);
        }
    }
}
