//! The route by which replies to kept client addresses come back to the agent.
//!
//! One rule per family sends what carries the mark to a table in which every address is local.
//! `tcp_fwmark_accept` lets the sockets that an application accepts take the mark of the agent's
//! connection, so that their replies carry it. `fwmark_reflect` does so for resets that no socket
//! sends: without it a port where nobody listens would not refuse, but never answer. No connection
//! tracking takes part.

use std::future::Future;
use std::io;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::thread;

use culvert_abi::{APPLICATION_MARK_MASK, LOCAL_TABLE};
use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressScope};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::super::sys;
use super::{Netns, lacks_ipv6};

/// Before the main table's rule, 32766, and istio-cni's, 32764.
const RULE_PRIORITY: u32 = 32763;
/// `tcp_fwmark_accept` counts for both families. These files below `/proc/sys` follow the namespace
/// of the thread that opens them.
const SETTINGS: [&str; 3] =
    ["net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect"];
/// The interface index of `lo`, in every network namespace.
const LOOPBACK: u32 = 1;

pub fn add(netns: &Netns) -> io::Result<()> {
    let mark = netns.marks().application;
    in_namespace(netns, async |handle| {
        set("1")?;
        present(add_family(&handle, AddressFamily::Inet, mark).await)?;
        match present(add_family(&handle, AddressFamily::Inet6, mark).await) {
            Err(error) if lacks_ipv6(&error) => Ok(()),
            result => result,
        }
    })
}

pub fn remove(netns: &Netns) -> io::Result<()> {
    let mark = netns.marks().application;
    in_namespace(netns, async |handle| {
        let mut found = false;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            // In the reverse order of adding, so that the rule never points to an empty table.
            match handle.rule().del(rule(family, mark)).execute().await.map_err(into_io) {
                Ok(()) => found = true,
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error),
            }
            match handle.route().del(route(family)).execute().await.map_err(into_io) {
                Err(error) if !is_absent(&error) => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        // The kernel's default. What the pod had set itself is not known any more.
        if found { set("0") } else { Ok(()) }
    })
}

fn set(value: &str) -> io::Result<()> {
    for setting in SETTINGS {
        match write(setting, value) {
            // Without IPv6 its settings are absent.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

fn write(setting: &str, value: &str) -> io::Result<()> {
    match std::fs::write(format!("/proc/sys/{setting}"), value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            sys::open_setting(setting)?.write_all(value.as_bytes())
        }
        result => result,
    }
}

/// The addresses of the namespace's interfaces but `lo`, those of one interface after those of
/// another. Addresses that are valid on one link only are left out.
pub fn addresses(netns: &Netns) -> io::Result<Vec<IpAddr>> {
    in_namespace(netns, async |handle| {
        let mut found = Vec::new();
        let mut messages = handle.address().get().execute();
        while let Some(message) = messages.try_next().await.map_err(into_io)? {
            let is_wide = message.header.scope == AddressScope::Universe;
            if message.header.index == LOOPBACK || !is_wide {
                continue;
            }
            // On a link between two points only this one is the own address.
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            found.extend(local.or(address));
        }
        Ok(found)
    })
}

async fn add_family(handle: &Handle, family: AddressFamily, mark: u32) -> io::Result<()> {
    present(handle.route().add(route(family)).execute().await.map_err(into_io))?;
    let mut request = handle.rule().add();
    *request.message_mut() = rule(family, mark);
    request.execute().await.map_err(into_io)
}

fn rule(family: AddressFamily, mark: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = RuleAction::ToTable;
    // Too large a number for the header.
    rule.attributes = vec![
        RuleAttribute::Table(LOCAL_TABLE),
        RuleAttribute::Priority(RULE_PRIORITY),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(APPLICATION_MARK_MASK),
    ];
    rule
}

fn route(family: AddressFamily) -> RouteMessage {
    if family == AddressFamily::Inet {
        RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
            .output_interface(LOOPBACK)
            .table_id(LOCAL_TABLE)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .build()
    } else {
        RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
            .output_interface(LOOPBACK)
            .table_id(LOCAL_TABLE)
            .kind(RouteType::Local)
            .build()
    }
}

/// A thread of its own enters the namespace: the netlink library is asynchronous, and neither may
/// the caller's thread wait for it inside, nor is the caller always within a runtime.
pub fn in_namespace<T: Send, F: Future<Output = io::Result<T>>>(
    netns: &Netns,
    work: impl FnOnce(Handle) -> F + Send,
) -> io::Result<T> {
    let work = || {
        netns.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection()?;
                tokio::spawn(connection);
                work(handle).await
            })
        })?
    };
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// What exists already is as good as added.
fn present(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

fn is_absent(error: &io::Error) -> bool {
    let codes = [libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

pub fn into_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests;
