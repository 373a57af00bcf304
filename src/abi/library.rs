//! Shared libraries that are opened at run time, so that one binary runs with and without them.

use std::ffi::c_void;
use std::path::{Path, PathBuf};

/// Why a library or one of its functions is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("cannot open {library}: {reasons}")]
    Open { library: String, reasons: String },
    #[error("{library} has no function {symbol}: {reason}")]
    Symbol { library: String, symbol: String, reason: String },
}

/// A library that stays open as long as this lives.
pub struct Library {
    name: String,
    handle: libloading::Library,
}

impl Library {
    /// Opens the first candidate that the loader accepts; a bare file name is searched as the loader does.
    ///
    /// The libraries opened here are the vendor's own (CUDA) or made by the tests: their initialisers are trusted.
    pub fn open(candidates: &[PathBuf]) -> Result<Self, Error> {
        let (mut reasons, mut absent) = (Vec::new(), Vec::new());
        for candidate in candidates {
            if candidate.is_absolute() && !candidate.exists() {
                absent.push(candidate.display().to_string());
                continue;
            }
            // SAFETY: loading runs the library's initialisers; see above.
            match unsafe { libloading::Library::new(candidate) } {
                Ok(handle) => return Ok(Self { name: candidate.display().to_string(), handle }),
                Err(error) => {
                    let reason = reason(&error);
                    if !reasons.contains(&reason) {
                        reasons.push(reason);
                    }
                }
            }
        }
        let library = candidates.first().map_or_else(String::new, |path| path.display().to_string());
        if !absent.is_empty() {
            let words = if reasons.is_empty() { "there is no" } else { "nor is there" };
            reasons.push(format!("{words} {}", absent.join(", ")));
        }
        Err(Error::Open { library, reasons: reasons.join("; ") })
    }

    /// Opens a library for everybody in this process (`RTLD_GLOBAL`), with all its functions resolved now.
    pub fn open_global(path: &Path) -> Result<Self, Error> {
        use libloading::os::unix;
        // SAFETY: loading runs the library's initialisers; see `open`.
        match unsafe { unix::Library::open(Some(path), unix::RTLD_NOW | unix::RTLD_GLOBAL) } {
            Ok(handle) => Ok(Self { name: path.display().to_string(), handle: handle.into() }),
            Err(error) => Err(Error::Open { library: path.display().to_string(), reasons: reason(&error) }),
        }
    }

    /// File name that was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A function of this library.
    ///
    /// SAFETY: `F` is a function pointer of the symbol's true signature, and is not called after the library is closed.
    pub(super) unsafe fn function<F: Copy>(&self, symbol: &str) -> Result<F, Error> {
        // SAFETY: the caller vouches for the type.
        let found = unsafe { self.handle.get::<F>(symbol) };
        found.map(|function| *function).map_err(|error| Error::Symbol {
            library: self.name.clone(),
            symbol: symbol.to_owned(),
            reason: reason(&error),
        })
    }
}

/// The loader's own words, which the crate keeps as the source of its error.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// A function of any library that is loaded for everybody in this process (`RTLD_GLOBAL`).
///
/// SAFETY: `F` is a function pointer of the symbol's true signature.
pub(super) unsafe fn loaded_function<F: Copy>(symbol: &str) -> Result<F, Error> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>(), "a function pointer") };
    let name = std::ffi::CString::new(symbol).expect("invariant: no zero byte in a symbol's name");
    // SAFETY: dlsym only looks the name up.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    if address.is_null() {
        return Err(Error::Symbol {
            library: "this process".to_owned(),
            symbol: symbol.to_owned(),
            reason: "not in any library that is loaded".to_owned(),
        });
    }
    // SAFETY: not null, of a pointer's size, and of the caller's type.
    Ok(unsafe { std::mem::transmute_copy::<*mut c_void, F>(&address) })
}

/// The folder of a library that this process has loaded, by the start of its file name.
pub fn folder_of(file: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let path = Path::new(&line[line.find('/')?..]);
        let name = path.file_name()?.to_str()?;
        (name.starts_with(file)).then(|| path.parent().map(Path::to_owned))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let error = Library::open(&["libnowhere.so.7".into(), "/nowhere/libnowhere.so".into()]).err().unwrap();
        let text = error.to_string();
        assert!(text.contains("libnowhere.so.7") && text.contains("/nowhere/libnowhere.so"), "{text}");
        let math = Library::open(&["libm.so.6".into()]).unwrap();
        // SAFETY: cos of the C library; the second symbol does not exist.
        unsafe {
            let cos = math.function::<extern "C" fn(f64) -> f64>("cos").unwrap();
            assert_eq!(cos(0.0), 1.0);
            let error = math.function::<extern "C" fn()>("no_such_function").err().unwrap();
            assert!(error.to_string().contains("libm.so.6 has no function no_such_function"), "{error}");
            assert!(loaded_function::<extern "C" fn()>("no_such_function").is_err());
            let abs = loaded_function::<extern "C" fn(i32) -> i32>("abs").unwrap();
            assert_eq!(abs(-3), 3);
        }
    }

    #[test]
    fn torch_is_found_where_it_was_loaded() {
        tch::manual_seed(0);
        assert!(folder_of("libtorch_cpu.so").unwrap().join("libtorch_cpu.so").exists());
        assert_eq!(folder_of("libnowhere"), None);
    }
}
