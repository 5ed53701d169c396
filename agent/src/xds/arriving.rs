//! The resources of a large response, taken over on one thread while another one receives them.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::read::{Piece, Resource};
use super::wire::Response;

/// Groups of pieces that wait to be taken; each is what one frame of the connection completed.
pub(super) const WAITING: usize = 64;
/// While fewer wait, whoever takes them over has time to read them too.
pub(super) const FEW: usize = 2;
/// How long one publication may wait for more: others cannot publish meanwhile.
const SECTION: Duration = Duration::from_secs(1);

/// One response. Gives its resources section by section: the iterator ends with each.
pub(super) struct Arriving {
    runtime: Handle,
    groups: mpsc::Receiver<Vec<Piece>>,
    group: std::vec::IntoIter<Piece>,
    until: Instant,
    state: State,
}

/// How far it is.
#[derive(Debug)]
enum State {
    /// There may be more.
    Open,
    /// All resources were given, and this is the rest.
    Whole(Response),
    /// It broke off.
    Broken,
}

impl Arriving {
    /// To be taken outside of `runtime`'s own threads, which it may block.
    pub fn new(runtime: Handle, groups: mpsc::Receiver<Vec<Piece>>) -> Self {
        let until = Instant::now() + SECTION;
        Self { runtime, groups, group: Vec::new().into_iter(), until, state: State::Open }
    }

    /// Waits until there is something for a section, and begins it. Whether there is one.
    pub fn begin_section(&mut self) -> bool {
        if self.group.as_slice().is_empty() && matches!(self.state, State::Open) {
            match self.groups.blocking_recv() {
                Some(group) => self.group = group.into_iter(),
                None => self.state = State::Broken,
            }
        }
        self.until = Instant::now() + SECTION;
        matches!(self.state, State::Open)
    }

    /// The rest of the response, if it came whole.
    pub fn end(self) -> Option<Response> {
        match self.state {
            State::Whole(rest) => Some(rest),
            State::Open | State::Broken => None,
        }
    }

    fn group(&mut self) -> Option<Vec<Piece>> {
        if let Ok(group) = self.groups.try_recv() {
            return Some(group);
        }
        match self.runtime.block_on(async { timeout_at(self.until, self.groups.recv()).await }) {
            Ok(Some(group)) => Some(group),
            Ok(None) => {
                self.state = State::Broken;
                None
            }
            Err(_) => None,
        }
    }
}

impl Iterator for Arriving {
    type Item = Resource;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.group.next() {
                Some(Piece::Resource(resource)) => return Some(resource),
                Some(Piece::End(rest)) => {
                    self.state = State::Whole(rest);
                    return None;
                }
                None if Instant::now() >= self.until => return None,
                None => self.group = self.group()?.into_iter(),
            }
        }
    }
}
