//! Numbers about texts: overlap with a reference (ROUGE-L), fluency without a classifier, and compressed length. Knows no models.

mod fluency;
mod porter;
mod rouge;
mod zlib;

pub use fluency::{Fluency, fluency};
pub use porter::stem;
pub use rouge::{Rouge, RougeTokens, rouge_l};
pub use zlib::zlib_bytes;

#[cfg(test)]
mod tests;
