//! Counting, per CPU and without atomics.

use culvert_abi::Counts;
use culvert_abi::direct::DirectCounts;

use crate::maps::{COUNTS, DIRECT_COUNTS};

/// Adds one to the counter that `field` selects.
#[inline(always)]
pub fn count(field: impl FnOnce(&mut Counts) -> &mut u64) {
    if let Some(counts) = COUNTS.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's own, and no other reference to it lives here. A program
        // that interrupts this one on the same CPU may cost a count, nothing else.
        let counter = unsafe { field(&mut *counts) };
        *counter = counter.wrapping_add(1);
    }
}

/// The same for direct connections.
#[inline(always)]
pub fn count_direct(field: impl FnOnce(&mut DirectCounts) -> &mut u64) {
    if let Some(counts) = DIRECT_COUNTS.get_ptr_mut(0) {
        // SAFETY: as above.
        let counter = unsafe { field(&mut *counts) };
        *counter = counter.wrapping_add(1);
    }
}
