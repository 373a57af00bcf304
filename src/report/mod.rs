//! What runs have come to, for a person to read: one self-contained page, and the headline table for the terminal.
//!
//! Reads run folders and nothing else: no model, no tensor, no rank. A part whose numbers are not there is left out; a number
//! is never made up.

mod details;
mod distribution;
mod figures;
mod findings;
mod headline;
mod html;
mod names;
mod page;
mod plot;
mod run;
mod samples;
mod tradeoff;

pub use findings::{Finding, findings};
pub use headline::terminal;
pub use page::page;
pub use run::{ReportError, Run, read};

#[cfg(test)]
mod tests;
