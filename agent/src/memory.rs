//! What the allocator keeps for itself.

/// Free bytes at the end of an arena from which they go back to the system, and the size from which
/// a piece of memory is the system's own.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 1 << 20;

/// Has the allocator give back what is free.
///
/// Loading the kernel programs takes tens of megabytes for a moment, some of them in one piece. glibc
/// takes the size of that piece for usual, and would keep twice as much in each arena for good
/// (`M_MMAP_THRESHOLD` of mallopt(3)).
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: both take any number; without effect, more is kept.
        let _ = unsafe { libc::mallopt(parameter, LARGE) };
    }
}
