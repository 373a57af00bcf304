//! NVIDIA's run-time compiler (`libnvrtc`), opened when kernels are to be compiled.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;

use super::library::{self, Library};

/// Why kernels cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("no run-time compiler for CUDA: {0}; `launch/setup` installs one (nvidia-cuda-nvrtc)")]
    Missing(#[from] library::Error),
    #[error("NVRTC {major}.{minor} compiles for no device as old as compute capability {}.{}", .capability.0, .capability.1)]
    TooOld { major: i32, minor: i32, capability: (u32, u32) },
    #[error("{call}: {text}")]
    Call { call: &'static str, text: String },
    #[error("the CUDA kernels do not compile for {architecture}:\n{log}")]
    Source { architecture: String, log: String },
}

type Result<T> = std::result::Result<T, Error>;
type Program = *mut std::ffi::c_void;

/// Kernels for one architecture.
#[derive(Clone, Debug)]
pub struct Image {
    /// `sm_90` for machine code, `compute_90` for code that the driver translates.
    pub architecture: String,
    /// A cubin, or PTX text that ends with a zero.
    pub bytes: Vec<u8>,
    /// Name in the image of each name that was asked for.
    pub names: HashMap<String, String>,
    /// What the compiler had to say, warnings and resource usage.
    pub log: String,
}

/// The compiler.
pub struct Nvrtc {
    library: Library,
    /// Its built-in functions, which it looks for by name among the libraries that are loaded.
    _builtins: Option<Library>,
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    num_architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    add_name: unsafe extern "C" fn(Program, *const c_char) -> c_int,
    lowered_name: unsafe extern "C" fn(Program, *const c_char, *mut *const c_char) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log: Output,
    cubin: Output,
    ptx: Output,
}

/// A pair of functions: size of an output, and the output.
type Output = (unsafe extern "C" fn(Program, *mut usize) -> c_int, unsafe extern "C" fn(Program, *mut c_char) -> c_int);

/// Where the compiler may be: by its name, then where the NVIDIA packages beside libtorch put it.
pub fn candidates() -> Vec<PathBuf> {
    let names = ["libnvrtc.so.13", "libnvrtc.so.12"];
    let mut found: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    if let Some(lib) = library::folder_of("libtorch_cpu.so") {
        let packages = lib.ancestors().nth(2).unwrap_or(&lib);
        for folder in [packages.join("nvidia/cu13/lib"), packages.join("nvidia/cuda_nvrtc/lib"), lib.clone()] {
            found.extend(names.iter().map(|name| folder.join(name)));
        }
    }
    found
}

/// A program that is destroyed on drop.
struct Guard<'a>(&'a Nvrtc, Program);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created by this library and is not used again.
        unsafe { (self.0.destroy)(&raw mut self.1) };
    }
}

impl Nvrtc {
    /// Opens the first of `candidates` that loads.
    pub fn open(candidates: &[PathBuf]) -> Result<Self> {
        let library = Library::open(candidates)?;
        let builtins = library::folder_of("libnvrtc.so").and_then(|folder| {
            let beside = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
            let named = |path: &PathBuf| {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                name.starts_with("libnvrtc-builtins.so")
            };
            Library::open(&beside.filter(named).collect::<Vec<_>>()).ok()
        });
        // SAFETY: the signatures are those of nvrtc.h; the library lives as long as its functions.
        unsafe {
            Ok(Self {
                version: library.function("nvrtcVersion")?,
                error: library.function("nvrtcGetErrorString")?,
                num_architectures: library.function("nvrtcGetNumSupportedArchs")?,
                architectures: library.function("nvrtcGetSupportedArchs")?,
                create: library.function("nvrtcCreateProgram")?,
                destroy: library.function("nvrtcDestroyProgram")?,
                add_name: library.function("nvrtcAddNameExpression")?,
                lowered_name: library.function("nvrtcGetLoweredName")?,
                compile: library.function("nvrtcCompileProgram")?,
                log: (library.function("nvrtcGetProgramLogSize")?, library.function("nvrtcGetProgramLog")?),
                cubin: (library.function("nvrtcGetCUBINSize")?, library.function("nvrtcGetCUBIN")?),
                ptx: (library.function("nvrtcGetPTXSize")?, library.function("nvrtcGetPTX")?),
                library,
                _builtins: builtins,
            })
        }
    }

    /// The file that was opened and its version.
    pub fn describe(&self) -> String {
        let (major, minor) = self.version();
        format!("{} {major}.{minor}", self.library.name())
    }

