//! A relayed TCP connection that does not end cleanly by accident.

use std::io::{self, Read};
use std::net::Shutdown;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// A connection that ends with a reset unless it was declared finished: when this is dropped, and
/// also when the process is killed, for the kernel then closes it as the socket is set.
pub(super) struct Tcp(TcpStream);

impl Tcp {
    pub(super) fn new(stream: TcpStream) -> Self {
        // Without it the peer sees FIN; there is nobody to report a failure to.
        let _ = stream.set_zero_linger();
        Self(stream)
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.0
    }

    /// Both directions have ended cleanly: dropping closes in the ordinary way.
    pub(super) fn finished(&self) {
        let _ = SockRef::from(&self.0).set_linger(None);
    }
}

/// Sends FIN. The peer may have reset the connection already, which shows elsewhere.
pub(super) fn shutdown_write(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).shutdown(Shutdown::Write)
}

/// Ready when the peer resets the connection, whether or not anyone reads or writes.
pub(super) async fn broken(stream: &TcpStream) -> io::Error {
    loop {
        if let Err(error) = stream.ready(Interest::ERROR).await {
            return error;
        }
        match stream.take_error() {
            Ok(Some(error)) | Err(error) => return error,
            Ok(None) => {
                let _ = stream.try_io(Interest::ERROR, || -> io::Result<()> {
                    Err(io::ErrorKind::WouldBlock.into())
                });
            }
        }
    }
}

/// Reads what is there. A short read ends the readiness without a second system call: with
/// edge-triggered epoll, what comes later raises it again.
pub(super) fn read(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut short = None;
    let read = stream.try_io(Interest::READABLE, || {
        let count = (&*SockRef::from(stream)).read(buffer)?;
        if count > 0 && count < buffer.len() {
            short = Some(count);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    });
    match short {
        Some(count) => Ok(count),
        None => read,
    }
}
