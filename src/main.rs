//! The `dunlearn` binary; everything is in the library.

fn main() -> std::process::ExitCode {
    dunlearn::cli::main()
}
