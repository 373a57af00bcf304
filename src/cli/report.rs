//! The verb `report`: a page about one run or several, and its headline on the terminal.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::report;

/// Name of the page that a run leaves in its own folder.
const PAGE: &str = "report.html";

#[derive(Debug, Args)]
pub(super) struct ReportOptions {
    /// Folders of runs, finished or not; several are compared
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// File to write. Default: report.html in the folder of a single run
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) fn report(options: &ReportOptions) -> anyhow::Result<()> {
    let path = match (&options.out, options.runs.as_slice()) {
        (Some(out), _) => out.clone(),
        (None, [run]) => run.join(PAGE),
        (None, _) => bail!("several runs need a file for their page: add -o report.html"),
    };
    let runs = report::read(&options.runs)?;
    write(&path, &report::page(&runs))?;
    print!("{}", report::terminal(&runs));
    for run in &runs {
        let name = if runs.len() == 1 { String::new() } else { format!("{}: ", run.name) };
        for finding in report::findings(run).iter().filter(|finding| finding.is_warning) {
            println!("warning: {name}{}", finding.text);
        }
    }
    println!("{}", path.display());
    Ok(())
}

/// The page of a run that has just come to its end. It is no reason for a run to fail: what goes wrong is a warning.
pub(super) fn after_run(folder: &Path) {
    let done = report::read(&[folder.to_owned()]).map_err(anyhow::Error::from);
    if let Err(error) = done.and_then(|runs| write(&folder.join(PAGE), &report::page(&runs))) {
        tracing::warn!("no report: {error:#}");
    }
}

fn write(path: &Path, page: &str) -> anyhow::Result<()> {
    std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))
}
