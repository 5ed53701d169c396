//! The mesh itself: policies, waypoints, enrolment, and the agents' own comings and goings.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_lab::mesh::{Match, PolicySpec, Running};
use culvert_lab::{socket, wait};
use socket2::{Protocol, Type};

use super::opening::peer_ip;
use super::stage::*;

/// What libc calls SIGTERM.
const TERMINATE: i32 = 15;

pub fn policy_refusal_resets(stage: &Stage) -> Result<()> {
    let listener = stage.listen_at("server", DENIED_PORT, 8)?;
    let to = SocketAddr::new(stage.ip("server"), DENIED_PORT);
    expect_refusal(stage, to)?;
    ensure!(!socket::readable_within(&listener, A_WHILE)?, "the server notices");
    Ok(())
}

pub fn missing_waypoint_resets(stage: &Stage) -> Result<()> {
    let listener = stage.listen_at("server", GUARDED_TARGET, 8)?;
    let to = SocketAddr::new(stage.service("guarded"), SERVICE_PORT);
    expect_refusal(stage, to)?;
    ensure!(!socket::readable_within(&listener, A_WHILE)?, "a way round the waypoint");
    Ok(())
}

pub fn exclusions_are_untouched(stage: &Stage) -> Result<()> {
    let port = stage.listen_at("server", EXCLUDED_PORT, 8)?;
    let to = SocketAddr::new(stage.ip("server"), EXCLUDED_PORT);
    expect_direct(Pair { client: stage.connect(to)?, server: accept(&port)? }).context("port")?;
    expect_direct(stage.pair_to("excluded")?).context("network")
}

fn expect_direct(mut pair: Pair) -> Result<()> {
    ensure!(peer_ip(&pair.server)? == pair.client.local_addr()?.ip(), "another address");
    let same = pair.server.peer_addr()?.port() == pair.client.local_addr()?.port();
    ensure!(same, "the server sees another port");
    pair.talk()
}

pub fn other_protocols_are_untouched(stage: &Stage) -> Result<()> {
    let any = SocketAddr::new(stage.ip("server"), 0);
    let server = stage.inside("server", || UdpSocket::bind(any))?;
    let any = SocketAddr::new(stage.ip("client"), 0);
    let client = stage.inside("client", || UdpSocket::bind(any))?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(LIMIT))?;
    }
    client.connect(server.local_addr()?)?;
    client.send(b"question")?;
    let mut buffer = [0; 16];
    let (count, from) = server.recv_from(&mut buffer)?;
    ensure!(buffer[..count] == *b"question" && from == client.local_addr()?, "UDP from {from}");
    server.send_to(b"answer", from)?;
    let count = client.recv(&mut buffer)?;
    ensure!(buffer[..count] == *b"answer", "UDP: {:?}", &buffer[..count]);
    ping(stage).context("ICMP")
}

/// One echo request (RFC 792, RFC 4443), and its reply.
fn ping(stage: &Stage) -> Result<()> {
    let (protocol, request, reply) = match stage.family {
        Family::V4 => (Protocol::ICMPV4, 8, 0),
        Family::V6 => (Protocol::ICMPV6, 128, 129),
    };
    let socket = stage.socket_in("client", Type::RAW, Some(protocol))?;
    socket.set_read_timeout(Some(LIMIT))?;
    let identifier = [0x43, 0x56];
    let mut message = [request, 0, 0, 0, identifier[0], identifier[1], 0, 1];
    // The kernel fills in the checksum of ICMPv6 only.
    let sum = u16::from(request) << 8;
    let sum = !(u32::from(sum) + u32::from(u16::from_be_bytes(identifier)) + 1) as u16;
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    socket.connect(&SocketAddr::new(stage.ip("server"), 0).into())?;
    socket.send(&message)?;
    wait::until("an echo reply", LIMIT, || {
        let mut got = [0; 256];
        let Ok(count) = (&socket).read(&mut got) else { return false };
        let got = &got[..count];
        let header = if got.first().is_some_and(|byte| byte >> 4 == 4) { 20 } else { 0 };
        let body = got.get(header..).unwrap_or_default();
        body.first() == Some(&reply) && body.get(4..6) == Some(&identifier)
    })
}

/// The policy comes while the connection is open.
pub fn policy_change_resets(ground: &mut Ground) -> Result<()> {
    let pairs = pairs(ground, "server")?;
    let mut rules = Vec::new();
    for pair in &pairs {
        rules.push(vec![vec![Match::any().port(pair.server.local_addr()?.port())]]);
    }
    ground.mesh.change(|mesh| mesh.policies.push(PolicySpec::deny("now", "shop", rules)))?;
    for mut pair in pairs {
        expect_reset(&mut pair.client).context("client")?;
        expect_reset(&mut pair.server).context("server")?;
    }
    ground.mesh.change(|mesh| mesh.policies.retain(|policy| policy.name != "now"))
}

