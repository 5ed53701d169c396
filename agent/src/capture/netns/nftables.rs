//! Messages of nftables.

use std::io::{self, Read};

use socket2::{Domain, Protocol, Socket, Type};

use super::Netns;

/// `NFNL_SUBSYS_NFTABLES`.
const NFTABLES: u16 = 10;
/// Families of netfilter.
const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;
/// Message types: those of a batch, and those of nftables.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = NFTABLES << 8;
const DELETE_TABLE: u16 = (NFTABLES << 8) | 2;
const NEW_CHAIN: u16 = (NFTABLES << 8) | 3;
const NEW_RULE: u16 = (NFTABLES << 8) | 6;
/// netlink(7)
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;
const EXCLUSIVE: u16 = libc::NLM_F_EXCL as u16;
const CREATE: u16 = libc::NLM_F_CREATE as u16;
const APPEND: u16 = libc::NLM_F_APPEND as u16;
const NESTED: u16 = 0x8000;
const HEADER: usize = 16;

/// Adds a table with what belongs into it, unless it is there.
pub fn add_table(netns: &Netns, name: &str, mut steps: Vec<Step>) -> io::Result<()> {
    steps.insert(0, (NEW_TABLE, CREATE | EXCLUSIVE, vec![text(1, name)]));
    match transact(netns, &steps) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

/// Removes a table, if it is there.
pub fn remove_table(netns: &Netns, name: &str) -> io::Result<()> {
    match transact(netns, &[(DELETE_TABLE, 0, vec![text(1, name)])]) {
        // A kernel without nftables has no table either.
        Err(error) if is_absent(&error) => Ok(()),
        result => result,
    }
}

/// Message type, flags and attributes.
pub type Step = (u16, u16, Vec<Vec<u8>>);

/// A chain of a table at a hook of netfilter.
pub fn chain(table: &str, name: &str, kind: &str, hook: u32, priority: i32) -> Step {
    let at = nested(4, &[number(1, hook), number(2, priority.cast_unsigned())]);
    (NEW_CHAIN, CREATE, vec![text(1, table), text(3, name), at, text(7, kind)])
}

/// A rule at the end of a chain.
pub fn rule(table: &str, chain: &str, expressions: &[Vec<u8>]) -> Step {
    (NEW_RULE, CREATE | APPEND, vec![text(1, table), text(2, chain), nested(4, expressions)])
}

/// One expression of a rule.
pub fn expression(name: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[text(1, name), nested(2, attributes)])
}

fn is_absent(error: &io::Error) -> bool {
    let codes = [libc::ENOENT, libc::EPROTONOSUPPORT, libc::EOPNOTSUPP, libc::EINVAL];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

/// Carries out all or none.
fn transact(netns: &Netns, steps: &[Step]) -> io::Result<()> {
    let mut batch = message(BATCH_BEGIN, REQUEST, NFPROTO_UNSPEC, &[]);
    for (kind, flags, attributes) in steps {
        batch.extend(message(*kind, REQUEST | ACK | flags, NFPROTO_INET, attributes));
    }
    batch.extend(message(BATCH_END, REQUEST, NFPROTO_UNSPEC, &[]));
    let netfilter = Protocol::from(libc::NETLINK_NETFILTER);
    let open = || Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(netfilter));
    let socket = netns.run(open)??;
    socket.set_nonblocking(true)?;
    socket.send(&batch)?;
    // The kernel has answered everything when `send` returns, a step after the other.
    let mut buffer = [0; 8192];
    loop {
        match (&socket).read(&mut buffer) {
            Ok(length) => buffer.get(..length).map_or(Ok(()), outcome)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// What the answers in one packet say (`nlmsgerr`): the first failure, if any.
fn outcome(mut answers: &[u8]) -> io::Result<()> {
    while let Some((header, rest)) = answers.split_first_chunk::<HEADER>() {
        let [a, b, c, d, e, f, ..] = *header;
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        if i32::from(u16::from_ne_bytes([e, f])) == libc::NLMSG_ERROR
            && let Some((error, _)) = rest.split_first_chunk()
        {
            let error = i32::from_ne_bytes(*error);
            if error != 0 {
                return Err(io::Error::from_raw_os_error(-error));
            }
        }
        let next = length.max(HEADER).next_multiple_of(4);
        answers = answers.get(next..).unwrap_or_default();
    }
    Ok(())
}

/// One message of the netfilter subsystem (`nlmsghdr`, `nfgenmsg`).
fn message(kind: u16, flags: u16, family: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family, 0]);
    message.extend(NFTABLES.to_be_bytes());
    message.extend(attributes.iter().flatten());
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}

pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut attribute = (length as u16).to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(length.next_multiple_of(4), 0);
    attribute
}

pub fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

pub fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

pub fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}
