//! Time, and what packets carry beside bytes.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_lab::sys::PacketSocket;
use culvert_lab::{socket, wait};
use socket2::{SockRef, TcpKeepalive};

use super::stage::*;

/// The connection was opened before all other cases ran.
pub fn idle_connection_stays(stage: &Stage) -> Result<()> {
    let idle = stage.ground.take_idle(stage.family).context("no idle connection")?;
    let (mut client, mut server) = (idle.client.try_clone()?, idle.server.try_clone()?);
    say(&mut client, &mut server, b"still there?")?;
    say(&mut server, &mut client, b"yes")
}

pub fn keepalive_is_answered(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair()?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(1))
        .with_interval(Duration::from_secs(1))
        .with_retries(2);
    SockRef::from(&pair.client).set_tcp_keepalive(&keepalive)?;
    pair.talk()?;
    // Twice as long as an unanswered connection would live.
    let idle = Duration::from_secs(6);
    ensure!(!socket::readable_within(&pair.client, idle)?, "it ended");
    let since = socket::tcp_info(&pair.client)?.since_acknowledgement;
    ensure!(since < idle / 2, "the last answer came {since:?} ago");
    pair.talk()
}

pub fn tcp_info_is_of_the_first_leg(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair_to("distant")?;
    say(&mut client, &mut server, b"hello")?;
    let acknowledged = |client: &std::net::TcpStream, limit: Duration| {
        wait::until("an acknowledgement", limit, || {
            socket::tcp_info(client).is_ok_and(|info| info.unacknowledged == 0)
        })
    };
    acknowledged(&client, LIMIT).context("at first")?;
    let cut = stage.ground.cut()?;
    client.write_all(&[9; 1000])?;
    let told = acknowledged(&client, A_WHILE).is_ok();
    drop(cut);
    ensure!(told == stage.carried(), "acknowledged without the server: {told}");
    server.read_exact(&mut [0; 1000])?;
    Ok(())
}

pub fn packet_marks_end_at_the_agent(stage: &Stage) -> Result<()> {
    const MARK: u32 = 0x48;
    const TTL: u32 = 77;
    let client = stage.socket()?;
    match stage.family {
        Family::V4 => {
            client.set_tos_v4(MARK)?;
            client.set_ttl_v4(TTL)?;
        }
        Family::V6 => {
            client.set_tclass_v6(MARK)?;
            client.set_unicast_hops_v6(TTL)?;
        }
    }
    let taps = stage.inside("server", || ["eth0", "lo"].map(PacketSocket::open));
    let mut pair = stage.pair_of(client)?;
    pair.talk()?;
    let mut marked = 0;
    for tap in taps {
        let tap = tap?;
        let mut buffer = vec![0; 1 << 16];
        // Others talk as well; what this connection sent is among the first.
        for _ in 0..20_000 {
            let Some(packet) = tap.receive(&mut buffer)? else { break };
            marked += u32::from(is_marked(packet, MARK as u8, TTL as u8));
        }
    }
    ensure!((marked > 0) != stage.carried(), "{marked} packets came with the client's marks");
    Ok(())
}

/// Whether a packet has the traffic class and a hop limit up to four below the client's.
fn is_marked(packet: &[u8], class: u8, hops: u8) -> bool {
    let byte = |at: usize| packet.get(at).copied().unwrap_or_default();
    let (own_class, own_hops) = match byte(0) >> 4 {
        4 => (byte(1), byte(8)),
        6 => (byte(0) << 4 | byte(1) >> 4, byte(7)),
        _ => return false,
    };
    own_class & 0xfc == class & 0xfc && (hops - 4..=hops).contains(&own_hops)
}
