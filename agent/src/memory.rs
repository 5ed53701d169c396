//! What the allocator keeps for itself.

/// Free bytes at the end of an arena from which they go back to the system, the size from which a
/// piece of memory is the system's own, and by how much an arena grows.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 1 << 20;

/// Has the allocator give back what is free.
///
/// Loading the kernel programs takes tens of megabytes for a moment, some of them in one piece. glibc
/// takes the size of that piece for usual, and would keep twice as much in each arena for good
/// (`M_MMAP_THRESHOLD` of mallopt(3)).
///
/// Arenas grow by more than usual (`M_TOP_PAD`): each time is a call to the system for which all
/// threads wait that touch new pages. Pages that are not touched are not in memory.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD, libc::M_TOP_PAD] {
        // SAFETY: both take any number; without effect, more is kept.
        let _ = unsafe { libc::mallopt(parameter, LARGE) };
    }
}
