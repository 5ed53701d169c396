//! The other end of the load: answers requests on one port, swallows streams on the next.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_lab::poll::{Interest, Poll};

/// The length of a request and of its answer.
pub const MESSAGE: usize = 64;
/// The first byte of a request after which the server is to close.
pub const CLOSE: u8 = b'c';
/// The first byte of any other request.
pub const KEEP: u8 = b'k';

/// Answer the load of a benchmark
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The port for requests; streams go to the next
    #[arg(long)]
    port: u16,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let requests = TcpListener::bind((Ipv6Addr::UNSPECIFIED, arguments.port))?;
    let streams = TcpListener::bind((Ipv6Addr::UNSPECIFIED, arguments.port + 1))?;
    std::thread::spawn(move || {
        for stream in streams.incoming().flatten() {
            std::thread::spawn(move || swallow(stream));
        }
    });
    answer(&requests)
}

/// Reads to the end and then says how much that was, as eight bytes.
fn swallow(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0u64;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => total += got as u64,
            // Blocking calls may give up on accelerated connections.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    stream.write_all(&total.to_be_bytes())
}

struct Client {
    stream: TcpStream,
    request: [u8; MESSAGE],
    have: usize,
}

/// One thread for all connections, as the applications that are measured this way have.
fn answer(listener: &TcpListener) -> Result<()> {
    const NEW: usize = usize::MAX;
    listener.set_nonblocking(true)?;
    let mut poll = Poll::new()?;
    poll.add(listener, NEW, Interest::Read)?;
    let mut clients: Vec<Option<Client>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    loop {
        for key in poll.wait(Duration::from_secs(60)).context("waiting for requests")? {
            if key == NEW {
                accept(listener, &poll, &mut clients, &mut free)?;
                continue;
            }
            let Some(slot) = clients.get_mut(key) else { continue };
            let goes_on = slot.as_mut().is_none_or(|client| matches!(client.serve(), Ok(true)));
            if !goes_on {
                *slot = None;
                free.push(key);
            }
        }
    }
}

fn accept(
    listener: &TcpListener,
    poll: &Poll,
    clients: &mut Vec<Option<Client>>,
    free: &mut Vec<usize>,
) -> Result<()> {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // A connection that was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error).context("accepting"),
        };
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let key = free.pop().unwrap_or(clients.len());
        poll.add(&stream, key, Interest::Read)?;
        let client = Some(Client { stream, request: [0; MESSAGE], have: 0 });
        match clients.get_mut(key) {
            Some(slot) => *slot = client,
            None => clients.push(client),
        }
    }
}

impl Client {
    /// Reads what has come and answers whole requests; false when it is to be closed.
    fn serve(&mut self) -> io::Result<bool> {
        loop {
            let room = self.request.get_mut(self.have..).unwrap_or_default();
            match self.stream.read(room) {
                Ok(0) => return Ok(false),
                Ok(got) => self.have += got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
            if self.have == MESSAGE {
                self.have = 0;
                self.stream.write_all(&self.request)?;
                if self.request.first() == Some(&CLOSE) {
                    return Ok(false);
                }
                return Ok(true);
            }
        }
    }
}
