//! The file system of the runs, as every rank sees it.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Line, Verdict};
use crate::abi::{host, signals};
use crate::dist::{Reduce, World};

/// How long a file of another rank may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one rank found.
struct Found {
    /// Seconds until rank 0's file was there with its content.
    seen: Result<f64, String>,
    /// Bytes a second, written to disk and read back.
    written: Result<(f64, f64), String>,
}

/// Examines the folder. All ranks call it; what they write is removed.
pub(super) fn examine(folder: &Path, bytes: usize, world: &World) -> Vec<Line> {
    let there = folder.is_dir();
    let mut made = [0.0];
    if world.is_first() && !there && std::fs::create_dir_all(folder).is_err() {
        made[0] = 1.0;
    }
    world.world.all_reduce_f64(&mut made, Reduce::Max);
    let token = world.world.broadcast_bytes(format!("{}.{:?}", std::process::id(), Instant::now()).as_bytes(), 0);
    let name = blake3::hash(&token).to_hex()[..12].to_owned();
    let path = |what: &str| folder.join(format!(".doctor_{name}_{what}"));
    let told = if world.is_first() { put(&path("token"), &token) } else { Ok(()) };
    world.world.barrier();
    let seen = told.and_then(|()| appears(&path("token"), &token));
    let mine = path(&format!("rank_{:05}", world.mesh.rank));
    let written = speed(&mine, bytes);
    let _ = std::fs::remove_file(&mine);
    let found = Found { seen, written };
    world.world.barrier();
    if world.is_first() {
        let _ = std::fs::remove_file(path("token"));
        if !there {
            let _ = std::fs::remove_dir(folder); // where nothing else has come into it
        }
    }
    judge(folder, &found, world)
}

/// Written beside, synchronised and renamed, as checkpoints are.
fn put(path: &Path, content: &[u8]) -> Result<(), String> {
    let complain = |error: std::io::Error| format!("{}: {error}", path.display());
    let partial: PathBuf = path.with_extension("partial");
    let mut file = std::fs::File::create(&partial).map_err(complain)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(complain)?;
    std::fs::rename(&partial, path).map_err(complain)
}

fn appears(path: &Path, content: &[u8]) -> Result<f64, String> {
    let start = Instant::now();
    loop {
        match std::fs::read(path) {
            Ok(bytes) if bytes == content => return Ok(start.elapsed().as_secs_f64()),
            _ if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(20)),
            Ok(_) => return Err("rank 0's file has another content here".to_owned()),
            Err(error) => return Err(format!("rank 0's file is not there: {error}")),
        }
    }
}

/// Rates of writing (to the disk itself) and reading (past the cache where the system lets us).
fn speed(path: &Path, bytes: usize) -> Result<(f64, f64), String> {
    let complain = |error: std::io::Error| format!("{}: {error}", path.display());
    let block = vec![0x5a; 1 << 20];
    let start = Instant::now();
    let mut file = std::fs::File::create(path).map_err(complain)?;
    for _ in 0..bytes.div_ceil(block.len()) {
        file.write_all(&block).map_err(complain)?;
    }
    file.sync_all().map_err(complain)?;
    let (total, writing) = (bytes.div_ceil(block.len()) * block.len(), start.elapsed().as_secs_f64());
    let mut file = std::fs::File::open(path).map_err(complain)?;
    host::drop_from_cache(&file);
    let start = Instant::now();
    let mut read = block;
    let mut count = 0;
    while let n @ 1.. = file.read(&mut read).map_err(complain)? {
        if read[..n].iter().any(|&byte| byte != 0x5a) {
            return Err(format!("{}: what is read is not what was written", path.display()));
        }
        count += n;
    }
    if count != total {
        return Err(format!("{}: {total} bytes were written, {count} are read", path.display()));
    }
    Ok((total as f64 / writing, total as f64 / start.elapsed().as_secs_f64()))
}

