//! Bytes on their way.

use std::io::{ErrorKind, IoSlice, Read, Seek, SeekFrom, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_lab::socket;
use socket2::SockRef;

use super::stage::*;

/// Bytes whose pattern repeats with a length that no buffer has.
fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let mut state = 0x2545_f491u32;
        let next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        };
        std::iter::repeat_with(next).take(1_000_003).collect()
    })
}

/// The bytes of the endless pattern from an offset on, at most `limit`.
fn pattern_at(offset: u64, limit: u64) -> &'static [u8] {
    let pattern = pattern();
    let start = (offset % pattern.len() as u64) as usize;
    let rest = pattern.get(start..).unwrap_or_default();
    rest.get(..limit.min(rest.len() as u64) as usize).unwrap_or(rest)
}

fn send_pattern(mut stream: &TcpStream, total: u64, chunk: u64) -> Result<()> {
    let mut sent = 0;
    while sent < total {
        let count = stream.write(pattern_at(sent, chunk.min(total - sent)));
        sent += count.with_context(|| format!("after {sent} bytes"))? as u64;
    }
    Ok(())
}

/// Reads exactly so many bytes of the pattern.
fn expect_pattern(mut stream: &TcpStream, total: u64) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut got = 0;
    while got < total {
        let room = (total - got).min(buffer.len() as u64) as usize;
        let count = stream.read(&mut buffer[..room]);
        let count = count.with_context(|| format!("after {got} bytes"))?;
        ensure!(count > 0, "the end after {got} of {total} bytes");
        let mut checked = 0;
        while checked < count {
            let wanted = pattern_at(got, (count - checked) as u64);
            let found = &buffer[checked..checked + wanted.len()];
            ensure!(found == wanted, "other bytes somewhere from {got} on");
            checked += wanted.len();
            got += wanted.len() as u64;
        }
    }
    Ok(())
}

pub fn large_transfer_both_ways(stage: &Stage) -> Result<()> {
    let total = match stage.family {
        Family::V4 => 1 << 30,
        Family::V6 => 128 << 20,
    };
    let Pair { mut client, mut server } = stage.pair()?;
    std::thread::scope(|scope| {
        let end = |sender: &TcpStream| -> Result<()> {
            send_pattern(sender, total, 1 << 20)?;
            Ok(sender.shutdown(Shutdown::Write)?)
        };
        let (one, other) = (&client, &server);
        let there = scope.spawn(move || end(one));
        let back = scope.spawn(move || end(other));
        let reader = scope.spawn(move || expect_pattern(other, total));
        expect_pattern(one, total).context("at the client")?;
        for (name, thread) in
            [("at the server", reader), ("from the client", there), ("from the server", back)]
        {
            let result = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            result.context(name)?;
        }
        anyhow::Ok(())
    })?;
    expect_end(&mut client)?;
    expect_end(&mut server)
}

pub fn many_small_writes(stage: &Stage) -> Result<()> {
    let Pair { client, mut server } = stage.pair()?;
    client.set_nodelay(true)?;
    let sizes = (0..20_000u64).map(|number| number * 7 % 97 + 1);
    let total = sizes.clone().sum();
    let writer = std::thread::spawn(move || -> Result<()> {
        let mut sent = 0;
        for size in sizes {
            let bytes = pattern_at(sent, size);
            let rest = pattern_at(sent + bytes.len() as u64, size - bytes.len() as u64);
            let slices = [IoSlice::new(bytes), IoSlice::new(rest)];
            sent += (&client).write_vectored(&slices)? as u64;
        }
        ensure!(sent == total, "{sent} bytes were taken");
        Ok(())
    });
    expect_pattern(&server, total)?;
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    expect_end(&mut server)
}

pub fn server_speaks_first(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair()?;
    say(&mut pair.server, &mut pair.client, b"220 ready")?;
    pair.talk()
}

pub fn sendfile_and_splice(stage: &Stage) -> Result<()> {
    const TOTAL: u64 = 4 << 20;
    let mut file = scratch_file(stage)?;
    let mut filled = 0;
    while filled < TOTAL {
        filled += file.write(pattern_at(filled, TOTAL - filled))? as u64;
    }
    file.seek(SeekFrom::Start(0))?;
    let Pair { client, server } = stage.pair()?;
    std::thread::scope(|scope| {
        // The server sends back by splice(2) what the client sends by sendfile(2).
        let echo = scope.spawn(|| socket::splice(&server, &server, TOTAL as usize));
        let sender = scope.spawn(|| socket::send_file(&client, &file, TOTAL as usize));
        expect_pattern(&client, TOTAL)?;
        for (name, thread) in [("splice", echo), ("sendfile", sender)] {
            let result = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            result.context(name)?;
        }
        Ok(())
    })
}

