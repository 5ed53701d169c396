//! What the ends call each other.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use socket2::SockRef;

use super::opening::peer_ip;
use super::stage::*;

pub fn getpeername_is_the_destination(stage: &Stage) -> Result<()> {
    let (_listener, to) = stage.listen()?;
    let client = stage.connect(to)?;
    ensure!(client.peer_addr()? == to, "{} instead of {to}", client.peer_addr()?);
    if stage.carried() {
        let listener = stage.listen_at("server", SERVICE_TARGET, 8)?;
        let to = SocketAddr::new(stage.service("shop"), SERVICE_PORT);
        let client = stage.connect(to)?;
        ensure!(client.peer_addr()? == to, "{} instead of {to}", client.peer_addr()?);
        Pair { client, server: accept(&listener)? }.talk().context("by the service")?;
    }
    Ok(())
}

pub fn getsockname_is_the_own_address(stage: &Stage) -> Result<()> {
    let mut unbound = stage.pair()?;
    let own = unbound.client.local_addr()?;
    ensure!(own.ip() == stage.ip("client") && own.port() != 0, "unbound: {own}");
    unbound.talk()?;
    ensure!(unbound.client.local_addr()? == own, "it changes");
    let socket = stage.socket()?;
    socket.bind(&SocketAddr::new(stage.ip("client"), 0).into())?;
    let bound = socket.local_addr()?.as_socket();
    let pair = stage.pair_of(socket)?;
    ensure!(Some(pair.client.local_addr()?) == bound, "bound to {bound:?}");
    Ok(())
}

pub fn server_sees_the_client_address(stage: &Stage) -> Result<()> {
    let pair = stage.pair()?;
    let seen = peer_ip(&pair.server)?;
    ensure!(seen == stage.ip("client"), "{seen}");
    Ok(())
}

pub fn server_sees_another_port(stage: &Stage) -> Result<()> {
    let pair = stage.pair()?;
    let same = pair.server.peer_addr()?.port() == pair.client.local_addr()?.port();
    ensure!(same != stage.carried(), "the same port: {same}");
    Ok(())
}

pub fn server_getsockname(stage: &Stage) -> Result<()> {
    let (listener, to) = stage.listen()?;
    let _client = stage.connect(to)?;
    let server = accept(&listener)?;
    ensure!(server.local_addr()? == to, "{} instead of {to}", server.local_addr()?);
    Ok(())
}

pub fn original_dst_is_absent(stage: &Stage) -> Result<()> {
    let pair = stage.pair()?;
    for end in [&pair.client, &pair.server] {
        let socket = SockRef::from(end);
        let asked = match stage.family {
            Family::V4 => socket.original_dst_v4(),
            Family::V6 => socket.original_dst_v6(),
        };
        ensure!(asked.is_err(), "SO_ORIGINAL_DST tells {asked:?}");
    }
    Ok(())
}
