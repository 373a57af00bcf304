//! Tests of CUDA calls without a GPU: `fake_driver.c`, compiled against NVIDIA's own cuda.h, in place of the driver.

use std::process::Command;

use super::library;

const MARK: &str = "DUNLEARN_TEST_BEHIND_FAKE_DRIVER";

/// Whether this process was started by [`rerun_behind_fake_driver`].
pub fn is_behind_fake_driver() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs one test of this binary again in a process whose CUDA driver is the fake one, and panics when it fails there.
///
/// Gives false, with a line that says why, where cuda.h is not installed.
#[expect(clippy::print_stderr, reason = "a test that does not run says why")]
pub fn rerun_behind_fake_driver(test: &str) -> bool {
    tch::manual_seed(0); // loads libtorch
    let torch = library::folder_of("libtorch_cpu.so").unwrap();
    let headers = torch.join("../../nvidia/cu13/include");
    if !headers.join("cuda.h").exists() {
        eprintln!("skipped: no {}", headers.join("cuda.h").display());
        return false;
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, fake) = (folder.path().join("fake_driver.c"), folder.path().join("libcuda.so.1"));
    std::fs::write(&source, include_str!("fake_driver.c")).unwrap();
    let mut compile = Command::new("c++");
    compile.args(["-x", "c", "-std=c11", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I"]).arg(headers);
    let compiled = compile.arg(&source).arg("-o").arg(&fake).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", test, "--nocapture"]).env("LD_PRELOAD", &fake).env(MARK, "1");
    let done = again.output().unwrap();
    let text = [done.stdout, done.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(done.status.success() && text.contains("1 passed"), "{text}");
    true
}
