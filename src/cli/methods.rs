//! The verb `methods`: what exists, with its source and its needs.

use std::path::Path;

use anyhow::Context as _;
use serde_json::json;

use super::arguments::MethodsOptions;
use crate::scope;
use crate::unlearn::{self, synthetic};

/// Prints the lists, or writes the figure of docs/methods.md.
pub(super) fn methods(options: &MethodsOptions) -> anyhow::Result<()> {
    if let Some(path) = &options.figure {
        return figure(path);
    }
    let (objectives, retain) = (unlearn::list(), unlearn::RETAIN_TERMS);
    if options.json {
        let lists = json!({ "objectives": objectives, "retain": retain, "scores": scope::SCORES });
        println!("{}", serde_json::to_string_pretty(&lists).context("a list is JSON")?);
        return Ok(());
    }
    let rows = objectives.iter().map(|listed| {
        let bytes = listed.bytes_per_parameter.to_string();
        [listed.name.clone(), listed.title.replace('`', ""), listed.needs_words.clone(), bytes, short(listed.source)]
    });
    println!("method.objective\n");
    let head = ["", "", "needs", "bytes*", "arXiv"].map(str::to_owned);
    print_table(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
    let rows = retain.iter().map(|entry| {
        let needs = if entry.reference.is_empty() { String::new() } else { format!("reference {}", entry.reference) };
        [entry.name.to_owned(), entry.title.to_owned(), needs, String::new(), short(entry.source)]
    });
    println!("\nmethod.retain\n");
    print_table(&rows.collect::<Vec<_>>());
    let rows = scope::SCORES.iter().map(|entry| {
        let title = entry.title.replace('`', "");
        [entry.name.to_owned(), title, entry.needs.to_owned(), String::new(), short(entry.source)]
    });
    println!("\nscope.mask.score\n");
    print_table(&rows.collect::<Vec<_>>());
    println!(
        "\n* a parameter, in bf16 with f32 master weights, gradients and AdamW moments, on one data-parallel rank; 2 where\n\
         only a few matrices are trained at a time; what a scope leaves out has 2 bytes as well (docs/scopes.md)\n\
         keys, defaults and formulas: docs/methods.md; a configuration of each: configs/methods/NAME.toml"
    );
    Ok(())
}

fn short(source: &str) -> String {
    source.rsplit('/').next().unwrap_or_default().to_owned()
}

fn print_table(rows: &[[String; 5]]) {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..5).map(width).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        println!("  {}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// Steps and seeds of the paper's experiment.
fn figure(path: &Path) -> anyhow::Result<()> {
    let svg = synthetic::figure(&[1000, 2000, 3000, 4000, 5000], 2000);
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}: distances from the retrained model over 2000 steps, geometric mean over 5 seeds", path.display());
    Ok(())
}
