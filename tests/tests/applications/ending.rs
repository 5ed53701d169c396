//! How connections end.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_lab::socket;
use culvert_lab::wait;
use socket2::{SockRef, TcpKeepalive};

use super::stage::*;

pub fn clean_close(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair()?;
    say(&mut client, &mut server, b"question")?;
    server.write_all(b"answer")?;
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer)?;
    ensure!(answer == b"answer", "{answer:?}");
    Ok(())
}

pub fn client_half_close(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair()?;
    client.write_all(b"question")?;
    client.shutdown(Shutdown::Write)?;
    let mut question = Vec::new();
    server.read_to_end(&mut question)?;
    ensure!(question == b"question", "{question:?}");
    for _ in 0..3 {
        say(&mut server, &mut client, b"answer")?;
    }
    drop(server);
    expect_end(&mut client)
}

pub fn server_half_close(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair()?;
    server.write_all(b"answer")?;
    server.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    client.read_to_end(&mut answer)?;
    ensure!(answer == b"answer", "{answer:?}");
    for _ in 0..3 {
        say(&mut client, &mut server, b"more")?;
    }
    drop(client);
    expect_end(&mut server)
}

pub fn shutdown_order(stage: &Stage) -> Result<()> {
    for client_first in [true, false] {
        let Pair { client, server } = stage.pair()?;
        let (mut first, mut second) =
            if client_first { (client, server) } else { (server, client) };
        first.shutdown(Shutdown::Write)?;
        expect_end(&mut second)?;
        second.shutdown(Shutdown::Write)?;
        expect_end(&mut first)?;
    }
    let Pair { mut client, mut server } = stage.pair()?;
    client.shutdown(Shutdown::Write)?;
    server.shutdown(Shutdown::Write)?;
    expect_end(&mut client).context("at once")?;
    expect_end(&mut server).context("at once")
}

pub fn server_reset_arrives(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair()?;
    say(&mut server, &mut client, b"part of the ")?;
    reset(server)?;
    expect_reset(&mut client)?;
    // What was said right before it arrives; after a half-close too, and in the middle of bulk data.
    let Pair { mut client, mut server } = stage.pair()?;
    say(&mut client, &mut server, b"hello")?;
    server.write_all(b"last words")?;
    reset(server)?;
    let got = read_to_reset(&mut client)?;
    ensure!(got == b"last words", "before the reset: {got:?}");
    let Pair { mut client, mut server } = stage.pair()?;
    client.shutdown(Shutdown::Write)?;
    expect_end(&mut server)?;
    reset(server)?;
    expect_reset(&mut client).context("after a half-close")?;
    let Pair { mut client, server } = stage.pair()?;
    reset_in_bulk(server)?;
    read_to_reset(&mut client).context("in bulk").map(drop)
}

pub fn client_reset_arrives(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair()?;
    say(&mut client, &mut server, b"part of the ")?;
    reset(client)?;
    expect_reset(&mut server)?;
    let Pair { mut client, mut server } = stage.pair()?;
    say(&mut server, &mut client, b"hello")?;
    client.write_all(b"last words")?;
    reset(client)?;
    let got = read_to_reset(&mut server)?;
    ensure!(got == b"last words", "before the reset: {got:?}");
    let Pair { mut client, mut server } = stage.pair()?;
    server.shutdown(Shutdown::Write)?;
    expect_end(&mut client)?;
    reset(client)?;
    expect_reset(&mut server).context("after a half-close")?;
    let Pair { client, mut server } = stage.pair()?;
    reset_in_bulk(client)?;
    read_to_reset(&mut server).context("in bulk").map(drop)
}

/// Writes until nobody takes more, and resets.
fn reset_in_bulk(stream: std::net::TcpStream) -> Result<()> {
    stream.set_nonblocking(true)?;
    let block = vec![7; 64 << 10];
    while socket::writable_within(&stream, Duration::from_millis(100))? {
        match (&stream).write(&block) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
            _ => {}
        }
    }
    reset(stream)
}