    fn version(&self) -> (i32, i32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two out parameters.
        unsafe { (self.version)(&raw mut major, &raw mut minor) };
        (major, minor)
    }

    /// `sm_XX` where this compiler knows the device, else the newest `compute_XX` that the device understands.
    fn architecture(&self, capability: (u32, u32)) -> Result<String> {
        let mut count = 0;
        // SAFETY: one out parameter.
        self.check("nvrtcGetNumSupportedArchs", unsafe { (self.num_architectures)(&raw mut count) })?;
        let mut known = vec![0; count.max(0) as usize];
        // SAFETY: the list has the length that was asked for.
        self.check("nvrtcGetSupportedArchs", unsafe { (self.architectures)(known.as_mut_ptr()) })?;
        let wanted = (capability.0 * 10 + capability.1) as c_int;
        if known.contains(&wanted) {
            return Ok(format!("sm_{wanted}"));
        }
        let (major, minor) = self.version();
        let older = known.into_iter().filter(|&arch| arch < wanted).max();
        older.map(|arch| format!("compute_{arch}")).ok_or(Error::TooOld { major, minor, capability })
    }

    /// Compiles CUDA C++ for a device of this compute capability.
    ///
    /// `names`: kernels that the image must hold, templates with their arguments (`scale<float>`); `options`: further ones
    /// for the compiler.
    pub fn compile(&self, source: &str, names: &[String], capability: (u32, u32), options: &[&str]) -> Result<Image> {
        let architecture = self.architecture(capability)?;
        let source = c_string("the source", source)?;
        let expressions: Vec<CString> = names.iter().map(|name| c_string("a name", name)).collect::<Result<_>>()?;
        let mut program = std::ptr::null_mut();
        // SAFETY: zero-terminated texts and no headers; the result is ours to destroy.
        let code = unsafe {
            let (text, name) = (source.as_ptr(), c"dunlearn.cu".as_ptr());
            (self.create)(&raw mut program, text, name, 0, std::ptr::null(), std::ptr::null())
        };
        self.check("nvrtcCreateProgram", code)?;
        let program = Guard(self, program);
        for name in &expressions {
            // SAFETY: a live program and a zero-terminated text.
            self.check("nvrtcAddNameExpression", unsafe { (self.add_name)(program.1, name.as_ptr()) })?;
        }
        let architecture_option = format!("--gpu-architecture={architecture}");
        let options: Vec<CString> = [architecture_option.as_str(), "--std=c++17"]
            .iter()
            .chain(options)
            .map(|option| c_string("an option", option))
            .collect::<Result<_>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: as many options as said, alive during the call.
        let code = unsafe { (self.compile)(program.1, pointers.len() as c_int, pointers.as_ptr()) };
        let log = self.output("nvrtcGetProgramLog", self.log, program.1).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
        if code != 0 {
            return Err(Error::Source { architecture, log: if log.is_empty() { self.text(code) } else { log } });
        }
        let machine_code = architecture.starts_with("sm_");
        let bytes = if machine_code {
            self.output("nvrtcGetCUBIN", self.cubin, program.1)?
        } else {
            self.output("nvrtcGetPTX", self.ptx, program.1)?
        };
        let mut lowered = HashMap::new();
        for (name, expression) in names.iter().zip(&expressions) {
            let mut text = std::ptr::null();
            // SAFETY: the program is compiled and the name was added; the text belongs to the program, alive here.
            unsafe {
                let code = (self.lowered_name)(program.1, expression.as_ptr(), &raw mut text);
                self.check("nvrtcGetLoweredName", code)?;
                lowered.insert(name.clone(), CStr::from_ptr(text).to_string_lossy().into_owned());
            }
        }
        Ok(Image { architecture, bytes, names: lowered, log })
    }

    fn output(&self, call: &'static str, (size, get): Output, program: Program) -> Result<Vec<u8>> {
        let mut len = 0;
        // SAFETY: a live program, one out parameter.
        self.check(call, unsafe { size(program, &raw mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: the buffer has the size that was asked for.
        self.check(call, unsafe { get(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(Error::Call { call, text: self.text(code) }) }
    }

    fn text(&self, code: c_int) -> String {
        // SAFETY: the library answers every code with a constant text.
        unsafe { CStr::from_ptr((self.error)(code)) }.to_string_lossy().into_owned()
    }
}

fn c_string(what: &'static str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Call { call: "nvrtc", text: format!("{what} holds a zero byte") })
}
