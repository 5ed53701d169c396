#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::*;
use crate::netns::names;

/// Two nodes, one pod each, a server in the second.
fn two_pods() -> (Lab, Pod, Pod) {
    let lab = Lab::new(Attach::Process).unwrap();
    lab.node("a").unwrap();
    lab.node("b").unwrap();
    let client = lab.pod("a", "client").unwrap();
    let server = lab.pod("b", "server").unwrap();
    (lab, client, server)
}

fn listen(server: &Pod) -> TcpListener {
    server.place().run(|| TcpListener::bind("[::]:8080")).unwrap()
}

/// Says `hello` from one pod to another over `address`, and gives what arrived.
fn say_hello(client: &Pod, listener: &TcpListener, address: IpAddr) -> String {
    std::thread::scope(|scope| {
        let heard = scope.spawn(|| {
            let mut text = String::new();
            listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
            text
        });
        client.place().run(|| {
            let to = SocketAddr::new(address, 8080);
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
            stream.write_all(b"hello").unwrap();
        });
        heard.join().unwrap()
    })
}

#[test]
fn pods_of_two_nodes_reach_each_other_and_the_wire_shows_it() {
    let (lab, client, server) = two_pods();
    let nodes = lab.nodes.lock().unwrap().clone();
    let wire = lab.wire(&nodes[0], &nodes[1]).unwrap();
    let listener = listen(&server);
    for address in server.addresses() {
        assert_eq!(say_hello(&client, &listener, address), "hello");
    }
    let seen = wire.finish().unwrap();
    assert_eq!(seen.clear[&8080].bytes, 10, "{seen}");
    assert_eq!(seen.attempts[&8080], 2, "{seen}");
    assert!(!seen.only_tls());
}

#[test]
fn a_node_reaches_its_pods() {
    let (lab, _, server) = two_pods();
    let node = lab.nodes.lock().unwrap()[1].clone();
    let listener = listen(&server);
    for address in server.addresses() {
        let to = SocketAddr::new(address, 8080);
        node.place().run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).unwrap();
    }
    drop(listener);
}

#[test]
fn several_labs_live_side_by_side_and_nothing_is_left() {
    let (one, client, server) = two_pods();
    let (other, ..) = two_pods();
    let names_of = |lab: &Lab| names(&format!("{}-", lab.name())).len();
    assert_eq!((names_of(&one), names_of(&other)), (4, 4));
    let (gone, state, group) =
        (other.name().to_owned(), other.state.clone(), other.base.join(other.name()));
    drop(other);
    assert!(names(&format!("{gone}-")).is_empty());
    assert!(!state.exists() && !group.exists());
    assert_eq!(say_hello(&client, &listen(&server), server.v4().into()), "hello");
}

#[test]
fn a_process_runs_in_its_pod_and_ends_with_the_lab() {
    let (lab, client, _) = two_pods();
    let mut command = client.place().command("sleep").unwrap();
    command.arg("60");
    let mut process = client.place().start("sleep", &mut command).unwrap();
    assert_eq!(cgroup::members(client.place().cgroup()), [process.pid()]);
    let printed = client.place().output("ip", &["-4", "-o", "addr", "show", "eth0"]).unwrap();
    assert!(printed.contains(&client.v4().to_string()), "{printed}");
    drop(lab);
    assert!(process.ended().is_some());
}

#[test]
fn a_lab_has_a_bpf_file_system_for_pins() {
    let (lab, ..) = two_pods();
    std::fs::create_dir(lab.pin_path("a")).unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(mounts.contains(&format!("{}/bpf bpf ", lab.state().display())), "{mounts}");
}
