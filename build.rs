//! Run paths: the binary finds libtorch and libmpi where it was linked, whatever LD_LIBRARY_PATH says.
//!
//! torch-sys and mpi-sys pass `-L` and `-l` but no run path, and the soname of Open MPI 4 and 5 is the same: without a run
//! path a system Open MPI would silently take the place of the one that was built against.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=MPICC");
    let torch = std::env::var_os("LIBTORCH").map(|dir| PathBuf::from(dir).join("lib"));
    if let Some(lib) = torch.and_then(|lib| lib.canonicalize().ok()) {
        run_path(&lib.display().to_string());
    }
    if std::env::var_os("CARGO_FEATURE_MPI").is_some() {
        let mpicc = std::env::var("MPICC").unwrap_or_else(|_| "mpicc".to_owned());
        match Command::new(&mpicc).arg("-show").output() {
            Ok(output) if output.status.success() => {
                for word in String::from_utf8_lossy(&output.stdout).split_whitespace() {
                    if let Some(dir) = word.strip_prefix("-L") {
                        run_path(dir);
                    }
                }
            }
            _ => println!("cargo:warning=`{mpicc} -show` does not run; run launch/setup or set MPICC"),
        }
    }
}

fn run_path(dir: &str) {
    println!("cargo:rustc-link-arg=-Wl,-rpath,{dir}");
}
