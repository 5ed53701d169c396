//! Opening connections.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_lab::socket;
use socket2::{Domain, Protocol, Socket, Type};

use super::stage::*;

pub fn connect_succeeds(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair()?;
    pair.talk()?;
    pair.finish()
}

pub fn closed_port_resets(stage: &Stage) -> Result<()> {
    let to = stage.closed()?;
    let connected = stage.socket()?;
    if !stage.carried() {
        return expect_error(connected.connect(&to.into()), &[ErrorKind::ConnectionRefused]);
    }
    expect_refusal(stage, to).context("read")?;
    let connected = match connected.connect(&to.into()) {
        Ok(()) => TcpStream::from(connected),
        told => return expect_error(told, &[ErrorKind::ConnectionReset]),
    };
    ensure!(socket::readable_within(&connected, LIMIT)?, "no reset");
    expect_error((&connected).write(b"x"), &[ErrorKind::ConnectionReset]).context("write")
}

pub fn unreachable_destination_resets(stage: &Stage) -> Result<()> {
    let to = SocketAddr::new(stage.ip("silent"), 8080);
    let client = stage.socket()?;
    if !stage.carried() {
        let unreachable = [ErrorKind::TimedOut, ErrorKind::HostUnreachable];
        return expect_error(client.connect_timeout(&to.into(), 2 * LIMIT), &unreachable);
    }
    let start = Instant::now();
    let connected = client.connect(&to.into());
    expect_late_refusal(client, connected)?;
    ensure!(start.elapsed() < Duration::from_secs(20), "after {:?}", start.elapsed());
    Ok(())
}

pub fn full_accept_queue_delays_data(stage: &Stage) -> Result<()> {
    let (listener, second) = queue_up(stage)?;
    accept(&listener)?;
    ensure!(socket::writable_within(&second, LIMIT)?, "not connected after all");
    second.set_nonblocking(false)?;
    let mut pair = Pair { client: second.into(), server: accept(&listener)? };
    pair.talk()?;
    if stage.carried() {
        let start = Instant::now();
        let (_listener, second) = queue_up(stage)?;
        second.set_nonblocking(false)?;
        expect_reset(&mut second.into()).context("never accepted")?;
        ensure!(start.elapsed() < Duration::from_secs(20), "after {:?}", start.elapsed());
    }
    Ok(())
}

/// A listener whose queue one connection fills, and a client that comes after it.
fn queue_up(stage: &Stage) -> Result<(std::net::TcpListener, Socket)> {
    let listener = stage.listen_at("server", 0, 0)?;
    let to = SocketAddr::new(stage.ip("server"), listener.local_addr()?.port());
    stage.warm(&listener, to)?;
    let first = stage.connect(to)?;
    ensure!(socket::readable_within(&listener, LIMIT)?, "the first does not arrive");
    let second = stage.socket()?;
    second.set_nonblocking(true)?;
    ensure!(second.connect(&to.into()).is_err_and(|error| socket::is_in_progress(&error)));
    let connected = socket::writable_within(&second, A_WHILE)?;
    ensure!(connected == stage.carried(), "connect while the queue is full: {connected}");
    drop(first);
    Ok((listener, second))
}

pub fn connect_time(stage: &Stage) -> Result<()> {
    let (listener, to) = stage.listen_in("distant")?;
    let client = stage.socket()?;
    client.set_nonblocking(true)?;
    let cut = stage.ground.cut()?;
    ensure!(client.connect(&to.into()).is_err_and(|error| socket::is_in_progress(&error)));
    let connected = socket::writable_within(&client, A_WHILE)?;
    ensure!(connected == stage.carried(), "connected without the server's answer: {connected}");
    drop(cut);
    ensure!(socket::writable_within(&client, LIMIT)?, "not connected");
    client.set_nonblocking(false)?;
    let mut pair = Pair { client: client.into(), server: accept(&listener)? };
    pair.talk()
}

pub fn first_connection_delay(stage: &Stage) -> Result<()> {
    let start = Instant::now();
    stage.pair_to("fresh")?.talk()?;
    ensure!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    Ok(())
}

fn begin(stage: &Stage, to: SocketAddr) -> Result<Socket> {
    let client = stage.socket()?;
    client.set_nonblocking(true)?;
    let begun = client.connect(&to.into());
    ensure!(begun.is_err_and(|error| socket::is_in_progress(&error)), "no EINPROGRESS");
    ensure!(socket::writable_within(&client, LIMIT)?, "never writable");
    Ok(client)
}

pub fn nonblocking_connect(stage: &Stage) -> Result<()> {
    let (listener, to) = stage.listen()?;
    let client = begin(stage, to)?;
    ensure!(client.take_error()?.is_none(), "SO_ERROR");
    client.set_nonblocking(false)?;
    Pair { client: client.into(), server: accept(&listener)? }.talk()
}

