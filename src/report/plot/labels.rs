//! Labels at the ends of lines, moved apart where they would lie on each other.

use super::frame::Frame;
use crate::report::html::escape;

/// Height of a label. Unit: pixels.
const LINE: f64 = 13.0;
/// Longest label that is shown whole.
const LETTERS: usize = 17;

/// A label that would like to stand at height `y`.
pub(super) struct Label {
    pub(super) text: String,
    pub(super) class: String,
    pub(super) y: f64,
}

/// Room that labels need. Unit: letters.
pub(super) fn letters<'a>(texts: impl Iterator<Item = &'a str>) -> usize {
    texts.map(|text| shorten(text).chars().count()).max().unwrap_or(0)
}

/// The labels right of the frame, from top to bottom.
pub(super) fn draw(frame: &Frame, mut labels: Vec<Label>) -> String {
    labels.sort_by(|a, b| a.y.total_cmp(&b.y));
    // down where the one above is too near, then up again from the lower edge
    let mut least = frame.top() - LINE / 2.0;
    for label in &mut labels {
        label.y = label.y.max(least);
        least = label.y + LINE;
    }
    let mut most = frame.bottom() + 4.0;
    for label in labels.iter_mut().rev() {
        label.y = label.y.min(most);
        most = label.y - LINE;
    }
    let line = |label: &Label| {
        format!(
            "<text class=\"label {}\" x=\"{:.1}\" y=\"{:.1}\">{}<title>{}</title></text>\n",
            label.class,
            frame.right() + 7.0,
            label.y + 4.0,
            escape(&shorten(&label.text)),
            escape(&label.text)
        )
    };
    labels.iter().map(line).collect()
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= LETTERS {
        return text.to_owned();
    }
    let start: String = text.chars().take(LETTERS - 1).collect();
    start + "…"
}

#[cfg(test)]
mod tests {
    use super::super::axis::{Axis, Scale};
    use super::*;

    #[test]
    fn labels_do_not_lie_on_each_other_nor_outside() {
        let axis = || Axis::new(Scale::Linear, [0.0, 1.0].into_iter(), 4, false).unwrap();
        let frame = Frame::new(axis(), axis(), 5);
        let bottom = frame.bottom();
        let label = |y: f64| Label { text: "x".into(), class: "c0".into(), y };
        let text = draw(&frame, vec![label(bottom), label(bottom - 1.0), label(bottom), label(20.0), label(21.0)]);
        let mut heights: Vec<f64> =
            text.split(" y=\"").skip(1).map(|rest| rest.split('"').next().unwrap().parse().unwrap()).collect();
        heights.sort_by(f64::total_cmp);
        assert_eq!(heights.len(), 5);
        assert!(heights.windows(2).all(|pair| pair[1] - pair[0] >= LINE - 0.11), "{heights:?}");
        assert!(heights[0] > 8.0 && heights[4] <= bottom + 9.0, "{heights:?}");
        assert_eq!(shorten("a name that is far too long"), "a name that is f…");
    }
}
