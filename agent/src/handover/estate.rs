//! The descriptors of pods on their way from one agent to another.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use culvert_abi::{HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT};
use socket2::{SockRef, Type};

use super::channel::MAX_DESCRIPTORS;
use super::message::{Fault, PodNames, PodTold, Role};
use crate::capture::{DnsSockets, Listeners, Netns, NetnsCookie, sys};

/// A pod that is given away, for as long as it is lent for that.
#[derive(Debug)]
pub struct Heirloom<'a> {
    pub told: PodTold,
    pub descriptors: Vec<BorrowedFd<'a>>,
}

impl<'a> Heirloom<'a> {
    pub fn new(
        uid: String,
        names: Option<PodNames>,
        addresses: Vec<IpAddr>,
        netns: &'a Netns,
        listeners: &'a Listeners,
        dns: &'a DnsSockets,
    ) -> Self {
        let mut roles: Vec<(Role, BorrowedFd)> = vec![
            (Role::Netns, netns.as_fd()),
            (Role::Outbound, listeners.outbound.as_fd()),
            (Role::Plaintext, listeners.plaintext.as_fd()),
            (Role::Hbone, listeners.hbone.as_fd()),
        ];
        roles.extend(dns.udp.iter().map(|socket| (Role::DnsUdp, socket.as_fd())));
        roles.extend(dns.tcp.iter().map(|socket| (Role::DnsTcp, socket.as_fd())));
        // A pod with more addresses than that is told its names on fewer of them for a moment.
        roles.truncate(MAX_DESCRIPTORS);
        let (roles, descriptors) = roles.into_iter().unzip();
        let cookie = netns.cookie().0;
        Self { told: PodTold { uid, names, cookie, addresses, descriptors: roles }, descriptors }
    }
}

/// A pod that was given.
#[derive(Debug)]
pub struct GivenPod {
    pub uid: String,
    /// How istio-cni named it.
    pub names: Option<PodNames>,
    pub addresses: Vec<IpAddr>,
    pub netns: Netns,
    pub listeners: Listeners,
    pub dns: DnsSockets,
}

impl GivenPod {
    /// Whatever came is looked at: a socket of another pod would serve that one's connections.
    pub fn new(told: PodTold, descriptors: Vec<OwnedFd>) -> Result<GivenPod, Fault> {
        let PodTold { uid, names, cookie, addresses, descriptors: roles } = told;
        if roles.len() != descriptors.len() {
            return Err(Fault::Descriptors { told: roles.len(), came: descriptors.len() });
        }
        let fault = |what, why: &dyn std::fmt::Display| Fault::Socket {
            what,
            uid: uid.clone(),
            why: why.to_string(),
        };
        let cookie = NetnsCookie(cookie);
        let (mut netns, mut dns) = (None, DnsSockets::default());
        let (mut outbound, mut plaintext, mut hbone) = (None, None, None);
        for (role, descriptor) in roles.into_iter().zip(descriptors) {
            let what = name(role);
            let socket = |kind, port| {
                check(&descriptor, cookie, kind, port).map_err(|why| fault(what, &why))
            };
            match role {
                Role::Netns => {
                    let opened =
                        Netns::received(descriptor).map_err(|error| fault(what, &error))?;
                    if opened.cookie() != cookie {
                        return Err(fault(what, &"is another one"));
                    }
                    netns = Some(opened);
                }
                Role::Outbound => {
                    socket(Type::STREAM, Some(OUTBOUND_PORT))?;
                    outbound = Some(TcpListener::from(descriptor));
                }
                Role::Plaintext => {
                    socket(Type::STREAM, Some(PLAINTEXT_PORT))?;
                    plaintext = Some(TcpListener::from(descriptor));
                }
                Role::Hbone => {
                    socket(Type::STREAM, Some(HBONE_PORT))?;
                    hbone = Some(TcpListener::from(descriptor));
                }
                Role::DnsUdp => {
                    socket(Type::DGRAM, None)?;
                    dns.udp.push(UdpSocket::from(descriptor));
                }
                Role::DnsTcp => {
                    socket(Type::STREAM, None)?;
                    dns.tcp.push(TcpListener::from(descriptor));
                }
            }
        }
        let (Some(netns), Some(outbound), Some(plaintext), Some(hbone)) =
            (netns, outbound, plaintext, hbone)
        else {
            return Err(fault("namespace or a listener", &"is missing"));
        };
        let listeners = Listeners { outbound, plaintext, hbone };
        Ok(GivenPod { uid, names, addresses, netns, listeners, dns })
    }
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Netns => "network namespace",
        Role::Outbound => "outbound listener",
        Role::Plaintext => "plaintext listener",
        Role::Hbone => "tunnel listener",
        Role::DnsUdp => "DNS socket",
        Role::DnsTcp => "DNS listener",
    }
}

