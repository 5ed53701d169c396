//! Namespaces and calls for trying out what the kernel does with connections.

use std::io;
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::Duration;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};

use super::netns::{Netns, NetnsError, in_namespace, into_io};

/// The interfaces of the two namespaces of [`pair`].
const OWN: &str = "one";
const PEER: &str = "other";
/// `lo`, in every network namespace.
const LOOPBACK: u32 = 1;

/// What went wrong with namespaces for a trial.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    #[error("making a network namespace: {0}")]
    Make(io::Error),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("linking two network namespaces: {0}")]
    Link(io::Error),
}

/// Two network namespaces that see each other, with these addresses. They end with what is returned.
pub fn pair(one: &[IpAddr], other: &[IpAddr]) -> Result<(Netns, Netns), TrialError> {
    let (first, second) = (fresh()?, fresh()?);
    link(&first, &second, one, other).map_err(TrialError::Link)?;
    Ok((first, second))
}

/// An empty namespace.
fn fresh() -> Result<Netns, TrialError> {
    let made = thread::scope(|scope| {
        let inside = scope.spawn(|| {
            // SAFETY: changes only this thread's namespace, and the thread ends here.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            std::fs::File::open("/proc/thread-self/ns/net")
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    Ok(Netns::received(made.map_err(TrialError::Make)?.into())?)
}

fn link(first: &Netns, second: &Netns, one: &[IpAddr], other: &[IpAddr]) -> io::Result<()> {
    in_namespace(first, async |handle| {
        let veth = LinkVeth::new(OWN, PEER).build();
        handle.link().add(veth).execute().await.map_err(into_io)?;
        let move_peer = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index(&handle, PEER).await?)
            .setns_by_fd(second.as_fd().as_raw_fd())
            .build();
        handle.link().set(move_peer).execute().await.map_err(into_io)
    })?;
    for (netns, link, addresses) in [(first, OWN, one), (second, PEER, other)] {
        in_namespace(netns, async |handle| {
            let link = index(&handle, link).await?;
            for index in [LOOPBACK, link] {
                let up = LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build();
                handle.link().set(up).execute().await.map_err(into_io)?;
            }
            for address in addresses {
                let length = if address.is_ipv4() { 24 } else { 64 };
                let mut request = handle.address().add(link, *address, length);
                // Nobody else can have the address.
                request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
                request.execute().await.map_err(into_io)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

async fn index(handle: &Handle, name: &str) -> io::Result<u32> {
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    let link = found.try_next().await.map_err(into_io)?;
    link.map(|link| link.header.index).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// recv(2) with flags (`MSG_…`).
pub fn receive(from: &TcpStream, buffer: &mut [u8], flags: i32) -> io::Result<usize> {
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let count =
        unsafe { libc::recv(from.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// poll(2) on one socket: which of the events (`POLLIN`, …) there are, none when the time is over.
pub fn poll(socket: &TcpStream, events: i16, limit: Duration) -> io::Result<i16> {
    let mut waiting = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
    let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: there is one structure, and it is ours.
    match unsafe { libc::poll(&mut waiting, 1, limit) } {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(waiting.revents),
    }
}

/// How many bytes wait to be read (`FIONREAD`, ioctl_tcp(7)).
pub fn unread(socket: &TcpStream) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    let pointer: *mut libc::c_int = &mut count;
    // SAFETY: the request writes one number.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, pointer) } {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(usize::try_from(count).unwrap_or(0)),
    }
}

/// Sets from how many bytes on a socket counts as readable (`SO_RCVLOWAT`, socket(7)).
pub fn set_low_water(socket: &TcpStream, bytes: i32) -> io::Result<()> {
    super::sys::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}

/// splice(2) from a socket into a pipe, without blocking.
pub fn splice(from: &TcpStream, to: impl AsFd, length: usize) -> io::Result<usize> {
    let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_NONBLOCK);
    let to = to.as_fd().as_raw_fd();
    // SAFETY: both descriptors are borrowed for the call; null offsets touch no memory of ours.
    let count = unsafe { libc::splice(from.as_raw_fd(), none, to, none, length, flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}
