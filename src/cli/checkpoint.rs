//! The verbs `export` and `checkpoint`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::arguments::{CheckpointVerb, ExportOptions};
use super::launch::Launched;
use super::run::{Ranks, set_threads, with_ranks};
use crate::checkpoint::{self, Folder, Saved, Store};
use crate::config::{Config, ExportDtype, Init};
use crate::dist::World;
use crate::model::sharding::Table;
use crate::model::{Architecture, families};
use crate::run::model_digest;
use crate::telemetry::table;

/// Deadline of a wait for ranks that write files.
const TIMEOUT: Duration = Duration::from_secs(3600);

pub(super) fn export(options: &ExportOptions, launched: &Launched) -> anyhow::Result<()> {
    with_ranks(launched, |ranks| export_on(ranks, options, launched))
}

fn export_on(ranks: &Ranks, options: &ExportOptions, launched: &Launched) -> anyhow::Result<()> {
    let world = ranks.world(1, None, TIMEOUT, launched)?;
    set_threads(0, &world)?;
    let saved = chosen(&options.run, options.step)?;
    let config: Config = serde_json::from_value(saved.manifest.config.clone())
        .with_context(|| format!("{}: the configuration in manifest.json", saved.folder.display()))?;
    let arch = families::read(&config.model.path)?;
    let whole = Table::new(&arch, 1, 0, false)?;
    let step = saved.manifest.step;
    let target = options.out.clone().unwrap_or_else(|| options.run.join(format!("export_{step:06}")));
    if target.exists() {
        bail!("{} exists; choose another --out, or move it away", target.display());
    }
    let kind = match options.dtype.unwrap_or(config.export.dtype) {
        ExportDtype::Bf16 => tch::Kind::BFloat16,
        ExportDtype::F16 => tch::Kind::Half,
        ExportDtype::F32 => tch::Kind::Float,
        ExportDtype::Same if config.model.init == Init::Random => tch::Kind::Float,
        ExportDtype::Same => Folder::open(&config.model.path)?.kind(),
    };
    if !checkpoint::trains_everything(&saved) {
        same_model(&saved, &config, &arch, &world)?;
    }
    let options = checkpoint::ExportOptions {
        source: &config.model.path,
        target: &target,
        kind,
        max_shard_bytes: options.max_shard_size.unwrap_or((config.export.max_shard_mib * 1048576.0) as usize),
    };
    checkpoint::convert(&saved, &whole.tensors(), &options, &world, || ())?;
    if world.is_first() {
        println!("{}: the model after step {step}", target.display());
    }
    Ok(())
}

/// What a checkpoint does not hold is taken from the model that its run read, which must be the same. All ranks call it.
fn same_model(saved: &Saved, config: &Config, arch: &Architecture, world: &World) -> anyhow::Result<()> {
    let path = &config.model.path;
    let folder = (config.model.init != Init::Random).then(|| Folder::open(path)).transpose()?;
    let found = model_digest(arch, folder.as_ref(), config.run.seed, world)?;
    match saved.manifest.digests.get("model") {
        Some(known) if *known == found => Ok(()),
        known => bail!(
            "{}: what was not trained is to come from {}, but that is another model now: the checkpoint was made with digest {}, this is \
             {found}",
            saved.folder.display(),
            path.display(),
            known.map_or("none", String::as_str)
        ),
    }
}

pub(super) fn inspect(verb: &CheckpointVerb) -> anyhow::Result<()> {
    match verb {
        CheckpointVerb::Ls { run } => list(run),
        CheckpointVerb::Verify { run, step } => verify(run, *step),
        CheckpointVerb::Diff { first, second } => diff(first, second),
    }
}

fn list(run: &Path) -> anyhow::Result<()> {
    let store = existing(run)?;
    let mut rows = Vec::new();
    for step in store.steps()? {
        rows.push(match store.open(step) {
            Ok(saved) => {
                let manifest = &saved.manifest;
                let layout = format!("tp {} x dp {}", manifest.tp, manifest.dp);
                let size = format!("{:.1}", saved.bytes() as f64 / 1048576.0);
                vec![step.to_string(), manifest.files.len().to_string(), size, layout, manifest.dunlearn.clone()]
            }
            Err(error) => vec![step.to_string(), "-".into(), "-".into(), error.to_string(), "-".into()],
        });
    }
    print!("{}", table(&["step", "files", "MiB", "written on", "by version"], &rows));
    Ok(())
}

fn verify(run: &Path, step: Option<usize>) -> anyhow::Result<()> {
    let store = existing(run)?;
    let mut wrong = Vec::new();
    for step in step.map_or_else(|| store.steps(), |step| Ok(vec![step]))? {
        match verified(&store, step) {
            Ok((folder, files, tensors)) => {
                println!("{}: {files} files, {tensors} tensors, every digest and every element right", folder.display())
            }
            Err(error) => wrong.push(error.to_string()),
        }
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("\n")) }
}

/// The folder of a checkpoint that is whole, and how many files and tensors it has.
fn verified(store: &Store, step: usize) -> Result<(PathBuf, usize, usize), checkpoint::CheckpointError> {
    let saved = store.open(step)?;
    saved.verify(0, 1)?;
    let files = saved.state()?;
    files.check_coverage()?;
    Ok((saved.folder, saved.manifest.files.len(), files.tensors().len()))
}

fn diff(first: &Path, second: &Path) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    let (mut square, mut size, mut changed, mut elements) = (0.0, 0.0, 0, 0);
    for tensor in checkpoint::difference(first, second)? {
        square += tensor.norm.powi(2);
        size += tensor.size.powi(2);
        changed += tensor.changed;
        elements += tensor.elements;
        rows.push(line(&tensor.name, tensor.norm, tensor.size, tensor.changed, tensor.elements));
    }
    rows.push(line("all", square.sqrt(), size.sqrt(), changed, elements));
    print!("{}", table(&["tensor", "norm of difference", "relative", "changed"], &rows));
    Ok(())
}

fn line(name: &str, norm: f64, size: f64, changed: usize, elements: usize) -> Vec<String> {
    let share = 100.0 * changed as f64 / elements.max(1) as f64;
    vec![name.to_owned(), format!("{norm:.3e}"), format!("{:.2e}", norm / size.max(1e-300)), format!("{share:.1} %")]
}

fn chosen(run: &Path, step: Option<usize>) -> anyhow::Result<Saved> {
    let store = existing(run)?;
    let steps = store.steps()?;
    let step = match step {
        Some(step) if !steps.contains(&step) => {
            let known: Vec<String> = steps.iter().map(usize::to_string).collect();
            bail!("{} has no checkpoint after step {step}; there are {}", run.display(), known.join(", "))
        }
        Some(step) => step,
        None => *steps.last().expect("invariant: `existing` has found one"),
    };
    Ok(store.open(step)?)
}

fn existing(run: &Path) -> anyhow::Result<Store> {
    let store = Store::of_run(run);
    if store.steps()?.is_empty() {
        bail!(
            "{} has no complete checkpoint; give a run folder whose run had [checkpoint] every = N",
            store.folder().display()
        );
    }
    Ok(store)
}