/// Whether it is a socket of this namespace and type; with a port also bound to that. One of streams
/// listens.
fn check(
    descriptor: &OwnedFd,
    cookie: NetnsCookie,
    kind: Type,
    port: Option<u16>,
) -> Result<(), String> {
    let bound = check_socket(descriptor, kind)?;
    if port.is_some_and(|port| port != bound.port()) {
        return Err(format!("is on port {}", bound.port()));
    }
    let own = sys::netns_cookie(descriptor.as_fd()).map_err(no_socket)?;
    if own != cookie.0 {
        return Err("is of another network namespace".to_owned());
    }
    Ok(())
}

/// Whether it is an IP socket of this type, and listens if it is one of streams: where it is bound.
fn check_socket(descriptor: &OwnedFd, kind: Type) -> Result<SocketAddr, String> {
    let socket = SockRef::from(descriptor);
    if socket.r#type().map_err(no_socket)? != kind {
        return Err("is of another type".to_owned());
    }
    let bound = socket.local_addr().map_err(no_socket)?.as_socket();
    let Some(bound) = bound else { return Err("is of no IP".to_owned()) };
    if kind == Type::STREAM && !socket.is_listener().map_err(no_socket)? {
        return Err("does not listen".to_owned());
    }
    socket.set_nonblocking(true).map_err(no_socket)?;
    Ok(bound)
}

fn no_socket(error: std::io::Error) -> String {
    format!("is no socket: {error}")
}

/// What a predecessor gives, message by message, until it is whole.
#[derive(Debug)]
pub struct GivenPods {
    max_pods: usize,
    pub pins: Option<OwnedFd>,
    pub pods: Vec<GivenPod>,
    pub servers: Vec<TcpListener>,
}

impl GivenPods {
    /// Nothing yet, and never more pods than the kernel tables have room for.
    pub fn new(max_pods: u32) -> Self {
        let max_pods = usize::try_from(max_pods).unwrap_or(usize::MAX);
        Self { max_pods, pins: None, pods: Vec::new(), servers: Vec::new() }
    }

    /// Takes a message and what came with it. `true`: that was all.
    pub fn hear(
        &mut self,
        message: super::Message,
        descriptors: Vec<OwnedFd>,
    ) -> Result<bool, Fault> {
        use super::Message;
        let none = |descriptors: Vec<OwnedFd>| match descriptors.len() {
            0 => Ok(()),
            came => Err(Fault::Descriptors { told: 0, came }),
        };
        match message {
            Message::Pins if self.pins.is_none() => {
                let came = descriptors.len();
                let [pins] = <[OwnedFd; 1]>::try_from(descriptors)
                    .map_err(|_| Fault::Descriptors { told: 1, came })?;
                self.pins = Some(pins);
            }
            Message::Pod(_) if self.pods.len() >= self.max_pods => {
                return Err(Fault::TooManyPods(self.max_pods));
            }
            Message::Pod(told) => {
                let again = self.pods.iter().any(|pod| pod.netns.cookie().0 == told.cookie);
                if again {
                    let (what, why) = ("network namespace", "is that of another pod".to_owned());
                    return Err(Fault::Socket { what, uid: told.uid, why });
                }
                self.pods.push(GivenPod::new(told, descriptors)?);
            }
            Message::Servers => {
                for descriptor in descriptors {
                    check_socket(&descriptor, Type::STREAM).map_err(Fault::Server)?;
                    self.servers.push(TcpListener::from(descriptor));
                }
            }
            Message::Whole { pods } => {
                none(descriptors)?;
                let came = self.pods.len();
                return if pods == came { Ok(true) } else { Err(Fault::Pods { told: pods, came }) };
            }
            other => {
                let wanted = "what the agent has";
                return Err(Fault::Unexpected { wanted, came: other.name() });
            }
        }
        Ok(false)
    }
}
