//! `dunlearn launch` as a user meets it: what it would start, what it refuses, and runs that are interrupted on purpose.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::{Finished, SHAPE, Workshop, dunlearn, finish, mpirun};

const RUN: &str = r#"
[run]
dir = "{runs}/run"
timeout = 20
[model]
path = "{data}/model"
init = "random"
[parallel]
tp = 2
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[method]
objective = "npo"
retain = "nll"
[train]
steps = 8
global_batch = 4
precision = "f32"
[optimizer]
lr = 1e-3
[checkpoint]
every = 2
[eval]
before = false
after = false
"#;

/// `dunlearn launch`, without what this machine's own environment would add.
fn command(before: &[&str], run: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dunlearn"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("SLURM_") || name.starts_with("OMP_")) {
        command.env_remove(name);
    }
    command.env_remove("GOMP_SPINCOUNT").arg("launch").args(before).arg("--").args(run);
    command
}

fn launch(before: &[&str], run: &[&str]) -> Finished {
    finish(&mut command(before, run))
}

/// The same with an end that does not depend on what runs beside it.
fn with_words(workshop: &Workshop, text: &str) -> String {
    let folder = workshop.path("").display().to_string();
    text.replace(folder.trim_end_matches('/'), "W").replace(env!("CARGO_BIN_EXE_dunlearn"), "dunlearn")
}

