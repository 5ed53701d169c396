//! Moves bytes between two sockets inside the kernel: splice(2) through a pipe.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::net::TcpStream;

/// Bytes a pipe holds.
const PIPE: usize = 256 << 10;

/// Empty pipes that a thread keeps for the next connection.
const KEPT: usize = 16;

thread_local! {
    static EMPTY: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe on its way from one socket to another; it goes back to its thread's store when dropped
/// empty.
pub(super) struct Splice {
    pipe: Option<Pipe>,
    filled: usize,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Splice {
    pub(super) fn new() -> io::Result<Self> {
        let kept = EMPTY.with_borrow_mut(Vec::pop);
        let pipe = match kept {
            Some(pipe) => pipe,
            None => Pipe::open()?,
        };
        Ok(Self { pipe: Some(pipe), filled: 0 })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Takes in what the socket has. Neither 0 nor that it would block says anything about the
    /// socket, which has to be read in the ordinary way then: urgent data stops splice(2) like an
    /// end or a lack of data does. Call it with an empty pipe only.
    pub(super) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        let Some(pipe) = &self.pipe else { return Ok(0) };
        let count = splice(from, &pipe.write, PIPE)?;
        self.filled += count;
        Ok(count)
    }

    /// Passes on what the pipe holds, as far as the socket takes it.
    pub(super) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let Some(pipe) = &self.pipe else { return Ok(0) };
        let count = to.try_io(Interest::WRITABLE, || splice(&pipe.read, to, self.filled))?;
        self.filled = self.filled.saturating_sub(count);
        Ok(count)
    }
}

impl Drop for Splice {
    fn drop(&mut self) {
        let Some(pipe) = self.pipe.take() else { return };
        if self.filled == 0 {
            EMPTY.with_borrow_mut(|kept| {
                if kept.len() < KEPT {
                    kept.push(pipe);
                }
            });
        }
    }
}

impl Pipe {
    fn open() -> io::Result<Self> {
        let mut ends = [-1; 2];
        // SAFETY: `ends` has room for the two descriptors that pipe2(2) writes.
        let result = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let [read, write] = ends;
        // SAFETY: pipe2(2) succeeded, so both are open and owned by nobody else.
        let pipe = unsafe {
            Pipe { read: OwnedFd::from_raw_fd(read), write: OwnedFd::from_raw_fd(write) }
        };
        // A user's pipes may together exceed a limit; then this one stays at its 64 KiB.
        // SAFETY: F_SETPIPE_SZ takes an int and touches no memory of ours.
        unsafe { libc::fcntl(pipe.write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE as libc::c_int) };
        Ok(pipe)
    }
}

/// splice(2) without blocking; at most `length` bytes.
fn splice(from: &impl AsFd, to: &impl AsFd, length: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE;
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: both descriptors are borrowed for the call; null offsets are allowed for sockets and
    // pipes, so no memory of ours is touched.
    let count = unsafe {
        libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), length, flags)
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}
