//! Looking at runs from outside: `doctor`, flight records, `status`, and the status over HTTP.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::{self, SHAPE, Workshop, dunlearn, mpirun};

const RUN: &str = r#"
[run]
dir = "{runs}/run"
timeout = 3
[model]
path = "{data}/model"
init = "random"
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
[method]
objective = "ga"
[train]
steps = 4
global_batch = 4
precision = "f32"
[optimizer]
lr = 1e-3
[checkpoint]
every = 1
async = false
[eval]
before = false
after = false
"#;

fn json(text: &str) -> Value {
    let start = text.find('{').unwrap_or_else(|| panic!("no JSON: {text}"));
    let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
    values.next().unwrap().unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// One rank alone and two under mpirun: everything is examined, nothing is left behind.
#[test]
fn the_doctor_examines_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs");
    let small = [runs.to_str().unwrap(), "--file-size", "1MiB", "--link-size", "256KiB", "--device", "cpu"];
    for ranks in [1, 2] {
        let arguments = [&["doctor"], &small[..], &["--json"]].concat();
        let done = if ranks == 1 { dunlearn(&arguments) } else { mpirun(ranks, &arguments) };
        assert!(done.success, "{}", done.text);
        let report = json(&done.text);
        let lines = report["lines"].as_array().unwrap();
        for check in [
            "ranks",
            "dunlearn",
            "libtorch",
            "MPI",
            "clocks",
            "limits",
            "/dev/shm",
            "shared folder",
            "disk",
            "all-reduce",
        ] {
            let line = lines.iter().find(|line| line["check"] == check);
            assert!(line.is_some_and(|line| line["verdict"] != "fail"), "{check}: {report}");
        }
        assert_eq!(report["ranks"].as_array().unwrap().len(), ranks);
        let links = report["links"].as_array().unwrap();
        assert_eq!(links.len(), if ranks == 1 { 0 } else { 2 }, "two sizes over one pair: {report}");
        assert!(links.iter().all(|link| link["right"] == true), "{report}");
    }
    let done = mpirun(2, &[&["doctor"], &small[..]].concat());
    assert!(done.success && done.text.contains("  pass  dunlearn") && done.text.contains(" 0 fail"), "{}", done.text);
    assert!(!runs.exists());
}

/// A folder that cannot be written to is found, and what to do is said.
#[test]
fn the_doctor_fails_where_nothing_can_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let inside = file.join("runs");
    let done = dunlearn(&["doctor", inside.to_str().unwrap(), "--file-size", "1MiB", "--device", "cpu"]);
    assert_eq!(done.code, Some(2), "{}", done.text);
    assert!(
        done.text.contains("FAIL  disk") && done.text.contains("-> checkpoints cannot be written"),
        "{}",
        done.text
    );
}

/// The rank that hangs and the collective that it never came to are named, at once and afterwards.
#[test]
fn flight_records_name_rank_and_collective() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let run = workshop.path("run").display().to_string();
    let refused = dunlearn(&["doctor", "flight", &run]);
    assert_eq!(refused.code, Some(2), "{}", refused.text);

    let done = mpirun(3, &["--config", &config, "--fault", "hang@step:1"]);
    assert_eq!(done.code, Some(102), "{}", done.text);
    assert!(done.text.contains("step 2: no answer to ") && done.text.contains("(deadline 3 s"), "{}", done.text);
    assert!(done.text.contains("rank 1 has not come to ") && done.text.contains(", src/"), "{}", done.text);
    let told = dunlearn(&["doctor", "flight", &run]);
    assert_eq!(told.code, Some(1), "{}", told.text);
    for expected in ["first to fail: rank ", "rank 1 has not come to ", "ranks [0, 2] wait there", "(in no collective)"]
    {
        assert!(told.text.contains(expected), "{expected}: {}", told.text);
    }
    let told = json(&dunlearn(&["doctor", "flight", &run, "--json"]).text);
    assert_eq!((&told["parting"]["kind"], &told["parting"]["missing"]), (&"behind".into(), &serde_json::json!([1])));
    // and the status says that it failed, and why
    let status = dunlearn(&["status", &run]);
    assert_eq!(status.code, Some(1), "{}", status.text);
    assert!(status.text.contains("dunlearn doctor flight"), "{}", status.text);
}

