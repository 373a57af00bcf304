//! Flat buffers: parameters in the order in which backward completes their gradients, cut into buckets.
//!
//! A bucket is the unit of data-parallel traffic. Under ZeRO-1 each data-parallel rank owns an equal contiguous part of every
//! bucket, whatever parameters lie there: it holds master weights and optimizer state for that part alone.

use std::ops::Range;

use crate::checkpoint::slices::Place;
use crate::config;
use crate::dist::Mesh;
use crate::model::sharding::{Class, Param, ParamId, Table};

/// Elements to which parameters are aligned: 256 bytes of f32.
const ALIGN: usize = 64;

/// Where every parameter of one rank lies.
#[derive(Clone, Debug)]
pub struct Layout {
    pub buckets: Vec<Bucket>,
    /// Bucket and first element of each parameter that is trained; the others lie in no bucket.
    pub places: Vec<Option<(usize, usize)>>,
}

/// One flat buffer.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Elements, padding included; a multiple of the number of owners.
    pub len: usize,
    /// Parameters with their first elements, in buffer order: matrices, biases, partial vectors, vectors.
    pub params: Vec<(ParamId, Range<usize>)>,
    /// The unit whose backward completes the bucket.
    pub last_unit: usize,
    /// The part whose master weights and optimizer state this rank holds.
    pub own: Range<usize>,
}

impl Layout {
    /// As a configuration says.
    pub fn of(table: &Table, parallel: &config::Parallel, mesh: Mesh) -> Self {
        let (owners, owner) = if parallel.zero { (mesh.dp, mesh.dp_rank()) } else { (1, 0) };
        let bucket = (parallel.bucket_mib * 1048576.0 / 4.0) as usize;
        Self::new(table, bucket.max(1), owners, owner)
    }

    /// `bucket_elements`: least size of a bucket but the last; `owners`: ranks that share the buckets, `owner`: this one.
    pub fn new(table: &Table, bucket_elements: usize, owners: usize, owner: usize) -> Self {
        let mut places = vec![None; table.params.len()];
        let mut buckets = Vec::new();
        let mut open = Vec::<ParamId>::new();
        let mut elements = 0;
        for unit in (0..table.num_units()).rev() {
            for (id, param) in
                table.params.iter().enumerate().filter(|(_, param)| param.unit == unit && param.class != Class::Frozen)
            {
                open.push(id);
                // the same on all tensor-parallel ranks, whose collectives go bucket by bucket
                elements += param.largest as usize;
            }
            if !open.is_empty() && (elements >= bucket_elements || unit == 0) {
                let bucket = close(table, std::mem::take(&mut open), unit, owners, owner);
                for (id, range) in &bucket.params {
                    places[*id] = Some((buckets.len(), range.start));
                }
                buckets.push(bucket);
                elements = 0;
            }
        }
        Self { buckets, places }
    }
}

/// Neighbouring parameters of one class and one unit inside a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub class: Class,
    pub unit: usize,
    /// The part that this rank owns, counted from the start of its own part of the bucket; may be empty.
    pub own: Range<usize>,
}

impl Bucket {
    /// The bucket cut by class and unit, in buffer order: the same cuts on all ranks, with this rank's part of each.
    pub fn segments(&self, table: &Table) -> Vec<Segment> {
        let of = |id: ParamId| (table.params[id].class, table.params[id].unit);
        let runs = self.params.chunk_by(|(a, _), (b, _)| of(*a) == of(*b));
        runs.map(|run| {
            let (class, unit) = of(run[0].0);
            Segment { class, unit, own: self.owned(&(run[0].1.start..run[run.len() - 1].1.end)) }
        })
        .collect()
    }

    /// Elements of the parameters of one class, and the padding between them; they are consecutive.
    pub fn class(&self, table: &Table, class: Class) -> Range<usize> {
        let mut of_class =
            self.params.iter().filter(|(id, _)| table.params[*id].class == class).map(|(_, range)| range);
        let Some(first) = of_class.next() else { return 0..0 };
        first.start..of_class.next_back().unwrap_or(first).end
    }

