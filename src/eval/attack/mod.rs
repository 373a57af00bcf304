//! Attacks that change the model or its hidden states, and need no training: what was forgotten may come back.

mod latent;
mod quantise;

pub use latent::{latent, put_latent};
pub use quantise::{Code, NF4_LEVELS, Quantisation, quantise};
