//! Connections within a node whose verdict is taken back after their SYN was sent, and before it has
//! arrived: the agent judges them, as what they are.

#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PolicySpec, Running};
use culvert_lab::wait;
use culvert_tests::direct::{opened, warm};
use culvert_tests::expect::{edit, logged, rule};
use culvert_tests::{LIMIT, binary, echo, exchange, serve};
use socket2::SockRef;

const PORT: u16 = 8080;

fn started() -> (Running, [(IpAddr, u16); 2]) {
    let mesh = Mesh::new().node("a").pod("client", "web", "client").pod("near", "shop", "near");
    let mesh = mesh.start().unwrap();
    let to = mesh.pod("near").addresses().map(|ip| (ip, PORT));
    (mesh, to)
}

fn no_client() -> PolicySpec {
    PolicySpec::deny("no-client", "shop", vec![rule(Match::any().service_account("web", "client"))])
}

/// Connects, and lets the SYN arrive only when `change` is made.
fn connect_across(
    mesh: &mut Running,
    a: &mut Agent,
    to: (IpAddr, u16),
    change: impl FnOnce(&mut Running, &mut Agent),
) -> io::Result<TcpStream> {
    let before = opened(a).unwrap();
    let filter = format!(
        "table inet held {{ chain in {{ \
         type filter hook input priority 0; tcp dport {} drop; }}; }}",
        to.1
    );
    mesh.pod("near").place().output("nft", &[&filter]).unwrap();
    let netns = mesh.pod("client").place().netns().clone();
    let connecting =
        std::thread::spawn(move || netns.run(|| TcpStream::connect_timeout(&to.into(), LIMIT)));
    wait::until("it to be on its way", wait::SOON, || opened(a).unwrap() > before).unwrap();
    change(mesh, a);
    mesh.pod("near").place().output("nft", &["delete table inet held"]).unwrap();
    let stream = connecting.join().unwrap()?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

#[test]
fn it_keeps_its_pods_identity() {
    let (mut mesh, both) = started();
    serve(&mesh, "near", PORT, echo).unwrap();
    let mut a = mesh.agent("a", &binary()).unwrap();
    for (number, to) in both.into_iter().enumerate() {
        warm(&mesh, &a, "client", to).unwrap();
        // Whoever has no identity is refused.
        let nobody = Match::any().with("notPrincipals", "[!Presence []]");
        let strict = PolicySpec::deny(&format!("strict-{number}"), "shop", vec![rule(nobody)]);
        let stream = connect_across(&mut mesh, &mut a, to, |mesh, a| {
            edit(mesh, &[a], |mesh| mesh.policies.push(no_client())).unwrap();
            edit(mesh, &[a], |mesh| mesh.policies = vec![strict]).unwrap();
        });
        assert_eq!(exchange(stream.unwrap()).unwrap(), "ping");
        let retracted = "result=\"retracted\"";
        let retracted = a.metric("culvert_direct_connections_total", &[retracted]).unwrap();
        assert_eq!(retracted, number as f64 + 1.0);
    }
}

#[test]
fn it_is_refused_by_what_denies_its_pod() {
    let (mut mesh, both) = started();
    serve(&mesh, "near", PORT, echo).unwrap();
    let mut a = mesh.agent("a", &binary()).unwrap();
    for to in both {
        warm(&mesh, &a, "client", to).unwrap();
        let stream = connect_across(&mut mesh, &mut a, to, |mesh, a| {
            edit(mesh, &[a], |mesh| mesh.policies.push(no_client())).unwrap();
        });
        // The reset may come before the client knows that it is connected.
        let answer = stream.and_then(|mut stream| stream.read(&mut [0]));
        assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        edit(&mut mesh, &[&a], |mesh| mesh.policies.clear()).unwrap();
    }
    logged(&a, &["policy rejection", "no-client"]).unwrap();
}

#[test]
fn it_is_not_anonymous_when_its_client_is_gone() {
    let (mut mesh, both) = started();
    let heard = Arc::new(AtomicBool::new(false));
    let hears = heard.clone();
    serve(&mesh, "near", PORT, move |stream, _| {
        let mut byte = [0];
        // What `warm` calls is an end at once.
        if stream.peek(&mut byte).is_ok_and(|count| count == 1) && byte == *b"x" {
            hears.store(true, Ordering::SeqCst);
        }
    })
    .unwrap();
    let mut a = mesh.agent("a", &binary()).unwrap();
    for (abort, to) in [false, true].into_iter().flat_map(|abort| both.map(|to| (abort, to))) {
        warm(&mesh, &a, "client", to).unwrap();
        let mut stream = connect_across(&mut mesh, &mut a, to, |mesh, a| {
            edit(mesh, &[a], |mesh| mesh.policies.push(no_client())).unwrap();
            a.process().signal(libc::SIGSTOP).unwrap();
        })
        .unwrap();
        stream.write_all(b"x").unwrap();
        if abort {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
        drop(stream);
        a.process().signal(libc::SIGCONT).unwrap();
        edit(&mut mesh, &[&a], |mesh| mesh.policies.clear()).unwrap();
    }
    logged(&a, &["closed it before it was known"]).unwrap();
    assert!(!heard.load(Ordering::SeqCst), "{}", a.log());
}
