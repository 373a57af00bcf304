//! Attacks that change the model or what it is asked, and need no training: what was forgotten may come back.

mod quantise;

pub use quantise::{Code, NF4_LEVELS, Quantisation, quantise};