fn judge(folder: &Path, found: &Found, world: &World) -> Vec<Line> {
    // every rank's words; empty where all is well
    let words = |result: Result<(), &String>| {
        let mine = result.err().cloned().unwrap_or_default();
        let all = world.world.gather_bytes(mine.as_bytes());
        let first = all.iter().enumerate().find(|(_, words)| !words.is_empty());
        first.map(|(rank, words)| format!("rank {rank}: {}", String::from_utf8_lossy(words)))
    };
    let mut worst = [*found.seen.as_ref().unwrap_or(&0.0)];
    world.world.all_reduce_f64(&mut worst, Reduce::Max);
    let shown = folder.display();
    let shared = match words(found.seen.as_ref().map(drop)) {
        Some(why) => Line::new(
            "shared folder",
            Verdict::Fail,
            why,
            format!("{shown} must be one folder for all ranks; choose one on a file system that all hosts mount"),
        ),
        None => {
            let verdict = if worst[0] > 2.0 { Verdict::Warn } else { Verdict::Pass };
            let text = format!("{shown}: a file of rank 0 is on all ranks after {:.2} s", worst[0]);
            Line::new(
                "shared folder",
                verdict,
                text,
                "a network file system that shows new files late; runs still work, STOP and DUMP come late",
            )
        }
    };
    let (mut written, mut read) = found.written.as_ref().map_or((0.0, 0.0), |rates| *rates);
    let mut rates = [-written, -read];
    world.world.all_reduce_f64(&mut rates, Reduce::Max);
    [written, read] = rates.map(|rate| -rate / 1e6);
    let ranks = world.world.size();
    let speed = match words(found.written.as_ref().map(drop)) {
        Some(why) => Line::new(
            "disk",
            Verdict::Fail,
            why,
            format!("checkpoints cannot be written to {shown}; is it full, read-only, over quota?"),
        ),
        None => {
            let text = format!(
                "{written:.0} MB/s written and synchronised, {read:.0} MB/s read, by the slowest of {ranks} at once"
            );
            let verdict = if written < 20.0 { Verdict::Warn } else { Verdict::Pass };
            Line::new(
                "disk",
                verdict,
                text,
                "saving will be slow: checkpoint.async = true, a larger checkpoint.every, or another folder",
            )
        }
    };
    let free = signals::free_bytes(folder).or_else(|| signals::free_bytes(folder.parent()?));
    let mut least = [-free.map_or(f64::MAX, |free| free as f64)];
    world.world.all_reduce_f64(&mut least, Reduce::Max);
    let gib = -least[0] / 1073741824.0;
    let verdict = if gib < 1.0 { Verdict::Warn } else { Verdict::Pass };
    let text = if gib > 1e12 { "not known".to_owned() } else { format!("{gib:.1} GiB in {shown}") };
    let space =
        Line::new("free space", verdict, text, "a checkpoint needs 12 bytes a trained parameter, an export 2 more");
    vec![shared, speed, space]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::run_threads;

    #[test]
    fn a_shared_folder_passes_and_is_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("runs/new");
        for lines in run_threads(1, 3, |world| examine(&inside, 2 << 20, &world)) {
            assert_eq!(lines.len(), 3);
            assert!(lines[0].verdict == Verdict::Pass && lines[0].found.contains("on all ranks after 0."), "{lines:?}");
            assert!(lines[1].verdict != Verdict::Fail && lines[1].found.contains("slowest of 3"), "{lines:?}");
        }
        assert!(!inside.exists());
    }

    #[test]
    fn folders_that_are_not_the_same_fail() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for lines in run_threads(2, 1, |world| examine(folders[world.mesh.rank].path(), 1 << 20, &world)) {
            assert_eq!(lines[0].verdict, Verdict::Fail, "{lines:?}");
            assert!(lines[0].found.starts_with("rank 1: rank 0's file is not there: No such file"), "{lines:?}");
        }
    }

    #[test]
    fn a_place_where_nothing_can_be_written_fails() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let inside = folder.path().join("file/runs");
        for lines in run_threads(1, 1, |world| examine(&inside, 1 << 20, &world)) {
            assert!(lines[..2].iter().all(|line| line.verdict == Verdict::Fail), "{lines:?}");
        }
    }
}
