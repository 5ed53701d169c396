//! A safe face of epoll (level-triggered), for load generators that hold many connections.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::sys::check;

/// What to be woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Bytes, an end of file or an error to read.
    Read,
    /// Room to write, or a connect that ended.
    Write,
}

/// A set of watched descriptors. A closed descriptor leaves the set by itself.
#[derive(Debug)]
pub struct Poll {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Poll {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: epoll_create1 takes a plain number.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the descriptor is new and owned by nobody else.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { epoll, events: vec![libc::epoll_event { events: 0, u64: 0 }; 256] })
    }

    /// Starts watching `fd`; `key` names it in [`Poll::wait`].
    pub fn add(&self, fd: impl AsFd, key: usize, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, key, interest)
    }

    /// Watches a known `fd` for something else.
    pub fn change(&self, fd: impl AsFd, key: usize, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, key, interest)
    }

    /// Waits until something happened, at most `limit`, and gives the keys it happened to.
    pub fn wait(&mut self, limit: Duration) -> io::Result<impl Iterator<Item = usize> + use<>> {
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        let (events, room) = (self.events.as_mut_ptr(), self.events.len() as i32);
        // SAFETY: the kernel writes at most `room` events to live memory.
        let got = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events, room, limit) };
        let ready = match check(got) {
            Ok(ready) => ready as usize,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let keys: Vec<usize> = self.events.iter().take(ready).map(|e| e.u64 as usize).collect();
        Ok(keys.into_iter())
    }

    fn control(&self, what: i32, fd: impl AsFd, key: usize, interest: Interest) -> io::Result<()> {
        let events = match interest {
            Interest::Read => libc::EPOLLIN as u32,
            Interest::Write => libc::EPOLLOUT as u32,
        };
        let mut event = libc::epoll_event { events, u64: key as u64 };
        let (epoll, fd) = (self.epoll.as_raw_fd(), fd.as_fd().as_raw_fd());
        // SAFETY: both descriptors are open and the event is copied by the kernel.
        check(unsafe { libc::epoll_ctl(epoll, what, fd, &raw mut event) }).map(drop)
    }
}
