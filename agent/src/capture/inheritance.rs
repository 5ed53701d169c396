//! What two agents share while one hands over to the other: the pins, and the lock on them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::pins::Pins;
use super::{Capture, CaptureError, CaptureOptions};

impl Capture {
    /// The same as [`Capture::start`] on the pins of an agent that runs, which has given its locked
    /// folder. That agent must change nothing meanwhile. Both have the same maps, and the programs
    /// are this agent's from here on. Until [`Capture::own`] the lock is the other agent's.
    pub fn inherit(options: &CaptureOptions, lock: OwnedFd) -> Result<Capture, CaptureError> {
        Capture::start_on(Pins::inherit(&options.pin_path, lock)?, options)
    }

    /// The locked folder of pins, for the next agent.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.pins.lock().as_fd()
    }

    /// Whether the pins are this agent's, and no other's.
    pub fn is_ours(&self) -> bool {
        self.pins.is_ours()
    }

    /// What was given on loan is this agent's.
    pub fn own(&self) -> Result<(), CaptureError> {
        self.pins.own()
    }

    /// The pins are another agent's: this one must not change the maps any more.
    pub fn give_away(&self) {
        self.pins.give_away();
    }

    /// Lets the next agent have the pins. This one must not change the maps any more.
    pub fn let_go(&self) {
        self.pins.unlock();
    }

    /// After a hand-over that failed: looks what the other agent has written. Its programs stay; they
    /// are made for the same maps.
    pub fn reread(&self) -> Result<(), CaptureError> {
        self.maps.lock().reread()
    }
}

/// Whether no agent has the pins. For a moment this takes their lock.
pub fn is_unattended(pin_path: &Path) -> bool {
    matches!(Pins::open_existing(pin_path), Ok(Some(_)))
}
