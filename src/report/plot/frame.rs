//! The frame of a plot: size, grid, axes.

use super::axis::Axis;
use crate::report::html::escape;

/// Width of every plot. At this size its letters are readable on a phone, and three stand side by side on a desk. Unit: pixels.
pub(super) const WIDTH: f64 = 380.0;
const HEIGHT: f64 = 240.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 38.0;
/// Of a letter of the labels, on average.
pub(super) const LETTER: f64 = 6.3;

/// Two axes and the area between them.
pub(super) struct Frame {
    x: Axis,
    y: Axis,
    left: f64,
    right: f64,
}

impl Frame {
    /// `label_letters`: room at the right, for so many letters.
    pub(super) fn new(x: Axis, y: Axis, label_letters: usize) -> Self {
        let widest = y.ticks.iter().map(|(_, label)| label.chars().count()).max().unwrap_or(0);
        let right = WIDTH - 14.0 - LETTER * label_letters as f64;
        Self { x, y, left: 12.0 + LETTER * widest as f64, right }
    }

    pub(super) fn top(&self) -> f64 {
        TOP
    }

    pub(super) fn bottom(&self) -> f64 {
        HEIGHT - BOTTOM
    }

    pub(super) fn right(&self) -> f64 {
        self.right
    }

    /// Where a point lies; None: it has no place on these axes.
    pub(super) fn at(&self, (x, y): (f64, f64)) -> Option<(f64, f64)> {
        Some((self.across(self.x.share(x)?), self.y(y)?))
    }

    /// The height of a value.
    pub(super) fn y(&self, y: f64) -> Option<f64> {
        self.y.share(y).map(|share| self.up(share))
    }

    fn across(&self, share: f64) -> f64 {
        self.left + share * (self.right - self.left)
    }

    fn up(&self, share: f64) -> f64 {
        self.bottom() - share * (self.bottom() - TOP)
    }

    /// The whole picture with `content` between grid and edge. `about` is read to those who do not see it.
    pub(super) fn svg(&self, about: &str, x_label: &str, content: &str) -> String {
        let mut text =
            format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n", escape(about));
        for (place, label) in &self.y.ticks {
            let y = self.up(self.y.share_of_place(*place));
            text += &format!(
                "<line class=\"grid\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
                self.left,
                self.right,
                self.left - 6.0,
                y + 4.0,
                escape(label)
            );
        }
        let base = self.bottom();
        for (place, label) in &self.x.ticks {
            let x = self.across(self.x.share_of_place(*place));
            text += &format!(
                "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{base:.1}\" y2=\"{:.1}\"/>\
                 <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n",
                base + 4.0,
                base + 16.0,
                escape(label)
            );
        }
        let (left, right, middle) = (self.left, self.right, f64::midpoint(self.left, self.right));
        text += &format!(
            "<line class=\"axis\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{base:.1}\" y2=\"{base:.1}\"/>\
             <text class=\"tick\" x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n",
            base + 32.0,
            escape(x_label)
        );
        text + content + "</svg>\n"
    }
}
