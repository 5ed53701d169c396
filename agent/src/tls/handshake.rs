//! Handshakes of the TLS library over any stream, up to the keys that they leave.

use std::io;
use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{
    ClientConfig, CommonState, ConnectionTrafficSecrets, Error, ExtractedSecrets, ServerConfig,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::config;

/// What a handshake leaves.
pub(super) struct Finished {
    pub(super) secrets: ExtractedSecrets,
    pub(super) keys: Box<dyn KeySchedule>,
    /// The peer's certificates, leaf first.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// What came behind the handshake, still encrypted.
    pub(super) rest: Vec<u8>,
    /// The peer is the server, which may send tickets.
    pub(super) tickets: bool,
}

/// Gives the keys that follow (RFC 8446 section 7.2).
pub(super) trait KeySchedule: Send + Sync {
    fn next_sending(&mut self) -> Result<ConnectionTrafficSecrets, Error>;
    fn next_receiving(&mut self) -> Result<ConnectionTrafficSecrets, Error>;
}

impl<Data: Send + Sync> KeySchedule for KernelConnection<Data> {
    fn next_sending(&mut self) -> Result<ConnectionTrafficSecrets, Error> {
        self.update_tx_secret().map(|(_, secrets)| secrets)
    }

    fn next_receiving(&mut self) -> Result<ConnectionTrafficSecrets, Error> {
        self.update_rx_secret().map(|(_, secrets)| secrets)
    }
}

/// As the accepting side.
pub(super) async fn accept<S>(stream: &mut S, config: Arc<ServerConfig>) -> io::Result<Finished>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let session = UnbufferedServerConnection::new(config).map_err(failure)?;
    shake_hands(stream, session).await
}

/// As the connecting side.
pub(super) async fn connect<S>(stream: &mut S, config: Arc<ClientConfig>) -> io::Result<Finished>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = config::unsent_server_name();
    let session = UnbufferedClientConnection::new(config, name).map_err(failure)?;
    shake_hands(stream, session).await
}

/// One role of the TLS library's handshake.
trait Role {
    const TICKETS: bool;
    type Data: 'static;
    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn KeySchedule>), Error>;
}

impl Role for UnbufferedClientConnection {
    const TICKETS: bool = true;
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(bytes)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn KeySchedule>), Error> {
        let (secrets, keys) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Box::new(keys)))
    }
}

impl Role for UnbufferedServerConnection {
    const TICKETS: bool = false;
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(bytes)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn KeySchedule>), Error> {
        let (secrets, keys) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Box::new(keys)))
    }
}

/// What to do after one step of the library.
enum Next {
    Continue,
    Send,
    Receive,
    /// Both sides may send.
    Done,
    Fail(Error),
}

/// Bytes that came, of which the library is shown record after record: what follows the handshake
/// is not for it.
#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    shown: usize,
}

impl Incoming {
    /// Shows the library one more record, if there is a whole one.
    fn show_record(&mut self) -> bool {
        let hidden = self.bytes.get(self.shown..).unwrap_or_default();
        let Some([_, _, _, high, low]) = hidden.first_chunk::<5>() else { return false };
        let length = 5 + usize::from(u16::from_be_bytes([*high, *low]));
        // Whatever is no record is shown as well, for the library to say so.
        let is_whole = hidden.len() >= length || !matches!(hidden.first(), Some(20..=23));
        if is_whole {
            self.shown = self.bytes.len().min(self.shown + length);
        }
        is_whole
    }

    fn discard(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
        self.shown = self.shown.saturating_sub(count);
    }
}

async fn shake_hands<S, R>(stream: &mut S, mut session: R) -> io::Result<Finished>
where
    S: AsyncRead + AsyncWrite + Unpin,
    R: Role,
{
    let mut incoming = Incoming::default();
    let mut outgoing = Vec::new();
    loop {
        match step(&mut session, &mut incoming, &mut outgoing) {
            Next::Continue => {}
            Next::Send => send(stream, &mut outgoing).await?,
            Next::Receive => {
                if !incoming.show_record() && stream.read_buf(&mut incoming.bytes).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Next::Done => break,
            Next::Fail(error) => {
                say_why(stream, &mut session, &mut incoming, &mut outgoing).await;
                return Err(failure(error));
            }
        }
    }
    send(stream, &mut outgoing).await?;
    let chain = session.common().peer_certificates().unwrap_or_default();
    let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
    let (secrets, keys) = session.finish().map_err(failure)?;
    let rest = incoming.bytes.split_off(incoming.shown);
    Ok(Finished { secrets, keys, chain, rest, tickets: R::TICKETS })
}

fn step<R: Role>(session: &mut R, incoming: &mut Incoming, outgoing: &mut Vec<u8>) -> Next {
    let shown = incoming.bytes.get_mut(..incoming.shown).unwrap_or_default();
    let UnbufferedStatus { discard, state } = session.process(shown);
    let mut next = match state {
        Err(error) => Next::Fail(error),
        Ok(ConnectionState::EncodeTlsData(mut data)) => match encode(&mut data, outgoing) {
            Ok(()) => Next::Continue,
            Err(error) => Next::Fail(error),
        },
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // From here on the bytes are ours to send.
            data.done();
            Next::Send
        }
        Ok(ConnectionState::BlockedHandshake) => Next::Receive,
        Ok(ConnectionState::WriteTraffic(_)) => Next::Done,
        Ok(_) => Next::Fail(Error::General("unexpected end of the handshake".to_owned())),
    };
    incoming.discard(discard);
    if matches!(next, Next::Done) && session.common().is_handshaking() {
        next = Next::Receive;
    }
    next
}

fn encode<Data>(data: &mut EncodeTlsData<'_, Data>, out: &mut Vec<u8>) -> Result<(), Error> {
    let before = out.len();
    let needed = match data.encode(&mut []) {
        Ok(_) => return Ok(()),
        Err(EncodeError::InsufficientSize(needed)) => needed.required_size,
        Err(error @ EncodeError::AlreadyEncoded) => return Err(Error::General(error.to_string())),
    };
    out.resize(before + needed, 0);
    let room = out.get_mut(before..).unwrap_or_default();
    data.encode(room).map(drop).map_err(|error| Error::General(error.to_string()))
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, outgoing: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(outgoing).await?;
    outgoing.clear();
    stream.flush().await
}

/// Sends the alert with which the library refuses the peer.
async fn say_why<S, R>(
    stream: &mut S,
    session: &mut R,
    incoming: &mut Incoming,
    outgoing: &mut Vec<u8>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    R: Role,
{
    // It comes first. With another step the library would look at the same bytes again.
    step(session, incoming, outgoing);
    // Who has gone needs no reason.
    let _ = send(stream, outgoing).await;
}

fn failure(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