pub fn nonblocking_closed_port_resets(stage: &Stage) -> Result<()> {
    let client = stage.socket()?;
    client.set_nonblocking(true)?;
    let begun = client.connect(&stage.closed()?.into());
    ensure!(begun.is_err_and(|error| socket::is_in_progress(&error)), "no EINPROGRESS");
    if !stage.carried() {
        ensure!(socket::writable_within(&client, LIMIT)?, "never writable");
        let told = client.take_error()?.map(|error| error.kind());
        ensure!(told == Some(ErrorKind::ConnectionRefused), "SO_ERROR is {told:?}");
        return Ok(());
    }
    ensure!(socket::writable_within(&client, LIMIT)?, "never writable");
    client.set_nonblocking(false)?;
    expect_reset(&mut client.into())
}

pub fn af_unspec_reconnects(stage: &Stage) -> Result<()> {
    let client = stage.socket()?;
    let mut servers = Vec::new();
    for round in 0..2 {
        let (listener, to) = stage.listen()?;
        if round > 0 {
            socket::disconnect(&client)?;
        }
        client.connect(&to.into()).context("connecting again")?;
        let peer = client.peer_addr()?.as_socket();
        ensure!(peer == Some(to), "getpeername: {peer:?}, not {to}");
        let own = client.local_addr()?.as_socket().map(|own| own.ip());
        ensure!(own == Some(stage.ip("client")), "getsockname: {own:?}");
        let mut pair = Pair { client: client.try_clone()?.into(), server: accept(&listener)? };
        pair.talk()?;
        servers.push(pair.server);
    }
    expect_reset(&mut servers.remove(0)).context("the first server")
}

pub fn bound_address_connects(stage: &Stage) -> Result<()> {
    let client = stage.socket()?;
    client.bind(&SocketAddr::new(stage.ip("client"), 0).into())?;
    let bound = client.local_addr()?.as_socket();
    let mut pair = stage.pair_of(client)?;
    ensure!(Some(pair.client.local_addr()?) == bound, "getsockname");
    ensure!(peer_ip(&pair.server)? == stage.ip("client"), "the server sees another address");
    pair.talk()
}

pub fn bound_port_connects(stage: &Stage) -> Result<()> {
    let client = stage.socket()?;
    let any = match stage.family {
        Family::V4 => "0.0.0.0:0",
        Family::V6 => "[::]:0",
    };
    client.bind(&any.parse::<SocketAddr>()?.into())?;
    let port = client.local_addr()?.as_socket().context("no address")?.port();
    let mut pair = stage.pair_of(client)?;
    let own = pair.client.local_addr()?;
    ensure!(own == SocketAddr::new(stage.ip("client"), port), "getsockname: {own}");
    let same = pair.server.peer_addr()?.port() == port;
    ensure!(same != stage.carried(), "the server sees the client's port: {same}");
    pair.talk()
}

pub fn one_port_to_two_destinations(stage: &Stage) -> Result<()> {
    let (first, second) = (stage.socket()?, stage.socket()?);
    for client in [&first, &second] {
        client.set_reuse_address(true)?;
    }
    first.bind(&SocketAddr::new(stage.ip("client"), 0).into())?;
    second.bind(&first.local_addr()?)?;
    let mut open = stage.pair_of(first)?;
    let (listener, to) = stage.listen_in("distant")?;
    let connected = second.connect(&to.into());
    open.talk()?;
    if stage.carried() {
        return expect_error(connected, &[ErrorKind::AddrNotAvailable]);
    }
    connected?;
    Pair { client: second.into(), server: accept(&listener)? }.talk()
}

pub fn bound_device_connects(stage: &Stage) -> Result<()> {
    let client = stage.socket()?;
    client.bind_device(Some(b"eth0"))?;
    let mut pair = stage.pair_of(client)?;
    ensure!(pair.client.local_addr()?.ip() == stage.ip("client"), "getsockname");
    pair.talk()?;
    pair.finish()
}

pub fn v4_mapped_connects(stage: &Stage) -> Result<()> {
    if stage.family == Family::V6 {
        return Ok(());
    }
    let (listener, to) = stage.listen()?;
    let mapped = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => IpAddr::V6(ip.to_ipv6_mapped()),
        IpAddr::V6(ip) => IpAddr::V6(ip),
    };
    let client =
        stage.inside("client", || Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)))?;
    let destination = SocketAddr::new(mapped(to.ip()), to.port());
    client.connect_timeout(&destination.into(), LIMIT)?;
    let client = TcpStream::from(client);
    ensure!(client.peer_addr()? == destination, "getpeername: {}", client.peer_addr()?);
    let own = client.local_addr()?.ip();
    ensure!(own == mapped(stage.ip("client")), "getsockname: {own}");
    Pair { client, server: accept(&listener)? }.talk()
}