/// A run as it is seen from outside: at work, asked for its records, finished; and one whose processes were killed.
#[test]
fn the_status_follows_a_run() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let run = workshop.path("run");
    let of = |extra: &[&str]| dunlearn(&[&["status", run.to_str().unwrap()], extra].concat());
    assert_eq!(of(&[]).code, Some(2), "no run yet");

    // rank 1 never comes back from the second step
    let arguments = ["--config", &config, "--fault", "hang@step:1", "--set", "run.timeout=600", "--status-addr", "0"];
    let mut job = Killed(program::mpirun_command(2, &arguments).stderr(Stdio::null()).spawn().unwrap());
    within(60, "a step and a checkpoint", || {
        let status = of(&["--json"]);
        status.success && {
            let status = json(&status.text);
            status["step"] == 1 && status["checkpoint"]["step"].is_u64() && status["phase"] == "step 2"
        }
    });
    let told = of(&[]);
    assert!(
        told.success && told.text.contains("running: step 2 for ") && told.text.contains("1 of 4 (25 %)"),
        "{}",
        told.text
    );
    let status = json(&of(&["--json"]).text);
    assert_eq!((&status["alive"], &status["ranks"]), (&true.into(), &2.into()), "{status}");
    let address = status["address"].as_str().unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    assert_eq!(json(get(address, "/status.json").split("\r\n\r\n").nth(1).unwrap())["step"], 1);
    assert!(get(address, "/metrics").contains("\ndunlearn_step 1\n"));

    // asked for, by file and by signal, while the run goes on
    std::fs::write(run.join("DUMP"), "").unwrap();
    let records = || ["rank_00000.json", "rank_00001.json"].map(|name| run.join("flight").join(name));
    within(20, "records of both ranks", || records().iter().all(|path| path.exists()));
    records().iter().for_each(|path| std::fs::remove_file(path).unwrap());
    let pid = status["pid"].as_u64().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-USR2", &pid]).status().unwrap().success());
    within(20, "the record of the rank that got the signal", || records()[0].exists());
    let record = json(&std::fs::read_to_string(&records()[0]).unwrap());
    assert_eq!((&record["reason"], &record["asked"]), (&"SIGUSR2 came".into(), &true.into()));
    assert!(
        record["waiting"]["what"].as_str().unwrap().contains(" of world [0, 1] (")
            || record["waiting"]["what"].as_str().unwrap().contains(" of dp [0, 1] ("),
        "{record}"
    );

    // killed outright: nobody could write a last word
    for rank in ranks_of(&config) {
        let _ = std::process::Command::new("kill").args(["-KILL", &rank]).status();
    }
    job.0.wait().unwrap();
    let dead = of(&[]);
    assert!(dead.code == Some(1) && dead.text.contains("dead: no sign of life"), "{}", dead.text);

    let done = dunlearn(&["--config", &config, "--overwrite"]);
    assert!(done.success, "{}", done.text);
    let finished = of(&[]);
    assert!(
        finished.success && finished.text.contains("finished") && finished.text.contains("4 of 4"),
        "{}",
        finished.text
    );
    assert!(!run.join("flight").exists(), "a run that ends well leaves no records");
}

/// Ends the job however the test ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(address: &str, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Process numbers of the ranks that run this configuration.
fn ranks_of(config: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let ours = |path: &Path| {
        let line = std::fs::read_to_string(path.join("cmdline")).unwrap_or_default();
        line.starts_with(env!("CARGO_BIN_EXE_dunlearn")) && line.contains(config)
    };
    let found = processes.filter(|process| ours(&process.path()));
    found.filter_map(|process| process.file_name().into_string().ok()).collect()
}

fn within(seconds: u64, what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(seconds), "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