    /// The runs of a parameter that this rank owns: what they are, and where they lie in its own part of the bucket.
    pub fn runs(&self, param: &Param, range: &Range<usize>) -> Vec<(Place, Range<usize>)> {
        let columns = param.shape.get(1).copied().unwrap_or(1);
        let pieces = param.pieces.iter().filter_map(|piece| {
            let first = range.start + (piece.row * columns) as usize;
            let len: i64 = piece.size.iter().product();
            let own = self.owned(&(first..first + len as usize));
            let start = self.own.start + own.start;
            (!own.is_empty()).then(|| {
                let place = Place {
                    tensor: piece.name.clone(),
                    shape: piece.shape.clone(),
                    offset: piece.offset.clone(),
                    size: piece.size.clone(),
                    start: (start - first) as i64,
                    len: own.len() as i64,
                };
                (place, own)
            })
        });
        pieces.collect()
    }

    /// The part of `range` that this rank owns, counted from the start of its own part.
    pub fn owned(&self, range: &Range<usize>) -> Range<usize> {
        let (start, end) = (range.start.max(self.own.start), range.end.min(self.own.end));
        if start < end { start - self.own.start..end - self.own.start } else { 0..0 }
    }
}

fn close(table: &Table, mut ids: Vec<ParamId>, last_unit: usize, owners: usize, owner: usize) -> Bucket {
    ids.sort_by_key(|&id| (table.params[id].class, std::cmp::Reverse(table.params[id].unit), id));
    let mut at = 0;
    let params = ids
        .into_iter()
        .map(|id| {
            let start = at;
            let end = start + table.params[id].num_elements() as usize;
            at = end.next_multiple_of(ALIGN);
            (id, start..end)
        })
        .collect();
    let len = at.next_multiple_of(ALIGN * owners);
    let each = len / owners;
    Bucket { len, params, last_unit, own: owner * each..(owner + 1) * each }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::architecture::Packing;
    use crate::model::sharding::tests::arch;

    #[test]
    fn every_parameter_has_a_place_and_owners_cover_the_buckets() {
        let table = Table::new(&arch(Packing::Separate, true), 2, 1, true).unwrap();
        for (size, owners) in [(1, 1), (2000, 3), (usize::MAX, 4)] {
            let layouts: Vec<Layout> = (0..owners).map(|owner| Layout::new(&table, size, owners, owner)).collect();
            let layout = &layouts[0];
            let mut placed = 0;
            for (index, bucket) in layout.buckets.iter().enumerate() {
                let mut end = 0;
                for (id, range) in &bucket.params {
                    assert!(range.start >= end && range.start % ALIGN == 0);
                    assert_eq!(layout.places[*id], Some((index, range.start)));
                    assert_eq!(range.len() as i64, table.params[*id].num_elements());
                    assert!(table.params[*id].unit >= bucket.last_unit);
                    end = range.end;
                    placed += 1;
                }
                assert!(end <= bucket.len);
                let owned: Vec<usize> = layouts.iter().flat_map(|layout| layout.buckets[index].own.clone()).collect();
                assert_eq!(owned, (0..bucket.len).collect::<Vec<_>>());
            }
            assert_eq!(placed, table.params.len());
            let units: Vec<usize> = layout.buckets.iter().map(|bucket| bucket.last_unit).collect();
            assert!(units.is_sorted_by(|a, b| a > b), "{units:?}");
        }
    }

    #[test]
    fn classes_are_consecutive() {
        let table = Table::new(&arch(Packing::Fused, false), 1, 0, false).unwrap();
        let layout = Layout::new(&table, usize::MAX, 1, 0);
        let bucket = &layout.buckets[0];
        let classes =
            [Class::Matrix, Class::Bias, Class::PartialVector, Class::Vector].map(|c| bucket.class(&table, c));
        assert!(classes.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert_eq!(bucket.owned(&classes[3]), classes[3]);
    }

    #[test]
    fn what_is_not_trained_lies_in_no_bucket() {
        let mut table = Table::new(&arch(Packing::Separate, true), 2, 0, false).unwrap();
        let targets = ["q_proj", "v_proj", "down_proj"];
        table.adapt(|name| targets.iter().any(|target| name.contains(target)), 4, 2.0);
        let layout = Layout::new(&table, 1, 1, 0);
        assert!(layout.places[..table.own].iter().all(Option::is_none));
        assert!(layout.places[table.own..].iter().all(Option::is_some));
        assert_eq!(table.params.len() - table.own, 2 * 3 * 2);
        assert_eq!(layout.buckets.last().unwrap().last_unit, 1);
    }
}
