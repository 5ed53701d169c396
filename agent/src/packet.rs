//! One packet of a local socket (unix(7), `SOCK_SEQPACKET`): bytes, and the descriptors that came
//! with them.

use std::io;
use std::os::fd::OwnedFd;

use tokio_seqpacket::UnixSeqpacket;
use tokio_seqpacket::ancillary::OwnedAncillaryMessage;

/// Room for more descriptors than any of our messages may have, so that what is too much is told as
/// such; the kernel has 253 as its limit (`SCM_MAX_FD`).
pub const CONTROL_BYTES: usize = 512;

/// Space for control messages, which begin with a structure that holds a `size_t`.
#[repr(align(8))]
pub struct Control(pub [u8; CONTROL_BYTES]);

impl Default for Control {
    fn default() -> Self {
        Self([0; CONTROL_BYTES])
    }
}

/// A whole packet. The descriptors are closed with it.
#[derive(Debug)]
pub struct Packet {
    pub bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// Why there is no packet.
#[derive(Debug)]
pub enum PacketError {
    /// The other end has closed the socket.
    Closed,
    /// It had more bytes or descriptors than there was room for; what came of them is closed.
    Cut,
    Io(io::Error),
}

impl Packet {
    /// The next one, of at most `max_bytes`.
    pub async fn receive(socket: &UnixSeqpacket, max_bytes: usize) -> Result<Packet, PacketError> {
        let mut bytes = vec![0; max_bytes];
        let mut control = Control::default();
        let received = socket.recv_with_ancillary(&mut bytes, &mut control.0).await;
        let (packet, ancillary) = received.map_err(PacketError::Io)?;
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
        if cut {
            return Err(PacketError::Cut);
        }
        if packet.bytes_read() == 0 {
            return Err(PacketError::Closed);
        }
        bytes.truncate(packet.bytes_read());
        Ok(Packet { bytes, descriptors })
    }
}
