//! Loops over libtorch's own thread pool, so that Rust kernels and libtorch's kernels never compete for cores.

use std::any::Any;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;

unsafe extern "C" {
    fn torch_parallel_for(
        begin: i64,
        end: i64,
        grain: i64,
        func: extern "C-unwind" fn(i64, i64, *mut c_void),
        ctx: *mut c_void,
    ) -> i32;
}

struct Task<'a> {
    body: &'a (dyn Fn(Range<usize>) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

extern "C-unwind" fn trampoline(begin: i64, end: i64, ctx: *mut c_void) {
    // SAFETY: `for_range` passes a `Task` that outlives the parallel loop.
    let task = unsafe { &*ctx.cast::<Task>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (task.body)(begin as usize..end as usize))) {
        *task.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(panic);
    }
}

/// Calls `body` on disjoint ranges that together are `0..len`, on up to libtorch's number of threads.
///
/// `grain`: smallest range worth a thread. A panic in `body` is raised again here.
pub fn for_range(len: usize, grain: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
    if len == 0 {
        return;
    }
    let task = Task { body, panic: Mutex::new(None) };
    // SAFETY: the loop returns only when all ranges are done, so `task` outlives every use; `trampoline` never unwinds.
    let code = unsafe {
        torch_parallel_for(0, len as i64, grain.max(1) as i64, trampoline, std::ptr::from_ref(&task).cast_mut().cast())
    };
    assert_eq!(code, 0, "invariant: torch_parallel_for accepts any non-empty range");
    if let Some(panic) = task.panic.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

/// A slice cut into chunks of equal length (the last may be shorter) that several threads write, each its own chunks.
pub struct Chunks<'a, T> {
    start: *mut T,
    len: usize,
    chunk: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: `Chunks` only hands out chunks that the parallel loop made disjoint, and T itself may be sent.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    pub fn new(slice: &'a mut [T], chunk: usize) -> Self {
        assert!(chunk > 0 || slice.is_empty(), "invariant: chunks are not empty");
        Self { start: slice.as_mut_ptr(), len: slice.len(), chunk: chunk.max(1), slice: PhantomData }
    }
}

/// What a parallel loop writes: chunks, or several outputs with the same number of chunks, some of them absent.
pub trait Output: Sync {
    type Chunk;

    /// None where there is nothing to write.
    fn count(&self) -> Option<usize>;

    /// # Safety
    ///
    /// Every index is below the count and used once in the output's life.
    unsafe fn chunk(&self, index: usize) -> Self::Chunk;
}

impl<'a, T: Send> Output for Chunks<'a, T> {
    type Chunk = &'a mut [T];

    fn count(&self) -> Option<usize> {
        Some(self.len.div_ceil(self.chunk))
    }

    unsafe fn chunk(&self, index: usize) -> &'a mut [T] {
        let begin = index * self.chunk;
        let end = (begin + self.chunk).min(self.len);
        // SAFETY: begin..end lies inside the slice; see the function's contract for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(begin), end - begin) }
    }
}

impl<O: Output> Output for Option<O> {
    type Chunk = Option<O::Chunk>;

    fn count(&self) -> Option<usize> {
        self.as_ref().and_then(Output::count)
    }

    unsafe fn chunk(&self, index: usize) -> Self::Chunk {
        // SAFETY: the same contract.
        self.as_ref().map(|output| unsafe { output.chunk(index) })
    }
}

macro_rules! several {
    ($($name:ident $at:tt),*) => {
        impl<$($name: Output),*> Output for ($($name,)*) {
            type Chunk = ($($name::Chunk,)*);

            fn count(&self) -> Option<usize> {
                let counts = [$(self.$at.count()),*];
                let mut present = counts.into_iter().flatten();
                let first = present.next();
                assert!(present.all(|n| Some(n) == first), "invariant: outputs of one loop have the same number of chunks");
                first
            }

            unsafe fn chunk(&self, index: usize) -> Self::Chunk {
                // SAFETY: the same contract.
                unsafe { ($(self.$at.chunk(index),)*) }
            }
        }
    };
}
several!(A 0, B 1);
several!(A 0, B 1, C 2);
several!(A 0, B 1, C 2, D 3);

/// Calls `body(i, chunk i of each output)` for all chunks, in parallel.
///
/// `grain`: smallest number of chunks worth a thread.
pub fn for_outputs<O: Output>(outputs: O, grain: usize, body: impl Fn(usize, O::Chunk) + Sync) {
    for_range(outputs.count().unwrap_or(0), grain, &|range| {
        for index in range {
            // SAFETY: `for_range` calls with disjoint ranges inside 0..count.
            body(index, unsafe { outputs.chunk(index) });
        }
    });
}

/// Calls `body(i, chunk i of out)` for all chunks of `chunk` elements, in parallel.
///
/// `grain`: smallest number of chunks worth a thread.
pub fn for_chunks<T: Send>(out: &mut [T], chunk: usize, grain: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    for_outputs(Chunks::new(out, chunk), grain, body);
}

/// As [`for_chunks`] with two outputs that have the same number of chunks.
pub fn for_chunks2<A: Send, B: Send>(
    (first, first_chunk): (&mut [A], usize),
    (second, second_chunk): (&mut [B], usize),
    grain: usize,
    body: impl Fn(usize, &mut [A], &mut [B]) + Sync,
) {
    let outputs = (Chunks::new(first, first_chunk), Chunks::new(second, second_chunk));
    for_outputs(outputs, grain, |index, (a, b)| body(index, a, b));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_written_once() {
        let (mut out, mut counts) = (vec![0usize; 1001], vec![0u8; 334]);
        for_chunks2((&mut out, 3), (&mut counts, 1), 7, |index, part, count| {
            part.iter_mut().for_each(|x| *x += index + 1);
            count[0] += part.len() as u8;
        });
        assert!(out.iter().enumerate().all(|(i, &x)| x == i / 3 + 1));
        assert_eq!(counts.iter().map(|&n| usize::from(n)).sum::<usize>(), 1001);
    }

    #[test]
    fn a_panic_inside_comes_out() {
        let caught = catch_unwind(|| for_range(10, 1, &|range| assert!(!range.contains(&7), "seven")));
        assert!(caught.is_err());
    }
}
