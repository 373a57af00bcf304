//! Named slices: what one rank holds of a tensor, described by the tensor alone, so that any layout can read any other's.
//!
//! A slice is a run of elements, in row-major order, of a box of a Hugging Face tensor. Which rank, bucket or layout wrote it
//! does not matter to a reader.

use serde::{Deserialize, Serialize};

/// Where a run of elements belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Hugging Face name.
    pub tensor: String,
    /// Shape of the whole tensor: one or two dimensions.
    pub shape: Vec<i64>,
    /// First index of the box in each dimension.
    pub offset: Vec<i64>,
    /// Size of the box in each dimension.
    pub size: Vec<i64>,
    /// First element of the run, counted in the box.
    pub start: i64,
    pub len: i64,
}

/// Elements of one row of a tensor that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stretch {
    /// Row of the whole tensor; 0 for vectors.
    pub row: i64,
    /// First column of the whole tensor, and how many.
    pub column: i64,
    pub len: i64,
    /// Its first element, counted from the start of the run.
    pub at: i64,
}

impl Place {
    /// The run row by row.
    pub fn stretches(&self) -> Vec<Stretch> {
        let (first_row, first_column, width) = match (self.offset.as_slice(), self.size.as_slice()) {
            ([row, column], [_, width]) => (*row, *column, *width),
            ([first], [width]) => (0, *first, *width),
            _ => return Vec::new(), // refused by `check`
        };
        let mut stretches = Vec::new();
        let mut at = 0;
        while at < self.len {
            let (row, column) = ((self.start + at) / width, (self.start + at) % width);
            let len = (width - column).min(self.len - at);
            stretches.push(Stretch { row: first_row + row, column: first_column + column, len, at });
            at += len;
        }
        stretches
    }

    /// What is wrong with a place that was read from a file; None for a good one.
    pub fn check(&self) -> Option<String> {
        let Self { tensor, shape, offset, size, start, len } = self;
        let dims = shape.len();
        if !(1..=2).contains(&dims) || offset.len() != dims || size.len() != dims {
            return Some(format!("{tensor} has {dims} dimensions, {} offsets and {} sizes", offset.len(), size.len()));
        }
        let inside = |((shape, offset), size): ((&i64, &i64), &i64)| {
            *offset >= 0 && *size >= 0 && offset.checked_add(*size).is_some_and(|end| end <= *shape)
        };
        if !shape.iter().zip(offset).zip(size).all(inside) {
            return Some(format!("{tensor}: a box at {offset:?} of {size:?} does not lie in {shape:?}"));
        }
        let product = |sizes: &[i64]| sizes.iter().try_fold(1i64, |product, n| product.checked_mul(*n));
        if product(shape).is_none() {
            return Some(format!("{tensor}: no tensor has the shape {shape:?}"));
        }
        let elements = product(size);
        let end = start.checked_add(*len);
        if *start < 0 || *len < 0 || end.is_none() || elements.is_none_or(|all| end.is_some_and(|end| end > all)) {
            return Some(format!("{tensor}: elements {start} to {start} + {len} do not lie in a box of {size:?}"));
        }
        None
    }
}

/// Copies what `from` has of `to`'s elements: `copy(first element in from, first element in to, number)` for each run that both
/// have. Gives the number of elements.
pub fn overlap(from: &Place, to: &Place, mut copy: impl FnMut(usize, usize, usize)) -> i64 {
    let mut total = 0;
    let theirs = from.stretches();
    for mine in to.stretches() {
        // rows ascend in both
        let first = theirs.partition_point(|other| other.row < mine.row);
        for other in theirs[first..].iter().take_while(|other| other.row == mine.row) {
            let start = mine.column.max(other.column);
            let end = (mine.column + mine.len).min(other.column + other.len);
            if start < end {
                let (a, b) = (other.at + start - other.column, mine.at + start - mine.column);
                copy(a as usize, b as usize, (end - start) as usize);
                total += end - start;
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(offset: [i64; 2], size: [i64; 2], start: i64, len: i64) -> Place {
        Place { tensor: "w".into(), shape: vec![6, 10], offset: offset.into(), size: size.into(), start, len }
    }

    #[test]
    fn a_run_goes_row_by_row() {
        let stretches = place([2, 4], [3, 5], 3, 8).stretches();
        let seen: Vec<_> = stretches.iter().map(|s| (s.row, s.column, s.len, s.at)).collect();
        assert_eq!(seen, [(2, 7, 2, 0), (3, 4, 5, 2), (4, 4, 1, 7)]);
        let vector = Place { tensor: "b".into(), shape: vec![9], offset: vec![4], size: vec![5], start: 1, len: 3 };
        assert_eq!(vector.stretches(), [Stretch { row: 0, column: 5, len: 3, at: 0 }]);
    }

    /// Column boxes read from row boxes, element by element.
    #[test]
    fn every_element_finds_its_place() {
        let value = |row: i64, column: i64| row * 10 + column;
        let sources = [place([0, 0], [2, 10], 0, 20), place([2, 0], [4, 10], 0, 17), place([2, 0], [4, 10], 17, 23)];
        for to in [place([0, 3], [6, 4], 0, 24), place([1, 0], [5, 5], 7, 11), place([5, 9], [1, 1], 0, 1)] {
            let mut found = vec![-1; to.len as usize];
            let mut total = 0;
            for from in &sources {
                let numbers: Vec<i64> =
                    from.stretches().iter().flat_map(|s| (0..s.len).map(move |i| value(s.row, s.column + i))).collect();
                total += overlap(from, &to, |a, b, n| found[b..b + n].copy_from_slice(&numbers[a..a + n]));
            }
            let want: Vec<i64> =
                to.stretches().iter().flat_map(|s| (0..s.len).map(move |i| value(s.row, s.column + i))).collect();
            assert_eq!((total, found), (to.len, want));
        }
    }

    #[test]
    fn places_that_cannot_be_are_told() {
        assert_eq!(place([0, 0], [6, 10], 0, 60).check(), None);
        for bad in [
            place([0, 0], [6, 11], 0, 1),
            place([-1, 0], [2, 2], 0, 1),
            place([0, 0], [2, 2], 3, 2),
            place([0, 0], [2, 2], -1, 1),
            place([0, 0], [i64::MAX, 2], 0, 1),
            place([5, 0], [1, 10], i64::MAX, 1),
            Place { shape: vec![i64::MAX, 2], ..place([0, 0], [1, 1], 0, 1) },
            Place { offset: vec![0], ..place([0, 0], [1, 1], 0, 1) },
        ] {
            assert!(bad.check().is_some(), "{bad:?}");
        }
    }
}
