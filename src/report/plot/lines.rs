//! Lines over a common abscissa.

use super::axis::{Axis, Scale};
use super::frame::Frame;
use super::labels::{self, Label};
use crate::report::html::{escape, number};

/// A plot of lines.
pub(in crate::report) struct Lines {
    /// What it shows, for those who do not see it.
    pub(in crate::report) about: String,
    pub(in crate::report) x_label: String,
    pub(in crate::report) x_scale: Scale,
    pub(in crate::report) y_scale: Scale,
    pub(in crate::report) series: Vec<Series>,
    pub(in crate::report) levels: Vec<Level>,
    /// Values that the vertical axis must hold besides, such as 0 and 1 for shares.
    pub(in crate::report) include: Vec<f64>,
}

/// One line.
pub(in crate::report) struct Series {
    pub(in crate::report) label: String,
    /// Number of the colour; None: the colour of the text, dashed, for what others are held against.
    pub(in crate::report) colour: Option<usize>,
    /// In ascending order of the abscissa.
    pub(in crate::report) points: Vec<(f64, f64)>,
}

/// A value that holds at every abscissa.
pub(in crate::report) struct Level {
    pub(in crate::report) label: String,
    pub(in crate::report) value: f64,
}

/// Up to so many points each is a dot; more are a line alone.
const DOTS: usize = 16;
/// Places of a line at which a pointer finds the number.
const HITS: usize = 60;
/// Points of a line: more cannot be told apart at this width.
const POINTS: usize = 400;

impl Lines {
    /// The picture; None where no number has a place in it.
    pub(in crate::report) fn svg(&self) -> Option<String> {
        let points = || self.series.iter().flat_map(|series| series.points.iter().copied());
        // a point counts for an axis only if it has a place on both
        let visible = |(x, y): &(f64, f64)| {
            let fits = |scale, value: f64| value.is_finite() && (scale == Scale::Linear || value > 0.0);
            fits(self.x_scale, *x) && fits(self.y_scale, *y)
        };
        let x = Axis::new(self.x_scale, points().filter(visible).map(|(x, _)| x), 4, true)?;
        let levels = self.levels.iter().map(|level| level.value);
        let heights = points().filter(visible).map(|(_, y)| y).chain(self.include.iter().copied()).chain(levels);
        let y = Axis::new(self.y_scale, heights, 4, false)?;
        let names = self.series.iter().map(|series| &series.label).chain(self.levels.iter().map(|level| &level.label));
        let frame = Frame::new(x, y, labels::letters(names.map(String::as_str)));
        let (mut content, mut ends) = (String::new(), Vec::new());
        for level in &self.levels {
            let Some(y) = frame.y(level.value) else { continue };
            let left = frame.at((points().filter(visible).map(|(x, _)| x).fold(f64::INFINITY, f64::min), level.value));
            content += &format!(
                "<line class=\"level\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"><title>{}: {}</title></line>\n",
                left.map_or(0.0, |(x, _)| x),
                frame.right(),
                escape(&level.label),
                number(level.value)
            );
            ends.push(Label { text: level.label.clone(), class: "ink".to_owned(), y });
        }
        for series in &self.series {
            let placed: Vec<((f64, f64), (f64, f64))> =
                series.points.iter().filter_map(|&point| Some((point, frame.at(point)?))).collect();
            let Some((_, last)) = placed.last() else { continue };
            let class = series.colour.map_or("ink".to_owned(), |colour| format!("c{}", colour % super::COLOURS));
            ends.push(Label { text: series.label.clone(), class: class.clone(), y: last.1 });
            content += &series.draw(&placed, &class, &self.x_label);
        }
        Some(frame.svg(&self.about, &self.x_label, &(content + &labels::draw(&frame, ends))))
    }
}

impl Series {
    fn draw(&self, placed: &[((f64, f64), (f64, f64))], class: &str, x_label: &str) -> String {
        let path: Vec<String> = thin(placed, POINTS).map(|(_, (x, y))| format!("{x:.1},{y:.1}")).collect();
        let mut text = format!(
            "<polyline class=\"mark {class}{}\" points=\"{}\"/>\n",
            if self.colour.is_none() { " dashed" } else { "" },
            path.join(" ")
        );
        let (kind, radius, places) = if placed.len() <= DOTS { ("dot", 3.0, DOTS) } else { ("hit", 6.0, HITS) };
        for ((x, value), (at_x, at_y)) in thin(placed, places) {
            text += &format!(
                "<circle class=\"{kind} {class}\" cx=\"{at_x:.1}\" cy=\"{at_y:.1}\" r=\"{radius}\"><title>{}, {} {}: {}</title></circle>",
                escape(&self.label),
                escape(x_label),
                if x.fract() == 0.0 { format!("{x:.0}") } else { number(*x) },
                number(*value)
            );
        }
        text + "\n"
    }
}

/// At most about `most` of them, the first and the last one always.
fn thin<T>(all: &[T], most: usize) -> impl Iterator<Item = &T> {
    let every = all.len().div_ceil(most).max(1);
    all.iter().enumerate().filter(move |(index, _)| index % every == 0 || index + 1 == all.len()).map(|(_, one)| one)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(points: Vec<(f64, f64)>, y_scale: Scale) -> Lines {
        Lines {
            about: "a < b".into(),
            x_label: "step".into(),
            x_scale: Scale::Linear,
            y_scale,
            series: vec![Series { label: "forget".into(), colour: Some(1), points }],
            levels: vec![Level { label: "retrained".into(), value: 0.2 }],
            include: Vec::new(),
        }
    }

    #[test]
    fn numbers_stand_at_their_points() {
        let text = lines(vec![(0.0, 1.0), (10.0, 0.5), (20.0, 0.0)], Scale::Linear).svg().unwrap();
        assert!(text.contains("<title>forget, step 10: 0.5000</title>"), "{text}");
        assert!(text.contains("retrained: 0.2000") && text.contains("a &lt; b"));
        assert_eq!(text.matches("class=\"dot c1\"").count(), 3);
        let heights: Vec<&str> = text.split("cy=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        assert_eq!(heights, ["12.0", "107.0", "202.0"]);
    }

    #[test]
    fn long_lines_are_thinned_and_keep_their_end() {
        let text = lines((0..5000).map(|i| (f64::from(i), 1.0)).collect(), Scale::Linear).svg().unwrap();
        assert!(text.len() < 20_000 && text.contains("step 4999"), "{}", text.len());
        assert!(!text.contains("class=\"dot"));
    }

    #[test]
    fn without_numbers_there_is_no_picture() {
        assert!(lines(Vec::new(), Scale::Linear).svg().is_none());
        assert!(lines(vec![(0.0, f64::NAN)], Scale::Linear).svg().is_none());
        assert!(lines(vec![(0.0, -1.0)], Scale::Log).svg().is_none());
    }
}