pub fn server_unread_close_arrives(stage: &Stage) -> Result<()> {
    let Pair { mut client, server } = stage.pair()?;
    client.write_all(b"unread")?;
    ensure!(socket::readable_within(&server, LIMIT)?, "nothing came");
    drop(server);
    expect_reset(&mut client)?;
    // The answer that was given before it still arrives.
    let Pair { mut client, mut server } = stage.pair()?;
    client.write_all(b"unread")?;
    ensure!(socket::readable_within(&server, LIMIT)?, "nothing came");
    server.write_all(b"413 too large")?;
    drop(server);
    let answer = read_to_reset(&mut client)?;
    ensure!(answer == b"413 too large", "before the reset: {answer:?}");
    Ok(())
}

pub fn client_unread_close_arrives(stage: &Stage) -> Result<()> {
    let Pair { client, mut server } = stage.pair()?;
    server.write_all(b"unread")?;
    ensure!(socket::readable_within(&client, LIMIT)?, "nothing came");
    drop(client);
    expect_reset(&mut server)?;
    let Pair { mut client, mut server } = stage.pair()?;
    server.write_all(b"unread")?;
    ensure!(socket::readable_within(&client, LIMIT)?, "nothing came");
    client.write_all(b"good-bye")?;
    drop(client);
    let last = read_to_reset(&mut server)?;
    ensure!(last == b"good-bye", "before the reset: {last:?}");
    Ok(())
}

pub fn write_after_close_fails(stage: &Stage) -> Result<()> {
    let Pair { mut client, server } = stage.pair()?;
    drop(server);
    expect_end(&mut client)?;
    let mut writes = 0;
    let mut failed = None;
    wait::until("a failing write", LIMIT, || {
        failed = client.write(b"into the void").err();
        writes += u32::from(failed.is_none());
        failed.is_some()
    })?;
    let failed = failed.map(|error| error.kind());
    ensure!(failed == Some(ErrorKind::BrokenPipe), "{failed:?} instead of EPIPE");
    ensure!(writes >= 1, "the first write failed");
    ensure!(writes == 1 || stage.carried(), "{writes} writes succeeded");
    Ok(())
}

pub fn linger_waits_for_the_agent(stage: &Stage) -> Result<()> {
    const LINGER: Duration = Duration::from_secs(2);
    let Pair { mut client, mut server } = stage.pair_to("distant")?;
    say(&mut client, &mut server, b"hello")?;
    SockRef::from(&client).set_linger(Some(LINGER))?;
    let cut = stage.ground.cut()?;
    client.write_all(&[9; 1000])?;
    let start = Instant::now();
    drop(client);
    let waited = start.elapsed() >= LINGER / 2;
    drop(cut);
    ensure!(waited != stage.carried(), "close waited {:?}", start.elapsed());
    server.read_exact(&mut [0; 1000])?;
    expect_end(&mut server)
}

pub fn vanished_peer_resets(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair_to("doomed")?;
    say(&mut client, &mut server, b"hello")?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(1))
        .with_interval(Duration::from_secs(1))
        .with_retries(2);
    SockRef::from(&client).set_tcp_keepalive(&keepalive)?;
    client.set_read_timeout(Some(Duration::from_secs(60)))?;
    let client_ip = stage.ip("client");
    let prefix = if client_ip.is_ipv4() { 32 } else { 128 };
    let doomed = stage.ground.mesh.pod("doomed").place().netns();
    doomed.ip(&format!("route add blackhole {client_ip}/{prefix}\n"))?;
    if stage.carried() {
        let start = Instant::now();
        expect_reset(&mut client)?;
        ensure!(start.elapsed() < Duration::from_secs(45), "after {:?}", start.elapsed());
        return Ok(());
    }
    let gone = [ErrorKind::TimedOut, ErrorKind::HostUnreachable];
    expect_error(client.read(&mut [0]), &gone)
}
