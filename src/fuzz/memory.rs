//! Counts what a thread allocates, so that a length that is only declared is noticed when memory is taken for it.
#![allow(unsafe_code, reason = "an allocator is unsafe to implement")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
    static TOTAL: Cell<usize> = const { Cell::new(0) };
}

fn count(size: usize) {
    // At the end of a thread there is nothing to count any more.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
    let _ = TOTAL.try_with(|total| total.set(total.get().saturating_add(size)));
}

// SAFETY: everything is handed to `System` as it came; counting neither allocates nor panics, because the cells
// are const-initialized and have no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: `pointer` came from `System`, by the functions above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System`, by the functions above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What a thread has allocated, in bytes; what it has freed does not count.
#[derive(Debug)]
pub(super) struct Taken {
    /// The largest allocation.
    pub(super) largest: usize,
    pub(super) total: usize,
}

/// What `work` allocates on this thread.
pub(super) fn taken<T>(work: impl FnOnce() -> T) -> (T, Taken) {
    LARGEST.set(0);
    TOTAL.set(0);
    let done = work();
    (done, Taken { largest: LARGEST.get(), total: TOTAL.get() })
}
