//! What ARCHITECTURE.md and README.md promise, held against the sources.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::program::dunlearn;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A source file of the library without comments and tests.
struct Source {
    room: String,
    path: PathBuf,
    code: String,
}

fn sources() -> Vec<Source> {
    let mut files = Vec::new();
    collect(&root().join("src"), &mut files);
    let mut sources: Vec<Source> = files
        .into_iter()
        .filter_map(|path| {
            let inside = path.strip_prefix(root().join("src")).unwrap().to_owned();
            let mut parts = inside.components();
            let room = parts.next()?.as_os_str().to_str()?.to_owned();
            parts.next()?; // main.rs and lib.rs are no rooms
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            let code = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
            Some(Source { room, path: inside, code })
        })
        .collect();
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|ext| ext == "rs") && !path.ends_with("tests.rs") {
            files.push(path);
        }
    }
}

/// The rooms from top to bottom, as ARCHITECTURE.md lists them.
fn rooms() -> Vec<String> {
    let text = read("ARCHITECTURE.md");
    let block = text.split("```rooms\n").nth(1).expect("a block of rooms").split("```").next().unwrap();
    block.lines().map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
}

/// `(room, imported room, file)` wherever a file names `crate::<room>`.
fn imports(sources: &[Source]) -> Vec<(&str, String, &Path)> {
    let mut found = Vec::new();
    for source in sources {
        for piece in source.code.split("crate::").skip(1) {
            let room: String = piece.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            if !room.is_empty() && room != source.room {
                found.push((source.room.as_str(), room, source.path.as_path()));
            }
        }
    }
    found
}

#[test]
fn rooms_import_only_from_rooms_below() {
    let (rooms, sources) = (rooms(), sources());
    let listed: BTreeSet<&str> = rooms.iter().map(String::as_str).collect();
    let present: BTreeSet<&str> = sources.iter().map(|source| source.room.as_str()).collect();
    assert_eq!(listed, present, "the rooms of ARCHITECTURE.md and the folders of src");
    let depth = |room: &str| rooms.iter().position(|name| name == room).unwrap_or_else(|| panic!("no room {room}"));
    let imports = imports(&sources);
    assert!(imports.len() > 50, "the search for imports finds next to nothing");
    for (room, imported, file) in &imports {
        assert!(depth(room) < depth(imported), "{}: {room} imports {imported}, which stands above it", file.display());
    }
    // rooms that stand below and are still none of a room's business
    for (room, stranger) in [
        ("unlearn", "dist"),
        ("unlearn", "model"),
        ("data", "dist"),
        ("data", "abi"),
        ("data", "kernels"),
        ("model", "data"),
        ("model", "config"),
        ("kernels", "dist"),
        ("kernels", "config"),
    ] {
        let guilty = imports.iter().find(|(from, to, _)| *from == room && to == stranger);
        assert!(guilty.is_none(), "{room} imports {stranger}: {guilty:?}");
    }
}

#[test]
fn each_room_keeps_to_its_means() {
    for Source { room, path, code } in sources() {
        let path = path.display();
        let only = |rooms: &[&str], words: &[&str]| {
            for word in words {
                assert!(
                    rooms.contains(&room.as_str()) || !code.contains(word),
                    "{path}: `{word}` belongs to {rooms:?}"
                );
            }
        };
        only(&["abi"], &["unsafe ", "extern \"C\""]);
        only(&["cli"], &["env::var", "std::env::args", "println!", "eprintln!", "print!(", "process::exit"]);
        only(&["abi", "dist", "cli"], &["mpi::"]);
        if room == "data" {
            assert!(!code.contains("tch::"), "{path}: data knows no tensors");
        }
    }
}

/// Every configuration in the repository is accepted, and no key in it is a mistake.
#[test]
fn configurations_are_valid() {
    let mut count = 0;
    let files = ["configs", "configs/methods"].map(|folder| std::fs::read_dir(root().join(folder)).unwrap());
    for path in files.into_iter().flatten().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        let done = dunlearn(&["config", "show", path.to_str().unwrap()]);
        assert!(done.success, "{}", done.text);
        count += 1;
    }
    assert!(count >= 37, "{count} configurations");
}

/// The README's configuration is accepted, its links lead somewhere, and CI runs its test command.
#[test]
fn the_readme_is_true() {
    let readme = read("README.md");
    let folder = tempfile::tempdir().unwrap();
    for (index, block) in readme.split("```toml\n").skip(1).enumerate() {
        let path = folder.path().join(format!("{index}.toml"));
        std::fs::write(&path, block.split("```").next().unwrap()).unwrap();
        let done = dunlearn(&["config", "show", path.to_str().unwrap()]);
        assert!(done.success, "{}", done.text);
    }
    for page in [
        "README.md",
        "ARCHITECTURE.md",
        "docs/methods.md",
        "docs/scopes.md",
        "docs/weights.md",
        "docs/evaluation.md",
        "docs/checkpoints.md",
        "docs/report.md",
        "docs/failures.md",
        "docs/performance.md",
        "docs/plan.md",
        "docs/gpu.md",
        "docs/generation.md",
        "docs/attacks.md",
        "docs/launch.md",
        "cluster/README.md",
    ] {
        let base = root().join(page);
        for link in read(page).split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            let there = link.starts_with("http") || base.parent().unwrap().join(link).exists();
            assert!(there, "{page}: {link} does not exist");
        }
    }
    for word in readme.split(|c: char| c.is_whitespace() || c == '`') {
        let path = word.trim_start_matches("./");
        if path.starts_with("launch/") || path.starts_with("configs/") {
            assert!(root().join(path).exists(), "README.md: {word} does not exist");
        }
    }
    let ci = read(".ci/run");
    assert!(readme.contains("./launch/test") && ci.lines().any(|line| line == "launch/test"), "{ci}");
}
