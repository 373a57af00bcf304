//! The verb `report` on real run folders, and a look at its page in a browser where there is one.

use std::process::Command;

use crate::program::{Workshop, dunlearn};

const TINY: &[&str] = &[
    "--authors",
    "4",
    "--questions",
    "4",
    "--vocab",
    "400",
    "--hidden",
    "32",
    "--layers",
    "1",
    "--heads",
    "4",
    "--kv-heads",
    "2",
];

/// A few steps from random weights: nothing to be proud of, everything to report.
const RUN: &str = r#"
[run]
dir = "{runs}/ga"
[model]
path = "{data}/model"
init = "random"
[data]
forget = { path = "{data}/forget.jsonl", kind = "qa" }
retain = { path = "{data}/retain.jsonl", kind = "qa" }
[method]
objective = "ga"
retain = "nll"
[train]
steps = 6
global_batch = 4
precision = "f32"
[optimizer]
lr = 1e-3
[eval]
every = 2
"#;

fn run(workshop: &Workshop) {
    let config = workshop.config("ga.toml", RUN);
    let done = dunlearn(&["--config", &config]);
    assert!(done.success, "{}", done.text);
}

#[test]
fn a_run_leaves_a_report_and_the_verb_makes_it_again() {
    let workshop = Workshop::new(TINY);
    run(&workshop);
    let folder = workshop.path("ga");
    let left = std::fs::read_to_string(folder.join("report.html")).unwrap();
    // what the run itself says of its answers stands in the page: retain probability at steps 0, 2, 4, 6
    assert!(left.contains("<title>retain, step 2: ") && left.contains("ga + nll"), "{left}");
    assert!(left.matches("<svg").count() >= 5);
    std::fs::remove_file(folder.join("report.html")).unwrap();
    let done = dunlearn(&["report", folder.to_str().unwrap()]);
    assert!(done.success && done.text.contains("forget: answer probability ↓"), "{}", done.text);
    assert_eq!(std::fs::read_to_string(folder.join("report.html")).unwrap(), left);

    let copy = workshop.path("again");
    std::fs::create_dir(&copy).unwrap();
    for name in ["summary.json", "metrics.jsonl", "config.toml"] {
        std::fs::copy(folder.join(name), copy.join(name)).unwrap();
    }
    let (one, two, out) = (folder.to_str().unwrap(), copy.to_str().unwrap(), workshop.path("both.html"));
    let refused = dunlearn(&["report", one, two]);
    assert!(!refused.success && refused.text.contains("add -o report.html"), "{}", refused.text);
    let done = dunlearn(&["report", one, two, "-o", out.to_str().unwrap()]);
    assert!(done.success && done.text.contains("again"), "{}", done.text);
    let refused = dunlearn(&["report", workshop.path("data").to_str().unwrap()]);
    assert!(!refused.success && refused.text.contains("is no run folder"), "{}", refused.text);

    in_a_browser(&workshop, &[folder.join("report.html"), out]);
}

/// Plots that are seen, letters that can be read, an empty console; and the look can fail.
fn in_a_browser(workshop: &Workshop, pages: &[std::path::PathBuf]) {
    let look = |pages: &[std::path::PathBuf]| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/browser.py");
        let done = Command::new("python3").arg(script).args(pages).output();
        done.map_or_else(
            |error| (Some(77), format!("no python3 ({error}): the report was not looked at")),
            |done| (done.status.code(), String::from_utf8_lossy(&done.stdout).into_owned()),
        )
    };
    let (code, told) = look(pages);
    if code == Some(77) {
        eprintln!("skipped: {told}");
        return;
    }
    assert_eq!(code, Some(0), "{told}");
    let page = std::fs::read_to_string(&pages[0]).unwrap();
    let broken = workshop.path("broken.html");
    let blind = page.replace("</style>", ".plot polyline, .plot circle { display: none }</style>");
    std::fs::write(&broken, blind.replace("</body>", "<script>console.error('said')</script></body>")).unwrap();
    let (code, told) = look(&[broken]);
    assert!(code == Some(1) && told.contains("no mark can be seen") && told.contains("said"), "{told}");
}