pub fn enrolment_keeps_connections(ground: &mut Ground) -> Result<()> {
    ensure!(!is_captured(ground, "late")?, "captured from the start");
    let mut before = pairs_from(ground, "late")?;
    enrol(&mut ground.mesh, "late", true)?;
    wait::until("the capture of new connections", LIMIT, || {
        is_captured(ground, "late").unwrap_or_default()
    })?;
    for pair in &mut before {
        pair.talk().context("opened before")?;
    }
    for mut pair in pairs_from(ground, "late")? {
        pair.talk().context("opened after")?;
    }
    before.into_iter().try_for_each(Pair::finish)
}

pub fn withdrawal_keeps_connections(ground: &mut Ground) -> Result<()> {
    ensure!(is_captured(ground, "early")?, "not captured from the start");
    let mut before = pairs_from(ground, "early")?;
    enrol(&mut ground.mesh, "early", false)?;
    wait::until("new connections to go their plain way", LIMIT, || {
        is_captured(ground, "early").is_ok_and(|captured| !captured)
    })?;
    for pair in &mut before {
        pair.talk().context("opened before")?;
    }
    for mut pair in pairs_from(ground, "early")? {
        pair.talk().context("opened after")?;
    }
    before.into_iter().try_for_each(Pair::finish)
}

fn enrol(mesh: &mut Running, pod: &str, enrolled: bool) -> Result<()> {
    mesh.change(|mesh| {
        for spec in mesh.pods.iter_mut().filter(|spec| spec.name == pod) {
            spec.enrolled = enrolled;
        }
    })
}

/// An agent accepts what nobody listens for; the destination itself refuses it.
fn is_captured(ground: &Ground, pod: &str) -> Result<bool> {
    let [stage, _] = ground.stages();
    let socket = stage.socket_in(pod, Type::STREAM, Some(Protocol::TCP))?;
    let nobody = SocketAddr::new(stage.ip("outside"), 1);
    match socket.connect_timeout(&nobody.into(), LIMIT) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(true),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The agent asked to stop is the client's; then, where there is one, the server's.
pub fn draining_agent_lets_finish(ground: &mut Ground) -> Result<()> {
    for node in ground.nodes() {
        let mut finishing = pairs(ground, "server")?;
        let lasting = pairs(ground, "server")?;
        let agent = ground.agent(node)?;
        agent.process().signal(TERMINATE)?;
        wait::until("the drain to begin", LIMIT, || agent.log().contains("draining"))?;
        for mut pair in finishing.drain(..) {
            pair.talk().with_context(|| format!("while {node} drains"))?;
            pair.finish().with_context(|| format!("while {node} drains"))?;
        }
        expect_all_reset(lasting).with_context(|| format!("after the drain of {node}"))?;
        let agent = ground.agent(node)?;
        wait::until("the agent to end", LIMIT, || agent.process().ended().is_some())?;
        ground.forget_agent(node);
        ground.start_agent(node)?;
    }
    Ok(())
}

pub fn killed_agent_resets(ground: &mut Ground) -> Result<()> {
    for node in ground.nodes() {
        let mut open = pairs(ground, "server")?;
        open.iter_mut().try_for_each(Pair::talk)?;
        open.extend(pairs(ground, "server")?);
        ground.kill_agent(node)?;
        expect_all_reset(open).with_context(|| format!("after the end of {node}"))?;
        ground.start_agent(node)?;
    }
    Ok(())
}

pub fn stopped_agent_refuses(ground: &mut Ground) -> Result<()> {
    for node in ground.nodes() {
        let mut listeners = Vec::new();
        for stage in ground.stages() {
            listeners.push(stage.listen()?);
        }
        ground.kill_agent(node)?;
        for (stage, (listener, to)) in ground.stages().iter().zip(&listeners) {
            let client = stage.socket()?;
            let connected = client.connect(&(*to).into());
            let context = || format!("without the agent of {node}, {:?}", stage.family);
            if *node == "a" {
                expect_error(connected, &[ErrorKind::ConnectionRefused]).with_context(context)?;
            } else {
                expect_late_refusal(client, connected).with_context(context)?;
            }
            let reached = socket::readable_within(listener, Duration::from_millis(100))?;
            ensure!(!reached, "the server is reached");
        }
        ground.start_agent(node)?;
    }
    Ok(())
}

fn expect_all_reset(pairs: Vec<Pair>) -> Result<()> {
    for (number, mut pair) in pairs.into_iter().enumerate() {
        expect_reset(&mut pair.client).with_context(|| format!("client {number}"))?;
        expect_reset(&mut pair.server).with_context(|| format!("server {number}"))?;
    }
    Ok(())
}

/// A connection of each family.
fn pairs(ground: &Ground, to: &str) -> Result<Vec<Pair>> {
    ground.stages().iter().map(|stage| stage.pair_to(to)).collect()
}

fn pairs_from(ground: &Ground, pod: &str) -> Result<Vec<Pair>> {
    let pair = |stage: &Stage| {
        let (listener, to) = stage.listen()?;
        Ok(Pair { client: stage.connect_from(pod, to)?, server: accept(&listener)? })
    };
    ground.stages().iter().map(pair).collect()
}
