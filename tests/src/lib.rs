//! What the scenarios share: the agent's binary, small servers in pods, and calls from pods.
//!
//! Scenarios run real agents on a real kernel; see `culvert_lab` for the mesh below them.

#![forbid(unsafe_code)]

pub mod cluster;
pub mod cni;
pub mod control;
pub mod direct;
pub mod figures;
pub mod hunt;
pub mod load;
pub mod names;
pub mod parsers;
pub mod peer;
pub mod upgrade;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use culvert_lab::mesh::{Mesh, Running};

use cni::{IstioCni, PodRules};

pub mod expect;

/// How long one step of a call may take.
pub const LIMIT: Duration = Duration::from_secs(20);

/// The agent under test: `CULVERT_BIN`, or the debug build of this workspace.
pub fn binary() -> PathBuf {
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/debug/culvert");
    std::env::var_os("CULVERT_BIN").map_or_else(|| built.into(), PathBuf::from)
}

/// An empty mesh. With `CULVERT_TEST_REDIRECT=cni` its pods are enrolled by istio-cni, and its packet
/// rules lead connections to the agents in place of the kernel programs.
pub fn mesh() -> Mesh {
    redirected(|_| PodRules::default())
}

/// The same, whose pods' questions for names the agents answer if they are told to.
pub fn mesh_with_names() -> Mesh {
    redirected(|_| PodRules { names: true, ..PodRules::default() })
}

fn redirected(rules: fn(&str) -> PodRules) -> Mesh {
    match is_by_rules() {
        true => Mesh::new().enrolled_by(IstioCni::by_rules(rules)),
        false => Mesh::new(),
    }
}

/// Whether packet rules lead connections to the agents of a [`mesh`].
pub fn is_by_rules() -> bool {
    std::env::var("CULVERT_TEST_REDIRECT").is_ok_and(|redirect| redirect == "cni")
}

/// Serves every connection to `port` in `pod` on a thread of its own, for the rest of the test.
pub fn serve(
    mesh: &Running,
    pod: &str,
    port: u16,
    each: impl Fn(TcpStream, SocketAddr) + Clone + Send + 'static,
) -> io::Result<()> {
    let any = SocketAddr::from(([0u16; 8], port));
    let listener = mesh.pod(pod).place().run(|| TcpListener::bind(any))?;
    std::thread::spawn(move || {
        while let Ok((stream, peer)) = listener.accept() {
            let each = each.clone();
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            std::thread::spawn(move || each(stream, peer));
        }
    });
    Ok(())
}

/// Sends back what it reads, until the end.
pub fn echo(mut stream: TcpStream, _peer: SocketAddr) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// Tells the caller's address as the application sees it, and closes.
pub fn who(mut stream: TcpStream, peer: SocketAddr) {
    // A caller that has gone away need not be told.
    let _ = write!(stream, "{}", peer.ip());
}

/// Sends a word over a connection, half-closes, and gives what comes back.
pub fn exchange(mut stream: TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"ping")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Connects from `pod`, with time limits on everything after.
pub fn connect(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> io::Result<TcpStream> {
    let to = SocketAddr::from(to);
    let stream = mesh.pod(pod).place().run(|| TcpStream::connect_timeout(&to, LIMIT))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Sends `text`, half-closes, and gives all that comes back.
pub fn call(mesh: &Running, pod: &str, to: (IpAddr, u16), text: &str) -> io::Result<String> {
    let mut stream = connect(mesh, pod, to)?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The big-endian bytes of a certificate's serial number in decimal.
pub fn serial_bytes(decimal: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0_u8];
    for digit in decimal.chars() {
        let digit = digit.to_digit(10).ok_or_else(|| anyhow::anyhow!("{decimal} is no number"))?;
        let mut carry = digit;
        for byte in bytes.iter_mut().rev() {
            carry += u32::from(*byte) * 10;
            *byte = (carry & 0xff) as u8;
            carry >>= 8;
        }
        if carry > 0 {
            bytes.insert(0, carry as u8);
        }
    }
    Ok(bytes)
}