fn events(workshop: &Workshop, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(workshop.path(run).join("launch.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn dir(workshop: &Workshop, run: &str) -> String {
    format!("run.dir={}", workshop.path(run).display())
}

fn weights(workshop: &Workshop, run: &str) -> Vec<u8> {
    std::fs::read(workshop.path(run).join("model/model.safetensors")).unwrap()
}

/// What would be started, word for word.
#[test]
fn a_dry_run_prints_the_command() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let printed = |before: &[&str], slurm: &[(&str, &str)]| {
        let mut command = command(&[before, &["--dry-run", "--program", "mpirun"]].concat(), &["--config", &config]);
        let done = finish(command.envs(slurm.iter().copied()));
        assert!(done.success, "{}", done.text);
        with_words(&workshop, &done.text)
    };
    let head = "\
OMPI_MCA_mpi_yield_when_idle=1 \\
OMPI_ALLOW_RUN_AS_ROOT=1 \\
OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \\
PRTE_MCA_oob_tcp_keepalive_time=10 \\
PRTE_MCA_oob_tcp_keepalive_intvl=2 \\
PRTE_MCA_oob_tcp_keepalive_probes=3 \\
GOMP_SPINCOUNT=10000 \\
DUNLEARN_BIND=core \\
DUNLEARN_LAUNCH=W/run/launch/START \\
";
    let tail = "-x GOMP_SPINCOUNT -x DUNLEARN_BIND -x DUNLEARN_LAUNCH dunlearn --config W/run.toml\n";
    assert_eq!(printed(&["--np", "4"], &[]), format!("{head}mpirun -n 4 --oversubscribe --bind-to none {tail}"));
    assert_eq!(
        printed(&["--hosts", "n[1-2]:4", "--output", "ranks"], &[]),
        format!("{head}mpirun -n 8 --host n1:4,n2:4 --bind-to none --output tag {tail}")
    );
    std::fs::write(workshop.path("hosts"), "a slots=2\nb slots=1 # small\nc:1\n").unwrap();
    let file = workshop.path("hosts").display().to_string();
    assert_eq!(
        printed(&["--hostfile", &file], &[]),
        format!("{head}mpirun -n 4 --host a:2,b:1,c:1 --bind-to none {tail}")
    );
    let slurm = [("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "n[1-2]"), ("SLURM_TASKS_PER_NODE", "2(x2)")];
    assert_eq!(printed(&[], &slurm), format!("{head}mpirun -n 4 --bind-to none {tail}"));
    let srun = printed(&["--engine", "srun"], &slurm);
    let last = srun.lines().last().unwrap();
    assert_eq!(
        last,
        "mpirun --ntasks=4 --ntasks-per-node=2 --mpi=pmix --cpu-bind=none --kill-on-bad-exit=1 --export=ALL dunlearn --config W/run.toml"
    );
    assert!(srun.contains("SLURM_PMIX_FENCE=ring \\\nOPAL_PREFIX="), "{srun}");
    // a variable with blanks, and arguments for the engine
    let more = printed(&["--np", "2", "--env", "A=b c", "--engine-arg=--timeout", "--engine-arg=60"], &[]);
    assert!(more.contains("A='b c' \\\n") && more.contains("-x A -x DUNLEARN_LAUNCH --timeout 60 dunlearn"), "{more}");
    assert!(!workshop.path("run").exists(), "a dry run writes nothing");
}

/// The batch script, line for line where it is filled in.
#[test]
fn a_dry_run_prints_the_batch_script() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let options = [
        "--slurm",
        "--nodes",
        "2",
        "--np",
        "4",
        "--time",
        "1:00:00",
        "--sbatch=--partition=gpu",
        "--max-restarts",
        "3",
    ];
    let done = launch(&[&options[..], &["--dry-run"]].concat(), &["--config", &config]);
    assert!(done.success, "{}", done.text);
    let text = with_words(&workshop, &done.text);
    let template =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/slurm/run.sbatch")).unwrap();
    let (known, new): (Vec<&str>, Vec<&str>) =
        text.lines().partition(|line| template.lines().any(|known| known == *line));
    assert_eq!(
        new,
        [
            "# W/run/launch.sbatch",
            "#SBATCH --job-name=run",
            "#SBATCH --nodes=2",
            "#SBATCH --ntasks-per-node=2",
            "#SBATCH --time=1:00:00",
            "#SBATCH --output=W/run/slurm-%j.out",
            "#SBATCH --partition=gpu",
            "DUNLEARN=dunlearn",
            "set -- --np 4 --max-restarts 3 --backoff 10 --keepalive 10 -- --config W/run.toml",
            "sbatch W/run/launch.sbatch",
        ]
    );
    assert!(known.len() + 5 >= template.lines().count(), "{text}");
    // what is filled in lies between the shell's own lines
    let place = |word: &str| text.find(word).unwrap_or_else(|| panic!("{word}: {text}"));
    assert!(
        place("#SBATCH --partition=gpu") < place("set -uo") && place("set -- --np") < place("\"$DUNLEARN\" launch")
    );
}

/// Layouts and hosts that cannot be, before anything starts.
#[test]
fn impossible_launches_are_refused() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    for (before, set, expected) in [
        (&["--np", "3"][..], "parallel.tp=2", "parallel.tp = 2 does not divide 3 ranks; take --np 2"),
        (&["--np", "8", "--hosts", "a:2,b:2"], "parallel.tp=2", "8 ranks are more than the 4 slots of a:2,b:2"),
        (&["--np", "4"], "parallel.dp=3", "parallel.tp = 2 x parallel.dp = 3 needs 6 ranks, not 4"),
        (&["--np", "3"], "parallel.tp=3", "3"),
        (&[], "parallel.tp=2", "how many ranks?"),
        (&["--hosts", "a:2,a:2"], "parallel.tp=2", "--hosts: a is there twice"),
        (&["--hosts", "a:x"], "parallel.tp=2", "\"x\" is no number of slots"),
        (&["--hostfile", "nowhere"], "parallel.tp=2", "--hostfile nowhere: No such file"),
        (&["--np", "2", "--engine", "srun"], "parallel.tp=2", "--engine srun needs a Slurm job"),
        (&["--np", "3", "--slurm", "--nodes", "2"], "parallel.tp=3", "3"),
        (&["--np", "2", "--min-nodes", "2"], "parallel.tp=2", "--min-nodes is more than the 1 hosts"),
        (&["--np", "2"], "train.setps=2", "did you mean"),
    ] {
        let done = launch(before, &["--config", &config, "--set", set]);
        assert_eq!(done.code, Some(2), "{before:?} {set}: {}", done.text);
        assert!(done.text.contains(expected), "{before:?} {set}: {}", done.text);
        assert!(!workshop.path("run").exists(), "{before:?}: something was started");
    }
    let done = launch(&["--np", "2"], &["methods"]);
    assert!(done.text.contains("other verbs run under mpirun itself"), "{}", done.text);
}

/// A rank that is killed, and a deadline: started again, to the bits of an undisturbed run by hand. Mistakes: not started again.
#[test]
fn what_a_retry_can_cure_is_started_again() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let whole = dir(&workshop, "whole");
    let done = mpirun(2, &["--config", &config, "--set", &whole]);
    assert!(done.success, "{}", done.text);

    let again = ["--np", "2", "--max-restarts", "1", "--backoff", "0.1"];
    // the second start has its fault at the same place: the first one leaves a checkpoint after step 2, the fault comes before step
    // FIRST + 2
    for (name, fault, words) in
        [("killed", "kill@export:0", "a rank was killed by signal"), ("panics", "panic@export:1", "injected panic")]
    {
        let run = dir(&workshop, name);
        let done = launch(&again, &["--config", &config, "--set", &run, "--fault", fault]);
        assert!(!done.success && done.text.contains("restart 1 of 1"), "{fault}: {}", done.text);
        let all = events(&workshop, name);
        let kinds: Vec<&str> = all.iter().map(|event| event["event"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["start", "end", "start", "end"], "{fault}");
        assert!(all[1]["message"].as_str().unwrap().contains(words), "{fault}: {}", all[1]);
        // without the fault the same launch goes on from the checkpoint
        let done = launch(&again, &["--config", &config, "--set", &run]);
        assert!(done.success && done.text.contains("going on after step 6"), "{}", done.text);
        assert_eq!(weights(&workshop, name), weights(&workshop, "whole"), "{fault}");
        assert_eq!(workshop.summary(name)["launch"], events(&workshop, name)[4]["launch"]);
    }

    let run = dir(&workshop, "refused");
    let done = launch(&again, &["--config", &config, "--set", &run, "--fault", "error@load:1"]);
    assert_eq!(done.code, Some(2), "{}", done.text);
    assert!(done.text.contains("starting again would change nothing"), "{}", done.text);
    let end = &events(&workshop, "refused")[1];
    assert_eq!((&end["verdict"], &end["ranks_that_spoke"][0]["rank"]), (&Value::from("hopeless"), &Value::from(1)));
    assert!(!workshop.path("refused/launch").exists(), "notes are cleared away");
}

/// A signal may come at any time, before the ranks are up too.
#[test]
fn an_early_signal_saves_and_stops() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let run = dir(&workshop, "early");
    for wait in [Duration::from_millis(300), Duration::from_millis(30)] {
        let mut child = command(&["--np", "2"], &["--config", &config, "--set", &run, "--set", "train.steps=2000"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let journal = workshop.path("early/launch.jsonl");
        let start = Instant::now();
        let started = |text: String| text.lines().last().is_some_and(|line| line.contains("\"event\":\"start\""));
        while !std::fs::read_to_string(&journal).is_ok_and(started) {
            assert!(start.elapsed() < Duration::from_secs(30), "not started");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(wait);
        assert!(Command::new("kill").args(["-USR1", &child.id().to_string()]).status().unwrap().success());
        let code = child.wait().unwrap().code();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut text).unwrap();
        assert_eq!(code, Some(75), "after {wait:?}: {text}");
        assert!(text.contains("SIGUSR1: the run saves and stops") && text.contains("is saved"), "{text}");
        assert!(!workshop.path("early/STOP").exists());
    }
    let done = dunlearn(&["checkpoint", "ls", workshop.path("early").to_str().unwrap()]);
    assert!(done.success && done.text.contains("step"), "{}", done.text);
}

/// An engine that ends with 0 while the run has not come to its end is no success.
#[test]
fn the_engines_word_is_not_enough() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    let engine = |name: &str, script: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = workshop.path(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    };
    let run = |program: &str, extra: &[&str]| {
        launch(&[&["--np", "2", "--program", program][..], extra].concat(), &["--config", &config])
    };
    let done = run(&engine("nothing", "exit 0"), &[]);
    assert_eq!(done.code, Some(106), "{}", done.text);
    assert!(done.text.contains("ended with code 0 and the run did not"), "{}", done.text);
    // a summary of another start is no mark
    std::fs::create_dir_all(workshop.path("run")).unwrap();
    std::fs::write(workshop.path("run/summary.json"), "{\"launch\": \"other\"}").unwrap();
    assert_eq!(run(&engine("nothing", "exit 0"), &[]).code, Some(106));
    let done = run(&engine("unknown", "exit 213"), &["--max-restarts", "3"]);
    assert!(done.code == Some(213) && done.text.contains("could not start the ranks"), "{}", done.text);
    // ranks have spoken, the engine hangs and does not listen
    let note = r#"trap '' TERM; echo '{"rank":1,"host":"n9","code":102,"message":"no answer","time":1}' > $DUNLEARN_LAUNCH/end_00001.json"#;
    let done = run(&engine("hangs", &format!("{note}; sleep 60")), &["--grace", "0.5"]);
    assert_eq!(done.code, Some(102), "{}", done.text);
    assert!(
        done.text.contains("rank 1 on n9: no answer") && done.seconds < 20.0,
        "{:.1} s: {}",
        done.seconds,
        done.text
    );
}
