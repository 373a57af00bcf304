//! Runs of the binary itself, alone and under mpirun.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Authors, questions and layers of the smallest workshop that shows everything: options of `dunlearn data synth`.
pub const SHAPE: &[&str] = &[
    "--authors",
    "5",
    "--questions",
    "4",
    "--vocab",
    "400",
    "--hidden",
    "32",
    "--layers",
    "2",
    "--intermediate",
    "64",
];

/// A folder with fictional authors, a model that knows them, and room for runs.
pub struct Workshop {
    folder: TempDir,
}

/// What a finished process left.
pub struct Finished {
    pub success: bool,
    pub code: Option<i32>,
    pub text: String,
    pub seconds: f64,
}

/// No test waits longer for a process.
const PATIENCE: Duration = Duration::from_secs(240);

impl Workshop {
    /// Data of `authors` fictional authors with `extra` arguments of `data synth`.
    pub fn new(extra: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let out = out.to_str().unwrap();
        let done = dunlearn(&[&["data", "synth", "--out", out][..], extra].concat());
        assert!(done.success, "{}", done.text);
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a configuration whose `{data}` and `{runs}` stand for this workshop's folders.
    pub fn config(&self, name: &str, text: &str) -> String {
        let folder = self.folder.path().display().to_string();
        let text = text.replace("{data}", &format!("{folder}/data")).replace("{runs}", &folder);
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    pub fn summary(&self, run: &str) -> Value {
        let path = self.path(run).join("summary.json");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap()
    }

    /// Lines of a run's metrics; the first says what ran.
    pub fn metrics(&self, run: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Those of the metrics that tell of a step.
    pub fn steps(&self, run: &str) -> Vec<Value> {
        self.metrics(run).into_iter().filter(|line| !line["loss"].is_null()).collect()
    }
}

/// The number at `path` such as `forget.before.probability`.
pub fn number(json: &Value, path: &str) -> f64 {
    let found = path.split('.').fold(json, |at, key| &at[key]);
    found.as_f64().unwrap_or_else(|| panic!("{path} is {found}"))
}

/// Runs the binary alone.
pub fn dunlearn(arguments: &[&str]) -> Finished {
    finish(Command::new(env!("CARGO_BIN_EXE_dunlearn")).args(arguments))
}

/// Runs the binary on `ranks` ranks through the repository's own mpirun script.
///
/// On a crowded machine mpirun itself, before it has started anything, fails now and then; then it is asked again.
pub fn mpirun(ranks: usize, arguments: &[&str]) -> Finished {
    let done = finish(&mut mpirun_command(ranks, arguments));
    let not_started = "The PMIx server's listener thread failed to start";
    if done.text.contains(not_started) { finish(&mut mpirun_command(ranks, arguments)) } else { done }
}

pub fn mpirun_command(ranks: usize, arguments: &[&str]) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/mpirun");
    let mut command = Command::new(script);
    command.args(["-n", &ranks.to_string(), env!("CARGO_BIN_EXE_dunlearn")]).args(arguments);
    command
}

/// Runs the binary on `ranks` ranks that meet over TCP, as torchrun starts them; what each left, in rank order.
pub fn meeting(ranks: usize, arguments: &[&str]) -> Vec<Finished> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..ranks)
            .map(|rank| {
                let mut command = Command::new(env!("CARGO_BIN_EXE_dunlearn"));
                let facts = [("RANK", rank), ("WORLD_SIZE", ranks)].map(|(name, value)| (name, value.to_string()));
                command.args(arguments).envs(facts).envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)]);
                scope.spawn(move || finish(&mut command))
            })
            .collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub fn finish(command: &mut Command) -> Finished {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (out, err) = (read(child.stdout.take().unwrap()), read(child.stderr.take().unwrap()));
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("no end after {PATIENCE:?}: {command:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = [out.join().unwrap(), err.join().unwrap()].concat();
    Finished {
        success: status.success(),
        code: status.code(),
        text: String::from_utf8_lossy(&text).into_owned(),
        seconds: start.elapsed().as_secs_f64(),
    }
}

/// Reads a pipe to its end on a thread of its own, so that a full pipe stops nobody.
fn read(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}
