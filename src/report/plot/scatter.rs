//! Points in a plane: where runs went, and what they are held against.

use super::axis::{Axis, Scale};
use super::frame::{Frame, LETTER, WIDTH};
use crate::report::html::{escape, number};

/// A plane with trails.
pub(in crate::report) struct Scatter {
    pub(in crate::report) about: String,
    pub(in crate::report) x_label: String,
    pub(in crate::report) trails: Vec<Trail>,
    /// Values that the axes must hold besides.
    pub(in crate::report) include: Vec<(f64, f64)>,
}

/// The way of one run from its start to its end; one point is a model that stands still.
pub(in crate::report) struct Trail {
    pub(in crate::report) label: String,
    /// None: something that runs are held against, as a diamond.
    pub(in crate::report) colour: Option<usize>,
    /// Name of each point, and where it is.
    pub(in crate::report) points: Vec<(String, (f64, f64))>,
}

impl Scatter {
    /// The picture; None where no trail has a point.
    pub(in crate::report) fn svg(&self) -> Option<String> {
        let points = || self.trails.iter().flat_map(|trail| &trail.points).map(|(_, at)| *at);
        points().next()?;
        let all = || points().chain(self.include.iter().copied());
        let x = Axis::new(Scale::Linear, all().map(|(x, _)| x), 4, false)?;
        let y = Axis::new(Scale::Linear, all().map(|(_, y)| y), 4, false)?;
        let frame = Frame::new(x, y, 1);
        let mut content = String::new();
        // a label lies on no point either
        let placed = points().filter_map(|at| frame.at(at));
        let mut taken: Vec<[f64; 3]> = placed.map(|(x, y)| [x - 5.0, x + 5.0, y]).collect();
        for trail in &self.trails {
            content += &trail.draw(&frame, &mut taken);
        }
        Some(frame.svg(&self.about, &self.x_label, &content))
    }
}

impl Trail {
    /// `taken`: boxes of the labels so far, `[left, right, middle]`.
    fn draw(&self, frame: &Frame, taken: &mut Vec<[f64; 3]>) -> String {
        let class = self.colour.map_or("ink".to_owned(), |colour| format!("c{}", colour % super::COLOURS));
        let placed: Vec<(&String, (f64, f64), (f64, f64))> =
            self.points.iter().filter_map(|(name, at)| Some((name, *at, frame.at(*at)?))).collect();
        let mut text = String::new();
        if placed.len() > 1 {
            let path: Vec<String> = placed.iter().map(|(_, _, (x, y))| format!("{x:.1},{y:.1}")).collect();
            text += &format!("<polyline class=\"trail {class}\" points=\"{}\"/>\n", path.join(" "));
        }
        for (index, (name, (x, y), (at_x, at_y))) in placed.iter().enumerate() {
            let title = format!("<title>{}: {}, {}</title>", escape(name), number(*x), number(*y));
            text += &if self.colour.is_none() {
                format!(
                    "<path class=\"mark diamond\" d=\"M{at_x:.1} {:.1}l6.5 6.5-6.5 6.5-6.5-6.5z\">{title}</path>\n",
                    at_y - 6.5
                )
            } else {
                let (kind, radius) = match index {
                    _ if index + 1 == placed.len() => ("dot", 5.0),
                    0 => ("hollow", 4.0),
                    _ => ("dot", 2.2),
                };
                format!(
                    "<circle class=\"mark {kind} {class}\" cx=\"{at_x:.1}\" cy=\"{at_y:.1}\" r=\"{radius}\">{title}</circle>\n"
                )
            };
        }
        if let Some((_, _, (x, y))) = placed.last() {
            text += &label(frame, &self.label, &class, *x, *y, taken);
        }
        text
    }
}

/// A label beside a point, where there is room, moved until it lies on no other one.
fn label(frame: &Frame, text: &str, class: &str, x: f64, y: f64, taken: &mut Vec<[f64; 3]>) -> String {
    let width = LETTER * text.chars().count() as f64;
    let to_the_right = x + 10.0 + width < WIDTH - 2.0;
    let (left, right) = if to_the_right { (x + 10.0, x + 10.0 + width) } else { (x - 10.0 - width, x - 10.0) };
    let free = |at: f64| {
        let apart = |other: &[f64; 3]| right < other[0] || left > other[1] || (at - other[2]).abs() >= 13.0;
        at > frame.top() - 4.0 && at < frame.bottom() - 2.0 && taken.iter().all(apart)
    };
    // nearest first: 0, up, down, up two lines, ...
    let shifts = (0..16).map(|i| f64::from((i + 1) / 2) * 13.0 * if i % 2 == 0 { 1.0 } else { -1.0 });
    let at = shifts.map(|shift| y + shift).find(|&at| free(at)).unwrap_or(y);
    taken.push([left, right, at]);
    format!(
        "<text class=\"label {class}\" x=\"{:.1}\" y=\"{:.1}\"{}>{}</text>\n",
        if to_the_right { left } else { right },
        at + 4.0,
        if to_the_right { "" } else { " text-anchor=\"end\"" },
        escape(text)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_that_lie_on_each_other_keep_their_names_apart() {
        let trail = |label: &str, colour| Trail {
            label: label.into(),
            colour,
            points: vec![("start".into(), (1.0, 1.0)), ("end".into(), (0.0, 0.5))],
        };
        let scatter = Scatter {
            about: "x".into(),
            x_label: "forget".into(),
            trails: vec![trail("ga", Some(0)), trail("npo", Some(1)), trail("retrained", None)],
            include: vec![(0.0, 0.0)],
        };
        let text = scatter.svg().unwrap();
        let heights: Vec<f64> = text
            .split("<text class=\"label")
            .skip(1)
            .map(|rest| rest.split(" y=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(heights.len(), 3);
        for (i, a) in heights.iter().enumerate() {
            assert!(heights[..i].iter().all(|b| (a - b).abs() >= 13.0 - 0.11), "{heights:?}");
        }
        assert_eq!((text.matches("hollow").count(), text.matches("diamond").count()), (2, 2));
        assert!(text.contains("<title>end: 0.0000, 0.5000</title>"));
    }

    #[test]
    fn without_points_there_is_no_picture() {
        let empty = Trail { label: "a".into(), colour: None, points: Vec::new() };
        let scatter =
            Scatter { about: "x".into(), x_label: "y".into(), trails: vec![empty], include: vec![(0.0, 1.0)] };
        assert!(scatter.svg().is_none());
    }
}
