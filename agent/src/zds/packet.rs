//! One packet of the socket: bytes, and the descriptors that came with them.

use std::io;
use std::os::fd::OwnedFd;

use tokio_seqpacket::UnixSeqpacket;
use tokio_seqpacket::ancillary::OwnedAncillaryMessage;

use super::protocol::Fault;

/// The longest message of the protocol.
const MAX_BYTES: usize = 1024;
/// Room for more descriptors than a message may have, so that what is too much is told as such.
const CONTROL_BYTES: usize = 64;

/// Control messages begin with a structure that holds a `size_t`.
#[repr(align(8))]
struct Control([u8; CONTROL_BYTES]);

/// A whole packet. The descriptors are closed with it.
#[derive(Debug)]
pub struct Packet {
    pub bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// Why there is no further packet.
#[derive(Debug)]
pub enum PacketError {
    Closed,
    Io(io::Error),
}

impl Packet {
    /// The next one; a fault, when it is not whole.
    pub async fn receive(socket: &UnixSeqpacket) -> Result<Result<Packet, Fault>, PacketError> {
        let mut bytes = vec![0; MAX_BYTES];
        let mut control = Control([0; CONTROL_BYTES]);
        let received = socket.recv_with_ancillary(&mut bytes, &mut control.0).await;
        let (message, ancillary) = received.map_err(PacketError::Io)?;
        let cut = message.truncated() || message.ancillary_truncated();
        // Whatever happens next, these are closed with the packet.
        let descriptors: Vec<OwnedFd> = ancillary
            .into_messages()
            .filter_map(|message| match message {
                OwnedAncillaryMessage::FileDescriptors(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if message.bytes_read() == 0 && !cut {
            return Err(PacketError::Closed);
        }
        bytes.truncate(message.bytes_read());
        Ok(if cut { Err(Fault::Truncated) } else { Ok(Packet { bytes, descriptors }) })
    }
}