pub fn mptcp_client_connects(stage: &Stage) -> Result<()> {
    for protocol in [Protocol::TCP, Protocol::MPTCP] {
        let listener = stage.socket_in("server", Type::STREAM, Some(protocol))?;
        listener.bind(&SocketAddr::new(stage.ip("server"), 0).into())?;
        listener.listen(8)?;
        listener.set_read_timeout(Some(LIMIT))?;
        let to = listener.local_addr()?.as_socket().context("no address")?;
        let client = stage.socket_in("client", Type::STREAM, Some(Protocol::MPTCP))?;
        client.connect_timeout(&to.into(), LIMIT)?;
        let peer = client.peer_addr()?.as_socket();
        ensure!(peer == Some(to), "getpeername: {peer:?}, not {to}");
        let own = client.local_addr()?.as_socket().map(|own| own.ip());
        ensure!(own == Some(stage.ip("client")), "getsockname: {own:?}");
        let mut pair = Pair { client: client.into(), server: accept(&listener.into())? };
        pair.talk()?;
        pair.finish().with_context(|| format!("ending, server {protocol:?}"))?;
    }
    Ok(())
}

pub fn fast_open_client_connects(stage: &Stage) -> Result<()> {
    // The second time the client may have a cookie, and the data goes with the SYN.
    for round in 0..2 {
        let (listener, to) = stage.listen()?;
        let client = stage.socket()?;
        client.send_to_with_flags(b"early", &to.into(), socket::MSG_FASTOPEN)?;
        check_early(stage, client, &listener, to).with_context(|| format!("flag, {round}"))?;
        let (listener, to) = stage.listen()?;
        let client = stage.socket()?;
        socket::connect_by_first_write(&client)?;
        client.connect(&to.into())?;
        client.send(b"early")?;
        check_early(stage, client, &listener, to).with_context(|| format!("option, {round}"))?;
    }
    Ok(())
}

fn check_early(
    stage: &Stage,
    client: Socket,
    listener: &std::net::TcpListener,
    to: SocketAddr,
) -> Result<()> {
    let mut client = TcpStream::from(client);
    let mut server = accept(listener)?;
    client.write_all(b" late")?;
    let mut got = [0; 10];
    server.read_exact(&mut got)?;
    ensure!(got == *b"early late", "{got:?}");
    ensure!(client.peer_addr()? == to, "getpeername");
    ensure!(client.local_addr()?.ip() == stage.ip("client"), "getsockname");
    let mut pair = Pair { client, server };
    pair.talk()?;
    pair.finish()
}

pub fn many_connections_in_a_row(stage: &Stage) -> Result<()> {
    let (listener, to) = stage.listen()?;
    let server = std::thread::spawn(move || -> Result<()> {
        loop {
            let mut server = accept(&listener)?;
            let mut byte = [0];
            server.read_exact(&mut byte)?;
            server.write_all(&byte)?;
            if byte == [0xff] {
                return Ok(());
            }
        }
    });
    let result = stage.inside("client", || -> Result<()> {
        // Ten thousand over both families.
        for number in 1..=5000u32 {
            let round = || -> Result<()> {
                let mut client = TcpStream::connect(to)?;
                client.set_read_timeout(Some(LIMIT))?;
                let byte = if number == 5000 { [0xff] } else { [(number % 0xff) as u8] };
                client.write_all(&byte)?;
                let mut got = Vec::new();
                client.read_to_end(&mut got)?;
                ensure!(got == byte, "{got:?} instead of {byte:?}");
                Ok(())
            };
            round().with_context(|| format!("connection {number}"))?;
        }
        Ok(())
    });
    result?;
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))?
}

pub fn own_address_is_untouched(stage: &Stage) -> Result<()> {
    let loopback = match stage.family {
        Family::V4 => "127.0.0.1",
        Family::V6 => "::1",
    };
    for ip in [loopback.parse()?, stage.ip("client")] {
        let listener = stage.listen_at("client", 0, 8)?;
        let to = SocketAddr::new(ip, listener.local_addr()?.port());
        let mut pair = Pair { client: stage.connect(to)?, server: accept(&listener)? };
        ensure!(pair.server.peer_addr()? == pair.client.local_addr()?, "carried to {ip}");
        pair.talk()?;
        drop(listener);
        let refused = stage.socket()?.connect(&to.into());
        expect_error(refused, &[ErrorKind::ConnectionRefused])?;
    }
    Ok(())
}

pub fn peer_ip(stream: &TcpStream) -> Result<IpAddr> {
    Ok(stream.peer_addr()?.ip().to_canonical())
}