fn scratch_file(stage: &Stage) -> Result<std::fs::File> {
    let name = format!("sendfile-{:?}", stage.family);
    let path = stage.ground.mesh.lab().state().join(name);
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}

pub fn peek_leaves_data(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair()?;
    pair.server.write_all(b"answer")?;
    ensure!(socket::readable_within(&pair.client, LIMIT)?, "nothing came");
    for _ in 0..2 {
        let mut seen = [0; 16];
        let count = pair.client.peek(&mut seen)?;
        ensure!(seen[..count] == *b"answer", "{:?}", &seen[..count]);
    }
    let mut got = [0; 6];
    pair.client.read_exact(&mut got)?;
    ensure!(got == *b"answer", "{got:?}");
    pair.talk()
}

pub fn waiting_options(stage: &Stage) -> Result<()> {
    wait_for_all(stage).context("MSG_WAITALL")?;
    low_water(stage).context("SO_RCVLOWAT")?;
    receive_time_out(stage).context("SO_RCVTIMEO")?;
    edge_triggered(stage).context("EPOLLET")
}

fn wait_for_all(stage: &Stage) -> Result<()> {
    let Pair { client, mut server } = stage.pair()?;
    let reader = std::thread::spawn(move || -> Result<Vec<u8>> {
        let mut buffer = Vec::with_capacity(64 << 10);
        let room = buffer.spare_capacity_mut();
        let count = SockRef::from(&client).recv_with_flags(room, socket::MSG_WAITALL)?;
        Ok(vec![0; count])
    });
    for piece in pattern_at(0, 64 << 10).chunks(4 << 10) {
        server.write_all(piece)?;
    }
    let got = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    ensure!(got.len() == 64 << 10, "{} bytes", got.len());
    Ok(())
}

fn low_water(stage: &Stage) -> Result<()> {
    let Pair { client, mut server } = stage.pair()?;
    socket::set_receive_low_water(&client, 10)?;
    server.write_all(b"12345")?;
    ensure!(!socket::readable_within(&client, A_WHILE)?, "readable too early");
    server.write_all(b"67890")?;
    ensure!(socket::readable_within(&client, LIMIT)?, "never readable");
    Ok(())
}

fn receive_time_out(stage: &Stage) -> Result<()> {
    let mut pair = stage.pair()?;
    pair.client.set_read_timeout(Some(A_WHILE))?;
    let start = Instant::now();
    expect_error(pair.client.read(&mut [0]), &[ErrorKind::WouldBlock])?;
    ensure!(start.elapsed() >= A_WHILE / 2, "after {:?}", start.elapsed());
    pair.client.set_read_timeout(Some(LIMIT))?;
    pair.talk()
}

