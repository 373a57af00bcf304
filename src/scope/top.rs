//! The largest of all ranks' keys, exactly, without bringing them together: a radix selection over histograms.
//!
//! Two passes of 16 bits find the key of the last one chosen, four more (only where not all of its equals are chosen) the place in the
//! model up to which they are. So the choice depends on keys and places alone, never on who holds them.

use crate::dist::{Reduce, World};

const BINS: usize = 1 << 16;

/// The boundary of a choice: larger keys are chosen, of equal ones those with a smaller id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub key: u32,
    pub id: u64,
}

impl Cut {
    /// Chooses nothing.
    pub const NOTHING: Self = Self { key: u32::MAX, id: 0 };

    pub fn chooses(self, key: u32, id: u64) -> bool {
        key > self.key || (key == self.key && id < self.id)
    }
}

/// Finds the cut that chooses the `count` largest. `each(visit)` shows this rank's `(key, id)` pairs, nothing where they do not count. Ids are
/// unique. All ranks call it.
pub fn largest(count: u64, each: &dyn Fn(&mut dyn FnMut(u32, u64)), world: &World) -> Cut {
    if count == 0 {
        return Cut::NOTHING;
    }
    let histogram = |digit: &dyn Fn(u32, u64) -> Option<usize>| {
        let mut bins = vec![0.0f64; BINS];
        each(&mut |key, id| {
            if let Some(bin) = digit(key, id) {
                bins[bin] += 1.0;
            }
        });
        world.world.all_reduce_f64(&mut bins, Reduce::Sum);
        bins
    };
    // counts are whole numbers below 2^53
    let mut left = count;
    let mut high_bin = |bins: Vec<f64>| {
        for (bin, &n) in bins.iter().enumerate().rev() {
            if left <= n as u64 {
                return bin;
            }
            left -= n as u64;
        }
        0
    };
    let high = high_bin(histogram(&|key, _| Some((key >> 16) as usize)));
    let bins = histogram(&|key, _| ((key >> 16) as usize == high).then_some((key & 0xffff) as usize));
    let low = high_bin(bins.clone());
    let key = (high << 16 | low) as u32;
    if left == bins[low] as u64 {
        return Cut { key, id: u64::MAX };
    }
    // the `left` smallest ids among the equals
    let mut prefix = 0u64;
    for shift in [48, 32, 16, 0] {
        let bins = histogram(&|other, id| {
            let same = other == key && id.checked_shr(shift + 16).unwrap_or(0) == prefix;
            same.then_some((id >> shift & 0xffff) as usize)
        });
        let mut bin = 0;
        while (bins[bin] as u64) < left {
            left -= bins[bin] as u64;
            bin += 1;
        }
        prefix = prefix << 16 | bin as u64;
    }
    Cut { key, id: prefix + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::init::Stream;

    /// Against sorting, with many equal keys, and none.
    #[test]
    fn it_is_the_choice_of_a_sort() {
        let world = World::solo();
        for modulus in [3, 1000, u64::MAX] {
            let stream = Stream::new(modulus, "keys");
            let pairs: Vec<(u32, u64)> =
                (0..5000).map(|i| (((stream.bits(i) % modulus) >> 20) as u32, i * 77_777_777 % (1 << 44))).collect();
            let mut sorted = pairs.clone();
            sorted.sort_by_key(|&(key, id)| (std::cmp::Reverse(key), id));
            for count in [0, 1, 2, 499, 2500, 4999, 5000] {
                let cut = largest(count as u64, &|visit| pairs.iter().for_each(|&(key, id)| visit(key, id)), &world);
                let mut chosen: Vec<_> = pairs.iter().copied().filter(|&(key, id)| cut.chooses(key, id)).collect();
                chosen.sort_by_key(|&(key, id)| (std::cmp::Reverse(key), id));
                assert_eq!(chosen, sorted[..count], "{modulus} {count}");
            }
        }
    }
}
