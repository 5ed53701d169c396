//! What the process holds and does not need: free memory of the allocator, and pages of the program.

use std::ffi::{c_int, c_void};

/// Free bytes at the end of an arena from which they go back to the system, the size from which a
/// piece of memory is the system's own, and by how much an arena grows.
#[cfg(target_env = "gnu")]
const LARGE: c_int = 1 << 20;

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
        // SAFETY: each takes any number; without effect, more is kept.
        let _ = unsafe { libc::mallopt(parameter, LARGE) };
    }
}

/// Lets go of what only the start needed: what the allocator has free between pieces in use, and the
/// pages of the program and its libraries.
///
/// Those pages stay in the kernel's page cache, from where the ones that are still used come back when
/// they are touched, sixteen at a time. The others no longer count as this process's, and the kernel
/// may use their memory when it is short of it.
pub fn settle() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes any number, and moves nothing that is in use.
    let _ = unsafe { libc::malloc_trim(0) };
    // SAFETY: the function is called before this returns, and is given no data of ours.
    let _ = unsafe { libc::dl_iterate_phdr(Some(let_go), std::ptr::null_mut()) };
}

/// Unmaps the pages of one object's segments that nobody can have written to.
///
/// # Safety
///
/// For dl_iterate_phdr(3), which calls it with the description of a loaded object.
unsafe extern "C" fn let_go(object: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: the description, and the headers that it names, are there for the time of this call.
    let (base, headers) = unsafe {
        let object = &*object;
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr, headers)
    };
    // SAFETY: it only asks.
    let Ok(page) = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) else { return 0 };
    let is_constant = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
    };
    for header in headers.iter().filter(is_constant) {
        // Whole pages of the segment: what lies beside it may be another one's.
        let start = (base + header.p_vaddr).next_multiple_of(page);
        let end = (base + header.p_vaddr + header.p_memsz) / page * page;
        let length = end.saturating_sub(start) as usize;
        // SAFETY: the range is a part of one mapping of a file, private and never writable, so that
        // each of its pages comes from the file again when it is touched (madvise(2)).
        let _ = unsafe { libc::madvise(start as *mut c_void, length, libc::MADV_DONTNEED) };
    }
    0
}

#[cfg(test)]
mod tests;
