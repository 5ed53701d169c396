//! Holds connection tracking and translation in a namespace whose rules others may take away.
//!
//! The kernel tracks and translates in a namespace only as long as some rule there asks for it. When
//! istio-cni takes a pod out of the mesh it removes its rules, the last ones as a rule; connections
//! that were translated on their way to the agent would then arrive nowhere. One nftables table of
//! our own, which asks for both and decides nothing, keeps them whole until they have ended. It also
//! keeps what was opened meanwhile known as established, so that rules which come again do not take
//! it for new.

use std::io::{self, Read};

use socket2::{Domain, Protocol, Socket, Type};

use super::Netns;

/// Name of the table, in family `inet`.
const TABLE: &str = "culvert";
const CHAIN: &str = "hold";

/// `NFNL_SUBSYS_NFTABLES`.
const NFTABLES: u16 = 10;
/// Families and hooks of netfilter.
const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;
const NF_INET_LOCAL_OUT: u32 = 3;
/// After everybody else's translation.
const PRIORITY: u32 = 200;
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

/// Adds the table, unless it is there.
pub fn hold(netns: &Netns) -> io::Result<()> {
    let chain = [
        text(1, TABLE),
        text(3, CHAIN),
        nested(4, &[number(1, NF_INET_LOCAL_OUT), number(2, PRIORITY)]),
        text(7, "nat"),
    ];
    // `ct state` into a register: that is all.
    let ask = nested(1, &[text(1, "ct"), nested(2, &[number(1, 8), number(2, 0)])]);
    let rule = [text(1, TABLE), text(2, CHAIN), nested(4, &[ask])];
    let result = transact(
        netns,
        &[
            (NEW_TABLE, CREATE | EXCLUSIVE, vec![text(1, TABLE)]),
            (NEW_CHAIN, CREATE, chain.into()),
            (NEW_RULE, CREATE | APPEND, rule.into()),
        ],
    );
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

/// Removes the table, if it is there. Connections that need translation break, if nobody else asks
/// for it.
pub fn release(netns: &Netns) -> io::Result<()> {
    match transact(netns, &[(DELETE_TABLE, 0, vec![text(1, TABLE)])]) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

/// Carries out all or none.
fn transact(netns: &Netns, steps: &[(u16, u16, Vec<Vec<u8>>)]) -> io::Result<()> {
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

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut attribute = (length as u16).to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(length.next_multiple_of(4), 0);
    attribute
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}
