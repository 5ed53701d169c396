//! Connections within a node whose bytes go past TCP: the same bytes, the same say over them.

#![allow(clippy::unwrap_used)]

use std::io::{self, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::time::Duration;

use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Match, Mesh, PolicySpec, Running};
use culvert_lab::wait;
use culvert_tests::direct::{Lateness, Stream, opened, read, read_exact, warm, with};
use culvert_tests::expect::{answer, edit, is_refused, logged, rule};
use culvert_tests::{LIMIT, binary, connect, serve};

const PORT: u16 = 8080;
/// The machine is tried first, beside whatever else it does.
const TRIED: Duration = Duration::from_secs(120);

fn started() -> Running {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("other", "web", "other")
        .pod("near", "shop", "near")
        .start()
        .unwrap();
    serve(&mesh, "near", PORT, |stream, _| {
        // Blocking calls may give up here, unlike those of other applications of the tests.
        let mut buffer = [0; 16 << 10];
        while let Ok(count @ 1..) = read(&stream, &mut buffer) {
            if (&stream).write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    })
    .unwrap();
    mesh
}

/// Sends some bytes on a connection of its own, half-closes, and reads them back to the end.
fn ask(mesh: &Running, to: (IpAddr, u16), number: u32) -> io::Result<()> {
    let stream = connect(mesh, "client", to)?;
    let text = vec![number as u8; number as usize % 3_000 + 1];
    (&stream).write_all(&text)?;
    stream.shutdown(Shutdown::Write)?;
    let mut back = vec![0; text.len()];
    read_exact(&stream, &mut back)?;
    assert_eq!(back, text);
    assert_eq!(read(&stream, &mut [0])?, 0, "bytes too many");
    Ok(())
}

fn options(mesh: &Running) -> AgentOptions {
    with(mesh, &[("CULVERT_ACCELERATE", "web/client,shop")])
}

/// An agent that has found out whether the machine may accelerate, and whether it may.
fn tried(mesh: &Running) -> (Agent, bool) {
    let agent = mesh.agent_with("a", &options(mesh)).unwrap();
    let qualified = await_trial(&agent);
    (agent, qualified)
}

fn await_trial(agent: &Agent) -> bool {
    let mut standing = String::new();
    wait::until("the machine to be tried", TRIED, || {
        let status = answer(agent, "/culvert/status").unwrap();
        standing = status["kernel"]["acceleration"].as_str().unwrap().to_owned();
        standing != "the machine is being tried"
    })
    .unwrap();
    let qualified = agent.metric("culvert_acceleration_qualified", &[]).unwrap() == 1.0;
    assert_eq!(standing.starts_with("on"), qualified, "{standing}");
    qualified
}

fn near(mesh: &Running) -> [(IpAddr, u16); 2] {
    mesh.pod("near").addresses().map(|ip| (ip, PORT))
}

fn joined(agent: &Agent) -> f64 {
    agent.metric("culvert_acceleration_connections_total", &["result=\"joined\""]).unwrap()
}

/// Sends and reads at once, and compares.
fn exchange(stream: &TcpStream, total: usize) {
    let block: Vec<u8> = (0..251u8).cycle().take(251 * 4096).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut left = total;
            while left > 0 {
                let count = left.min(block.len());
                (&*stream).write_all(&block[..count]).unwrap();
                left -= count;
            }
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut buffer = vec![0; 300_000];
        let mut at = 0;
        loop {
            match read(stream, &mut buffer).unwrap() {
                0 => break,
                count => {
                    let wrong = buffer[..count]
                        .iter()
                        .enumerate()
                        .find(|(n, byte)| usize::from(**byte) != (at + n) % block.len() % 251);
                    assert_eq!(wrong, None, "after {at} bytes");
                    at += count;
                }
            }
        }
        assert_eq!(at, total);
    });
}

#[test]
fn bytes_go_past_tcp_and_arrive_and_are_told_as_ever() {
    const TOTAL: usize = 64 << 20;
    let mesh = started();
    let (a, qualified) = tried(&mesh);
    for to in near(&mesh) {
        warm(&mesh, &a, "client", to).unwrap();
        let (straight, before) = (opened(&a).unwrap(), joined(&a));
        let stream = connect(&mesh, "client", to).unwrap();
        exchange(&stream, TOTAL);
        drop(stream);
        assert_eq!(opened(&a).unwrap(), straight + 1.0);
        assert_eq!(joined(&a) - before, f64::from(u8::from(qualified)), "{to:?}");
        let bytes = [format!("bytes_sent={TOTAL}"), format!("bytes_recv={TOTAL}")];
        logged(&a, &["connection complete", "outbound", &bytes[0], &bytes[1]]).unwrap();
    }
}

