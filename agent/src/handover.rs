//! Handing over: a new agent takes the listeners of the running one, which then finishes what it has.
//!
//! The running agent listens on a Unix socket (`SOCK_SEQPACKET`, mode 0600) and talks to nobody but
//! root and its own user. One packet is one message, JSON, with descriptors beside it (unix(7),
//! `SCM_RIGHTS`):
//!
//! | Successor | Predecessor | |
//! |---|---|---|
//! | `hello` | `hello` | both compare versions; the successor makes itself ready for as long as it takes |
//! | `give` | `pins`, `pods`, `servers`, `whole` | the predecessor goes on serving, and enrols and withdraws nothing |
//! | `take` | `yours` | from here on the successor accepts, and the predecessor does not |
//! | `let_go` | – | instead of `give`, where versions differ: the predecessor stops and frees the pins |
//!
//! Whoever cannot go on says `refused`, and closes. A predecessor that hears no `take` goes on as
//! before. A successor whose predecessor ends without a word has no other to wait for, and goes on
//! with what it was given.

mod channel;
mod estate;
mod message;
mod predecessor;
mod successor;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use estate::{GivenPod, GivenPods, Heirloom};
pub use message::{Fault, Greeting, Message, Mismatch, PROTOCOL, PodNames, PodTold, Role};
pub use predecessor::{Asked, Estate, Socket, Wish, serve};
pub use successor::{Bequest, Predecessor, find};

/// How long each side waits for a message that must come at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long a predecessor waits for `take`: the successor loads programs for each pod meanwhile.
const TAKE_LIMIT: Duration = Duration::from_secs(30);

/// Why a hand-over did not take place. The agent that served goes on serving, unless it has ended.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("hand-over socket {path:?}: {error}")]
    Socket { path: PathBuf, error: io::Error },
    #[error("the process at the other end belongs to user {0}")]
    Foreign(u32),
    #[error("the other agent has ended")]
    Ended,
    #[error("the connection to the other agent broke: {0}")]
    Broken(io::Error),
    #[error("the other agent has not answered for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the other agent broke the protocol: {0}")]
    Fault(#[from] Fault),
    #[error("the other agent refuses: {0}")]
    Refused(String),
}

#[cfg(test)]
mod tests;
