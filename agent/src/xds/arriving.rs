//! The resources of a large response, taken on one thread while another one receives them.

use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::frames::Part;
use super::wire::Response;

/// Groups of parts that wait to be taken; each is what one frame of the connection completed.
pub(super) const WAITING: usize = 64;
/// How long one publication may wait for more: others cannot publish meanwhile.
const SECTION: Duration = Duration::from_secs(1);

/// One response. Gives its resources section by section: the iterator ends with each.
pub(super) struct Arriving {
    runtime: Handle,
    parts: mpsc::Receiver<Vec<Part>>,
    group: std::vec::IntoIter<Part>,
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
    pub fn new(runtime: Handle, parts: mpsc::Receiver<Vec<Part>>) -> Self {
        let until = Instant::now() + SECTION;
        Self { runtime, parts, group: Vec::new().into_iter(), until, state: State::Open }
    }

    /// Waits until there is something for a section, and begins it. Whether there is one.
    pub fn begin_section(&mut self) -> bool {
        if self.group.as_slice().is_empty() && matches!(self.state, State::Open) {
            match self.parts.blocking_recv() {
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

    fn group(&mut self) -> Option<Vec<Part>> {
        if let Ok(group) = self.parts.try_recv() {
            return Some(group);
        }
        match self.runtime.block_on(async { timeout_at(self.until, self.parts.recv()).await }) {
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
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        loop {
            match self.group.next() {
                Some(Part::Resource(resource)) => return Some(resource),
                Some(Part::End(rest)) => {
                    self.state = State::Whole(rest);
                    return None;
                }
                Some(Part::Begin(_)) => {}
                None if Instant::now() >= self.until => return None,
                None => self.group = self.group()?.into_iter(),
            }
        }
    }
}
