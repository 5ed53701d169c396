//! One connection between two agents: whole messages, with descriptors and time limits.

use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use tokio::time::timeout;
use tokio_seqpacket::ancillary::AncillaryMessageWriter;
use tokio_seqpacket::{UCred, UnixSeqpacket};

use super::message::{Fault, Message};
use super::{ANSWER_LIMIT, HandoverError};
use crate::packet::{Control, Packet, PacketError};

/// The longest message.
const MAX_BYTES: usize = 64 << 10;
/// The most descriptors of one message; the kernel has 253 as its limit (`SCM_MAX_FD`).
pub(super) const MAX_DESCRIPTORS: usize = 64;

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
        let mut control = Control::default();
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
        let packet = Packet::receive(&self.0, MAX_BYTES).await.map_err(|error| match error {
            PacketError::Closed => HandoverError::Ended,
            PacketError::Cut => Fault::Truncated.into(),
            PacketError::Io(error) if is_end(&error) => HandoverError::Ended,
            PacketError::Io(error) => HandoverError::Broken(error),
        })?;
        match Message::read(&packet.bytes)? {
            Message::Refused { why } => Err(HandoverError::Refused(why)),
            message => Ok((message, packet.descriptors)),
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
