//! World = DP x TP, TP fastest. Pure arithmetic; prints as `rank 5 = dp 1/2, tp 1/4`.

use std::fmt;
use std::ops::Range;

use thiserror::Error;

/// One rank's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    pub rank: usize,
    pub tp: usize,
    pub dp: usize,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum MeshError {
    #[error("parallel.tp = {tp} does not divide the {world} ranks of this job; {hint}")]
    TpDoesNotDivide { tp: usize, world: usize, hint: String },
    #[error(
        "parallel.tp = {tp} x parallel.dp = {dp} needs {} ranks and this job has {world}; start it with `mpirun -n {}` or change dp (\"auto\" takes what there is)",
        tp * dp,
        tp * dp
    )]
    WrongWorld { tp: usize, dp: usize, world: usize },
}

impl Mesh {
    /// `dp`: None means as many as the world has room for.
    pub fn new(rank: usize, world: usize, tp: usize, dp: Option<usize>) -> Result<Self, MeshError> {
        match dp {
            Some(dp) if tp * dp != world => Err(MeshError::WrongWorld { tp, dp, world }),
            None if !world.is_multiple_of(tp) => {
                let hint = if world < tp {
                    format!("start it with `mpirun -n {tp}` (or a multiple), or lower parallel.tp")
                } else {
                    let legal: Vec<String> =
                        (1..=world).filter(|n| world.is_multiple_of(*n)).map(|n| n.to_string()).collect();
                    format!("legal values are {}", legal.join(", "))
                };
                Err(MeshError::TpDoesNotDivide { tp, world, hint })
            }
            _ => Ok(Self { rank, tp, dp: world / tp }),
        }
    }

    pub fn world(&self) -> usize {
        self.tp * self.dp
    }

    pub fn tp_rank(&self) -> usize {
        self.rank % self.tp
    }

    pub fn dp_rank(&self) -> usize {
        self.rank / self.tp
    }

    /// The ranks of this one's tensor-parallel group.
    pub fn row(&self) -> Vec<usize> {
        (0..self.tp).map(|i| self.dp_rank() * self.tp + i).collect()
    }

    /// The ranks of this one's data-parallel group.
    pub fn column(&self) -> Vec<usize> {
        (0..self.dp).map(|i| i * self.tp + self.tp_rank()).collect()
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { rank, tp, dp } = self;
        write!(f, "rank {rank} = dp {}/{dp}, tp {}/{tp}", self.dp_rank(), self.tp_rank())
    }
}

/// Part `rank` of `len` things cut into `parts` as even parts as possible; the first parts get one more.
pub fn part(len: usize, parts: usize, rank: usize) -> Range<usize> {
    let (each, extra) = (len / parts, len % parts);
    let start = rank * each + rank.min(extra);
    start..start + each + usize::from(rank < extra)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tp_is_the_fastest_axis() {
        let places: Vec<_> = (0..8).map(|rank| Mesh::new(rank, 8, 4, None).unwrap()).collect();
        assert_eq!(places[5].to_string(), "rank 5 = dp 1/2, tp 1/4");
        assert_eq!(places.iter().map(Mesh::tp_rank).collect::<Vec<_>>(), [0, 1, 2, 3, 0, 1, 2, 3]);
    }

    #[test]
    fn impossible_meshes_say_what_is_possible() {
        let message = Mesh::new(0, 6, 4, None).unwrap_err().to_string();
        assert!(message.contains("legal values are 1, 2, 3, 6"), "{message}");
        let message = Mesh::new(0, 1, 2, None).unwrap_err().to_string();
        assert!(message.contains("mpirun -n 2"), "{message}");
        let message = Mesh::new(0, 4, 2, Some(4)).unwrap_err().to_string();
        assert!(message.contains("needs 8 ranks and this job has 4"), "{message}");
    }

    #[test]
    fn parts_cover_everything_once() {
        for (len, parts) in [(10, 3), (3, 4), (101, 4), (0, 2)] {
            let all: Vec<usize> = (0..parts).flat_map(|rank| part(len, parts, rank)).collect();
            assert_eq!(all, (0..len).collect::<Vec<_>>());
        }
    }
}
