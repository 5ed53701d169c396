//! One connection between two agents: whole messages, with descriptors and time limits.

use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use tokio::time::timeout;
use tokio_seqpacket::ancillary::{AncillaryMessageWriter, OwnedAncillaryMessage};
use tokio_seqpacket::{UCred, UnixSeqpacket};

use super::message::{Fault, Message};
use super::{ANSWER_LIMIT, HandoverError};

/// The longest message.
const MAX_BYTES: usize = 16 << 10;
/// The most descriptors of one message; the kernel has 253 as its limit (`SCM_MAX_FD`).
pub(super) const MAX_DESCRIPTORS: usize = 64;
/// Room for somewhat more, so that what is too much is told as such.
const CONTROL_BYTES: usize = 512;

/// Control messages begin with a structure that holds a `size_t`.
#[repr(align(8))]
struct Control([u8; CONTROL_BYTES]);

#[derive(Debug)]
pub(super) struct Channel(UnixSeqpacket);

impl Channel {
    /// Only with root, or the own user, at the other end.
    pub fn new(socket: UnixSeqpacket) -> Result<Channel, HandoverError> {
        let peer = socket.peer_cred().map_err(HandoverError::Broken)?.uid();
        if peer != 0 && peer != UCred::from_current_process().uid() {
            return Err(HandoverError::Foreign(peer));
        }
        Ok(Channel(socket))
    }

    pub async fn send(
        &self,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), HandoverError> {
        let bytes = message.to_bytes();
        let mut control = Control([0; CONTROL_BYTES]);
        let mut ancillary = AncillaryMessageWriter::new(&mut control.0);
        if !descriptors.is_empty() {
            let added = ancillary.add_fds(descriptors);
            let failed = |_| HandoverError::Broken(io::Error::other("too many descriptors"));
            added.map_err(failed)?;
        }
        let slices = [IoSlice::new(&bytes)];
        let sending = self.0.send_vectored_with_ancillary(&slices, &mut ancillary);
        match timeout(ANSWER_LIMIT, sending).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if is_end(&error) => Err(HandoverError::Ended),
            Ok(Err(error)) => Err(HandoverError::Broken(error)),
            Err(_) => Err(HandoverError::Silent(ANSWER_LIMIT)),
        }
    }

    /// The next message, whenever it comes. A refusal is an error.
    pub async fn receive(&self) -> Result<(Message, Vec<OwnedFd>), HandoverError> {
        let mut bytes = vec![0; MAX_BYTES];
        let mut control = Control([0; CONTROL_BYTES]);
        let received = self.0.recv_with_ancillary(&mut bytes, &mut control.0).await;
        let (packet, ancillary) = received.map_err(|error| match is_end(&error) {
            true => HandoverError::Ended,
            false => HandoverError::Broken(error),
        })?;
        let cut = packet.truncated() || packet.ancillary_truncated();
        // Whatever happens next, these are closed if they are not wanted.
        let descriptors: Vec<OwnedFd> = ancillary
            .into_messages()
            .filter_map(|message| match message {
                OwnedAncillaryMessage::FileDescriptors(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if packet.bytes_read() == 0 && !cut {
            return Err(HandoverError::Ended);
        }
        if cut {
            return Err(Fault::Truncated.into());
        }
        match Message::read(bytes.get(..packet.bytes_read()).unwrap_or_default())? {
            Message::Refused { why } => Err(HandoverError::Refused(why)),
            message => Ok((message, descriptors)),
        }
    }

    pub async fn receive_within(
        &self,
        limit: Duration,
    ) -> Result<(Message, Vec<OwnedFd>), HandoverError> {
        timeout(limit, self.receive()).await.unwrap_or(Err(HandoverError::Silent(limit)))
    }

    /// Tells why this is the end. Who does not hear it learns of the end anyway.
    pub async fn refuse(&self, why: &(dyn std::fmt::Display + Sync)) {
        let _ = self.send(&Message::Refused { why: why.to_string() }, &[]).await;
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}
