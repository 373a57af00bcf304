//! Ranks that no MPI has started: they meet over TCP by the variables of PyTorch's launchers.

use crate::program::{SHAPE, Workshop, finish, meeting, number};

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
steps = 3
global_batch = 4
precision = "f32"
[optimizer]
lr = 1e-3
"#;

/// The same run over TCP and on one rank ends with the same numbers.
#[test]
fn ranks_meet_over_tcp() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    for finished in meeting(4, &["--config", &config]) {
        assert!(finished.success, "{}", finished.text);
    }
    let four = workshop.steps("run");
    let one = crate::program::dunlearn(&["--config", &config, "--overwrite", "--set", "parallel.tp=1"]);
    assert!(one.success, "{}", one.text);
    let alone = workshop.steps("run");
    for (four, alone) in four.iter().zip(&alone) {
        for key in ["loss", "grad_norm", "npo_log_ratio"] {
            let (a, b) = (number(four, key), number(alone, key));
            assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{key}: {a} instead of {b}");
        }
    }
    assert_eq!(four.len(), 3);
}

/// Devices and layouts against one CPU, as a user asks for it.
#[test]
fn the_check_passes_on_several_ranks() {
    let finished = meeting(2, &["check", "--tp", "2", "--device", "cpu"]);
    assert!(finished.iter().all(|finished| finished.success), "{}", finished[0].text);
    assert_eq!(finished[0].text.matches("good").count(), 15, "{}", finished[0].text);
    assert!(finished[1].text.is_empty(), "one rank speaks: {}", finished[1].text);
}

/// Nobody else ends the ranks: each has to notice that another is gone.
#[test]
fn a_rank_that_dies_ends_the_others() {
    let workshop = Workshop::new(SHAPE);
    let config = workshop.config("run.toml", RUN);
    for fault in ["kill@step:1", "panic@step:1", "hang@step:1"] {
        let finished = meeting(2, &["--config", &config, "--fault", fault, "--overwrite", "--set", "run.timeout=4"]);
        for (rank, finished) in finished.iter().enumerate() {
            assert!(!finished.success && finished.seconds < 30.0, "{fault}, rank {rank}: {}", finished.text);
        }
        let expected = match fault {
            "hang@step:1" => "no answer to",
            _ => "rank 1 has ",
        };
        assert!(finished[0].text.contains(expected), "{fault}: {}", finished[0].text);
    }
}

/// A rank that leaves before all have met may come to another try: the exit code says that one is worth it.
#[test]
fn ranks_that_do_not_meet_may_try_again() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dunlearn"));
    command.args(["check", "--device", "cpu"]).envs([("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")]);
    command.env("MASTER_PORT", port.to_string());
    let guest = std::thread::spawn(move || {
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    });
    let finished = finish(&mut command);
    guest.join().unwrap();
    assert!(finished.text.contains("a connection said nothing"), "{}", finished.text);
    assert_eq!(finished.code, Some(102), "{}", finished.text);
}