#[test]
fn who_is_not_named_stays_with_tcp() {
    let mesh = started();
    let (a, _) = tried(&mesh);
    let before = joined(&a);
    for to in near(&mesh) {
        warm(&mesh, &a, "other", to).unwrap();
        let straight = opened(&a).unwrap();
        exchange(&connect(&mesh, "other", to).unwrap(), 1 << 20);
        assert_eq!(opened(&a).unwrap(), straight + 1.0);
    }
    assert_eq!(joined(&a), before);
}

#[test]
fn where_nobody_is_named_nothing_is_tried_and_no_program_is_there() {
    let mesh = started();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = near(&mesh)[0];
    warm(&mesh, &a, "client", to).unwrap();
    let status = answer(&a, "/culvert/status").unwrap();
    assert!(status["kernel"]["acceleration"].is_null());
    let programs = status["kernel"]["programs"].to_string();
    assert!(programs.contains("cv_sockops") && !programs.contains("cv_sk_msg"), "{programs}");
    assert_eq!(joined(&a), 0.0);
}

#[test]
fn denied_connection_ends_within_a_moment_and_takes_nothing_more() {
    let mut mesh = started();
    let (a, _) = tried(&mesh);
    let to = near(&mesh)[0];
    warm(&mesh, &a, "client", to).unwrap();
    let mut denied = connect(&mesh, "client", to).unwrap();
    denied.write_all(b"before").unwrap();
    let mut back = [0; 6];
    read_exact(&denied, &mut back).unwrap();
    let nobody = PolicySpec::deny(
        "no-client",
        "shop",
        vec![rule(Match::any().service_account("web", "client"))],
    );
    edit(&mut mesh, &[&a], |mesh| mesh.policies.push(nobody)).unwrap();
    is_refused(&mesh, "client", to).unwrap();
    wait::until("the connection to end", LIMIT, || {
        denied.write_all(b"after").is_err() && denied.write_all(b"after").is_err()
    })
    .unwrap();
    assert!((0..20).all(|_| denied.write_all(b"after").is_err()));
    let late = Lateness::of(&a).unwrap();
    assert!(late.count >= 1.0 && late.within_a_second == late.count, "{late:?}");
    logged(&a, &["connection complete", "policy change", "no-client"]).unwrap();
}

#[test]
fn accelerated_connections_outlive_the_agent_and_its_restarts() {
    let mesh = started();
    let (mut a, qualified) = tried(&mesh);
    let to = near(&mesh);
    for to in to {
        warm(&mesh, &a, "client", to).unwrap();
    }
    let before = joined(&a);
    let streams = to.map(|to| Stream::start(&mesh, "client", to).unwrap());
    streams.iter().for_each(|stream| stream.wait(20).unwrap());
    if qualified {
        assert!(joined(&a) >= before + 2.0);
    }
    for round in 0..5 {
        a.process().kill().unwrap();
        streams.iter().for_each(|stream| stream.wait(20).unwrap());
        // Nobody is there, and what is new is accelerated all the same.
        ask(&mesh, to[0], 7).unwrap();
        a = mesh.agent_with("a", &options(&mesh)).unwrap();
        if round % 2 == 0 {
            assert_eq!(await_trial(&a), qualified);
        }
        streams.iter().for_each(|stream| stream.wait(20).unwrap());
    }
    for stream in streams {
        stream.stop().unwrap();
    }
}

#[test]
fn connections_come_and_go_while_others_stream() {
    let mesh = started();
    let (a, qualified) = tried(&mesh);
    let to = near(&mesh);
    for to in to {
        warm(&mesh, &a, "client", to).unwrap();
    }
    let streams = to.map(|to| Stream::start(&mesh, "client", to).unwrap());
    let before = joined(&a);
    std::thread::scope(|scope| {
        for to in to.into_iter().cycle().take(4) {
            let mesh = &mesh;
            scope.spawn(move || (0..500).for_each(|number| ask(mesh, to, number).unwrap()));
        }
    });
    for stream in streams {
        stream.stop().unwrap();
    }
    if qualified {
        assert!(joined(&a) >= before + 1_900.0);
    }
}

#[test]
fn detaching_ends_what_is_accelerated_rather_than_losing_bytes() {
    let mesh = started();
    let (mut a, qualified) = tried(&mesh);
    let to = near(&mesh)[0];
    warm(&mesh, &a, "client", to).unwrap();
    let stream = Stream::start(&mesh, "client", to).unwrap();
    stream.wait(20).unwrap();
    a.process().kill().unwrap();
    let told = a.detach().unwrap();
    assert_eq!(
        told.contains("ended 1 connection that the kernel accelerated"),
        qualified,
        "{told}"
    );
    if qualified {
        wait::until("the stream to end", LIMIT, || stream.is_finished()).unwrap();
        let error = stream.stop().unwrap_err();
        assert!(!error.to_string().contains("came back as another"), "{error}");
    } else {
        stream.wait(20).unwrap();
    }
}
