//! Plots as SVG: axes with round ticks, labels at the lines instead of a legend, a palette for colour-blind eyes, and the numbers as
//! titles that a pointer shows. Colours come from the page's style sheet, so that one picture serves light and dark.

mod axis;
mod frame;
mod labels;
mod lines;
mod scatter;

pub(super) use axis::Scale;
pub(super) use lines::{Level, Lines, Series};
pub(super) use scatter::{Scatter, Trail};

/// Number of colours in the style sheet.
pub(super) const COLOURS: usize = 8;
