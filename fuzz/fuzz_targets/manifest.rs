//! Manifests from anywhere, signed as if they were right.
#![no_main]

use dunlearn::checkpoint::Saved;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let folder = std::env::temp_dir().join(format!("dunlearn-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    std::fs::write(folder.join("manifest.json"), data).expect("a temporary file");
    std::fs::write(folder.join("COMPLETE"), blake3::hash(data).to_hex().to_string()).expect("a temporary file");
    let read = Saved::open(&folder).and_then(|saved| {
        for file in &saved.manifest.files {
            let path = folder.join(&file.name);
            assert_eq!(path.parent(), Some(folder.as_path()), "a name that leads out of the folder");
        }
        saved.verify(0, 1)?;
        saved.state()?.check_coverage()
    });
    if let Err(error) = read {
        assert!(error.to_string().contains(folder.to_str().expect("a plain name")), "a message without the file: {error}");
    }
});
