//! Samples: readers, templates, tokenising, order and packing. Knows neither tensors nor ranks beyond their number.

mod dataset;
mod encode;
mod error;
mod order;
mod pack;
mod record;
mod refusals;
mod rows;
pub mod small_model;
pub mod synth;
mod template;

pub use dataset::{Dataset, Stats, Tally, overlap};
pub use encode::{Encoder, Sample};
pub use error::DataError;
pub use order::{Order, StepBatch};
pub use pack::{Item, MicroBatch, RowsOf, Sequence, Stream, Text, Texts, pack, share};
pub use record::{Content, Message, Record, Role, Wanted, read};
pub use refusals::Refusals;
pub use rows::{Row, Rows, find, rows, splits};
