//! Counting, per CPU and without atomics.

use culvert_abi::Counts;

use crate::maps::COUNTS;

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
