//! State files from anywhere: a header that is text, of the right length, and 4 KiB of zeros; or the bytes as they are.
#![no_main]

use std::path::PathBuf;

use dunlearn::checkpoint::state::StateFiles;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&form, rest)) = data.split_first() else { return };
    let bytes = match form {
        // what the parser of headers has to say
        b'#' => rest.to_vec(),
        _ => [&(data.len() as u64).to_le_bytes()[..], data, &[0; 4096]].concat(),
    };
    let path = place("state.safetensors");
    std::fs::write(&path, bytes).expect("a temporary file");
    let read = StateFiles::open([path.as_path()]).and_then(|files| {
        files.check_coverage()?;
        files.tensors().into_iter().try_for_each(|(name, shape)| files.weights(name, shape).map(drop))
    });
    if let Err(error) = read {
        assert!(error.to_string().contains("state.safetensors"), "a message without the file: {error}");
    }
});

fn place(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("dunlearn-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    folder.join(name)
}