/// The library watches edge-triggered.
fn edge_triggered(stage: &Stage) -> Result<()> {
    let Pair { client, mut server } = stage.pair()?;
    client.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = tokio::net::TcpStream::from_std(client)?;
        let mut buffer = [0; 16];
        for text in ["one", "two", "three"] {
            let _not_yet = client.try_read(&mut buffer);
            server.write_all(text.as_bytes())?;
            let mut got = Vec::new();
            while got.len() < text.len() {
                tokio::time::timeout(LIMIT, client.readable()).await.context("no edge")??;
                match client.try_read(&mut buffer) {
                    Ok(0) => bail!("the end"),
                    Ok(count) => got.extend_from_slice(&buffer[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
            ensure!(got == text.as_bytes(), "{got:?} instead of {text}");
        }
        Ok(())
    })
}

pub fn nodelay_is_prompt(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair()?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    // A sender that waits for an acknowledgement before its next small write takes 40 ms longer.
    let mut times = Vec::new();
    for _ in 0..100 {
        let start = Instant::now();
        client.write_all(b"a")?;
        client.write_all(b"b")?;
        server.read_exact(&mut [0; 2])?;
        say(&mut server, &mut client, b"c")?;
        times.push(start.elapsed());
    }
    times.sort();
    // It would be in each of them; the machine may be busy during many.
    let quick = times[times.len() / 10];
    ensure!(quick < Duration::from_millis(20), "nine of ten turns took {quick:?} or more");
    Ok(())
}

pub fn cork_keeps_bytes(stage: &Stage) -> Result<()> {
    let Pair { mut client, mut server } = stage.pair()?;
    let held = SockRef::from(&client);
    held.set_tcp_cork(true)?;
    client.write_all(b"head ")?;
    client.write_all(b"body")?;
    SockRef::from(&client).set_tcp_cork(false)?;
    let mut got = [0; 9];
    server.read_exact(&mut got)?;
    ensure!(got == *b"head body", "{got:?}");
    SockRef::from(&client).send_with_flags(b"more ", socket::MSG_MORE)?;
    client.write_all(b"data")?;
    server.read_exact(&mut got)?;
    ensure!(got == *b"more data", "{got:?}");
    Ok(())
}

pub fn urgent_byte_becomes_ordinary(stage: &Stage) -> Result<()> {
    urgent(stage, stage.pair()?, |pair| (&mut pair.client, &mut pair.server)).context("there")?;
    urgent(stage, stage.pair()?, |pair| (&mut pair.server, &mut pair.client)).context("back")?;
    if !stage.carried() {
        return Ok(());
    }
    // Also where data is moved in bulk, and where the end follows at once.
    const BULK: u64 = 8 << 20;
    let Pair { client, mut server } = stage.pair()?;
    let writer = std::thread::spawn(move || -> Result<()> {
        let urgent = |byte: &[u8]| SockRef::from(&client).send_out_of_band(byte);
        send_pattern(&client, BULK, 1 << 20)?;
        urgent(pattern_at(BULK, 1))?;
        (&client).write_all(pattern_at(BULK + 1, 1))?;
        urgent(pattern_at(BULK + 2, 1))?;
        Ok(client.shutdown(Shutdown::Write)?)
    });
    expect_pattern(&server, BULK + 3).context("bulk")?;
    expect_end(&mut server)?;
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
}

type Ends = for<'p> fn(&'p mut Pair) -> (&'p mut TcpStream, &'p mut TcpStream);

fn urgent(stage: &Stage, mut pair: Pair, ends: Ends) -> Result<()> {
    let (from, to) = ends(&mut pair);
    from.write_all(b"before ")?;
    SockRef::from(&*from).send_out_of_band(b"!")?;
    from.write_all(b" after")?;
    if stage.carried() {
        let mut got = [0; 14];
        to.read_exact(&mut got)?;
        ensure!(got == *b"before ! after", "{:?}", String::from_utf8_lossy(&got));
        return Ok(());
    }
    ensure!(socket::urgent_within(&*to, LIMIT)?, "nothing urgent");
    let mut room = [std::mem::MaybeUninit::uninit(); 1];
    let count = SockRef::from(&*to).recv_out_of_band(&mut room)?;
    ensure!(count == 1, "{count} urgent bytes");
    let mut got = [0; 13];
    to.read_exact(&mut got)?;
    ensure!(got == *b"before  after", "{:?}", String::from_utf8_lossy(&got));
    Ok(())
}

/// Writes until nothing more is taken; gives how much was.
fn fill(stream: &TcpStream, limit: u64) -> Result<u64> {
    stream.set_nonblocking(true)?;
    let mut sent = 0;
    while socket::writable_within(stream, A_WHILE)? {
        match (&*stream).write(pattern_at(sent, 64 << 10)) {
            Ok(count) => sent += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        ensure!(sent < limit, "{sent} bytes were taken");
    }
    stream.set_nonblocking(false)?;
    Ok(sent)
}

pub fn stalled_reader_blocks_its_writer(stage: &Stage) -> Result<()> {
    let Pair { client, mut server } = stage.pair()?;
    let sent = fill(&client, 64 << 20)?;
    client.shutdown(Shutdown::Write)?;
    expect_pattern(&server, sent)?;
    expect_end(&mut server)
}

pub fn stalled_readers_hold_up_nobody(stage: &Stage) -> Result<()> {
    let (listener, to) = stage.listen()?;
    let mut stalled = Vec::new();
    for _ in 0..100 {
        let pair = Pair { client: stage.connect(to)?, server: accept(&listener)? };
        pair.client.set_nonblocking(true)?;
        stalled.push(pair);
    }
    // Turn by turn, so that all are full at about the same time.
    let mut writing = true;
    while writing {
        writing = false;
        for pair in &stalled {
            if socket::writable_within(&pair.client, Duration::ZERO)? {
                writing |= (&pair.client).write(pattern_at(0, 256 << 10)).is_ok();
            }
        }
        writing = writing || {
            let wait =
                |pair: &Pair| socket::writable_within(&pair.client, Duration::from_millis(2));
            stalled.iter().map(wait).collect::<std::io::Result<Vec<_>>>()?.contains(&true)
        };
    }
    for number in 0..20 {
        let start = Instant::now();
        let mut pair = Pair { client: stage.connect(to)?, server: accept(&listener)? };
        pair.talk().with_context(|| format!("request {number}"))?;
        ensure!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
    Ok(())
}
