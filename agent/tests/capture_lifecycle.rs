//! Enrolling, withdrawing, restarting and detaching on the real kernel. These tests make network
//! namespaces and attach programs to the cgroup's root: they need root on Linux.

#![allow(clippy::unwrap_used)]

#[path = "capture/lab.rs"]
mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use aya::maps::{Array, HashOfMaps, Map, MapData, loaded_maps};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{loaded_links, loaded_programs};
use culvert_abi::{ABI_MAP, ABI_VERSION, Abi, CGROUP_PROGRAMS, POD_FLOWS_MAP};
use culvert_agent::capture::{
    Capture, CaptureError, CaptureOptions, DetachReport, MapCounts, PodSpec, detach,
};
use lab::*;
use tracing::level_filters::LevelFilter;

/// An address that no one has.
const FOREIGN: &str = "192.0.2.1:80";
/// More connections than this are never open at a time.
const MANY: usize = 3000;

fn foreign() -> SocketAddr {
    FOREIGN.parse().unwrap()
}

fn expect_refused(pod: &Pod, to: SocketAddr) {
    assert_eq!(pod.connect(to).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
}

#[test]
fn agents_side_by_side_see_only_their_own_pods() {
    let (left_node, right_node) = (Node::new(), Node::new());
    let (left_pod, right_pod) = (left_node.pod(), right_node.pod());
    let (left, right) = (left_node.capture(), right_node.capture());
    let left_listeners = left_pod.enrol(&left);
    let right_listeners = right_pod.enrol(&right);
    let _clients = [left_pod.connect(foreign()).unwrap(), right_pod.connect(foreign()).unwrap()];
    assert_eq!(accept_captured(&left, &left_listeners).1, foreign());
    assert_eq!(accept_captured(&right, &right_listeners).1, foreign());
    for capture in [&left, &right] {
        let events = capture.events().unwrap();
        assert_eq!((events.captured, events.missing), (1, 0));
        assert_eq!(capture.pods().len(), 1);
    }
}

#[test]
fn killed_agent_leaves_its_pods_refused_and_the_next_one_adopts_them() {
    let node = Node::new();
    let (pod, neighbour) = (node.pod(), node.pod());
    let application = pod.application(8080);
    let capture = node.capture();
    let listeners = pod.enrol(&capture);
    let mut open = pod.connect(foreign()).unwrap();
    let (mut accepted, _) = accept_captured(&capture, &listeners);
    // What the kernel does when it ends a process: the descriptors go, the pins stay.
    close(listeners);
    drop(capture);
    expect_refused(&pod, foreign());
    expect_refused(&neighbour, SocketAddr::new(pod.v4, 8080));

    let capture = node.capture();
    assert_eq!(capture.pods(), [pod.netns.cookie()]);
    expect_refused(&pod, foreign());
    expect_refused(&neighbour, SocketAddr::new(pod.v4, 8080));

    let listeners = pod.enrol(&capture);
    let _client = pod.connect(foreign()).unwrap();
    assert_eq!(accept_captured(&capture, &listeners).1, foreign());
    // The connection of before, had its agent lived on.
    assert_eq!(open.peer_addr().unwrap(), foreign());
    talk(&mut open, &mut accepted);
    assert!(is_idle(&application));
}

/// Takes what waits at a listener until told to stop, and then what is left.
fn accept_until(stop: &AtomicBool, listener: &TcpListener) -> Vec<TcpStream> {
    listener.set_nonblocking(true).unwrap();
    let mut accepted = Vec::new();
    loop {
        let last = stop.load(Ordering::Acquire);
        while let Ok((stream, _)) = listener.accept() {
            accepted.push(stream);
        }
        if last {
            return accepted;
        }
        thread::yield_now();
    }
}

#[test]
fn programs_are_replaced_while_connections_flow() {
    let node = Node::new();
    let pod = node.pod();
    let mut capture = Some(node.capture());
    let listeners = pod.enrol(capture.as_ref().unwrap());
    let before = programs_behind_links(&node.options);
    let (no_more_clients, no_more) = (AtomicBool::new(false), AtomicBool::new(false));
    let (connected, accepted) = thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let mut connected = Vec::new();
            while !no_more_clients.load(Ordering::Acquire) {
                // Both ends stay open, and a process may not open any number of files.
                if connected.len() < MANY {
                    connected.push(pod.connect(foreign()).unwrap());
                }
                thread::park_timeout(Duration::from_millis(1));
            }
            connected
        });
        let agent = scope.spawn(|| accept_until(&no_more, &listeners.outbound));
        for _ in 0..3 {
            drop(capture.take());
            capture = Some(node.capture());
        }
        no_more_clients.store(true, Ordering::Release);
        let connected = clients.join().unwrap();
        no_more.store(true, Ordering::Release);
        (connected, agent.join().unwrap())
    });
    let capture = capture.unwrap();
    assert!(!connected.is_empty());
    assert_eq!(connected.len(), accepted.len());
    for stream in &accepted {
        assert_eq!(capture.original_dst(stream).unwrap().unwrap().to.addr(), foreign());
    }
    assert!(programs_behind_links(&node.options).is_disjoint(&before));
    let events = capture.events().unwrap();
    assert_eq!((events.missing, events.refused_outbound), (0, 0));
}

#[test]
fn enrolling_and_withdrawing_loses_no_connection() {
    let node = Node::new();
    let (pod, neighbour) = (node.pod(), node.pod());
    let application = neighbour.application(7000);
    let to = SocketAddr::new(neighbour.v4, 7000);
    let capture = node.capture();
    let (no_more_clients, no_more) = (AtomicBool::new(false), AtomicBool::new(false));
    let listeners = pod.netns.listen().unwrap();
    let [captured, plain] = [AtomicU32::new(0), AtomicU32::new(0)];
    thread::scope(|scope| {
        let clients: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    while !no_more_clients.load(Ordering::Acquire) {
                        let mut client = pod.connect(to).unwrap();
                        client.set_read_timeout(Some(LIMIT)).unwrap();
                        let mut told = [0];
                        client.read_exact(&mut told).unwrap();
                        let count = if &told == b"a" { &captured } else { &plain };
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        scope.spawn(|| serve_until(&no_more, &application, b"p", |_| {}));
        let enrol = || {
            let cookie = pod.netns.cookie();
            capture.enrol(pod.netns.as_fd(), cookie, &pod.spec(), &(&listeners).into()).unwrap();
        };
        scope.spawn(|| {
            serve_until(&no_more, &listeners.outbound, b"a", |stream| {
                assert_eq!(capture.original_dst(stream).unwrap().unwrap().to.addr(), to);
            });
        });
        for _ in 0..10 {
            enrol();
            let sofar = captured.load(Ordering::Relaxed);
            eventually("captured", || captured.load(Ordering::Relaxed) > sofar + 20);
            capture.withdraw(pod.netns.cookie()).unwrap();
            let sofar = plain.load(Ordering::Relaxed);
            eventually("plain", || plain.load(Ordering::Relaxed) > sofar + 20);
        }
        no_more_clients.store(true, Ordering::Release);
        for client in clients {
            client.join().unwrap();
        }
        no_more.store(true, Ordering::Release);
    });
    let events = capture.events().unwrap();
    assert_eq!((events.missing, events.refused_outbound), (0, 0));
    assert_eq!(capture.counts(), MapCounts::default());
}

/// Answers every connection with `text` and ends it.
fn serve_until(stop: &AtomicBool, listener: &TcpListener, text: &[u8], check: impl Fn(&TcpStream)) {
    listener.set_nonblocking(true).unwrap();
    while !stop.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((mut stream, _)) => {
                check(&stream);
                // The listeners' sockets end with a reset unless the agent says otherwise.
                socket2::SockRef::from(&stream).set_linger(None).unwrap();
                stream.write_all(text).unwrap();
            }
            Err(_) => thread::yield_now(),
        }
    }
}

#[test]
fn open_connections_stay_as_they_are() {
    let node = Node::new();
    let (pod, neighbour) = (node.pod(), node.pod());
    let application = neighbour.application(7000);
    let to = SocketAddr::new(neighbour.v4, 7000);
    let capture = node.capture();
    let mut plain = pod.connect(to).unwrap();
    let mut plain_end = accept(&application);

    let listeners = pod.enrol(&capture);
    talk(&mut plain, &mut plain_end);
    let mut captured = pod.connect(to).unwrap();
    let waiting = pod.connect(to).unwrap();
    let (mut captured_end, _) = accept_captured(&capture, &listeners);

    capture.withdraw(pod.netns.cookie()).unwrap();
    talk(&mut plain, &mut plain_end);
    talk(&mut captured, &mut captured_end);
    assert_eq!(captured.peer_addr().unwrap(), to);
    assert_eq!(captured.local_addr().unwrap().ip(), pod.v4);
    // It was complete before, and the agent had not accepted it yet.
    assert_eq!(accept_captured(&capture, &listeners).1, to);
    drop(waiting);
    let mut after = pod.connect(to).unwrap();
    talk(&mut after, &mut accept(&application));
    assert_eq!(capture.counts(), MapCounts::default());
}

#[test]
fn enrolling_again_changes_exclusions_and_listeners_without_a_gap() {
    let node = Node::new();
    let (pod, neighbour) = (node.pod(), node.pod());
    let application = neighbour.application(7000);
    let to = SocketAddr::new(neighbour.v4, 7000);
    let capture = node.capture();
    let first = pod.enrol(&capture);
    let excluding = PodSpec { exclude_outbound_ports: vec![7000], ..pod.spec() };
    let second = pod.enrol_with(&capture, &excluding);
    let mut client = pod.connect(to).unwrap();
    talk(&mut client, &mut accept(&application));
    let _other = pod.connect(foreign()).unwrap();
    assert_eq!(accept_captured(&capture, &second).1, foreign());
    assert!(is_idle(&first.outbound));
    let third = pod.enrol(&capture);
    let _client = pod.connect(to).unwrap();
    assert_eq!(accept_captured(&capture, &third).1, to);
    assert_eq!(capture.counts().excluded_ports, 0);
}

#[test]
fn full_tables_refuse_a_pod_and_keep_nothing_of_it() {
    let mut node = Node::new();
    node.options.max_pods = 1;
    let (first, second) = (node.pod(), node.pod());
    let capture = node.capture();
    let listeners = first.enrol(&capture);
    let before = capture.counts();
    let others = second.netns.listen().unwrap();
    let cookie = second.netns.cookie();
    let error =
        capture.enrol(second.netns.as_fd(), cookie, &second.spec(), &(&others).into()).unwrap_err();
    assert!(matches!(error, CaptureError::Full { max_pods: 1, .. }), "{error}");
    assert_eq!(capture.counts(), before);
    let _client = first.connect(foreign()).unwrap();
    assert_eq!(accept_captured(&capture, &listeners).1, foreign());
}

#[test]
fn maps_of_another_version_are_made_anew_and_pods_stay_refused() {
    let node = Node::new();
    let pod = node.pod();
    let capture = node.capture();
    let listeners = pod.enrol(&capture);
    drop(capture);
    let map = MapData::from_pin(node.options.pin_path.join("maps").join(ABI_MAP)).unwrap();
    let mut abi: Array<MapData, Abi> = Map::Array(map).try_into().unwrap();
    let made = abi.get(&0, 0).unwrap();
    abi.set(0, Abi { version: ABI_VERSION + 1, ..made }, 0).unwrap();

    let capture = node.capture();
    assert_eq!(capture.pods(), [pod.netns.cookie()]);
    assert!(pod.connect(foreign()).is_err());
    expect_refused(&node.pod(), SocketAddr::new(pod.v4, 8080));
    close(listeners);
    let listeners = pod.enrol(&capture);
    let _client = pod.connect(foreign()).unwrap();
    assert_eq!(accept_captured(&capture, &listeners).1, foreign());
}

#[test]
fn pod_whose_namespace_vanished_is_dropped_by_the_next_agent() {
    let node = Node::new();
    let (pod, other) = (node.pod(), node.pod());
    let capture = node.capture();
    let listeners = [pod.enrol(&capture), other.enrol(&capture)];
    let cookie = other.netns.cookie();
    listeners.into_iter().for_each(close);
    drop((pod, capture));
    eventually("the namespace is gone", || {
        let capture = node.capture();
        capture.pods() == [cookie]
    });
    let counts = node.capture().counts();
    assert_eq!((counts.pods, counts.addresses), (1, 2));
}

#[test]
fn pod_whose_namespace_vanished_can_be_withdrawn() {
    let node = Node::new();
    let pod = node.pod();
    let capture = node.capture();
    let listeners = pod.enrol(&capture);
    let open = pod.connect(foreign()).unwrap();
    let cookie = pod.netns.cookie();
    close(listeners);
    drop((open, pod));
    capture.withdraw(cookie).unwrap();
    capture.withdraw(cookie).unwrap();
    assert_eq!(capture.counts(), MapCounts::default());
}

#[test]
fn pod_is_forgotten_when_its_namespace_has_ended_and_not_before() {
    let node = Node::new();
    let pod = node.pod();
    let capture = node.capture();
    let listeners = pod.enrol(&capture);
    let cookie = pod.netns.cookie();
    close(listeners);
    assert!(!capture.forget_ended(cookie).unwrap());
    assert_eq!(pod.connect(foreign()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    drop(pod);
    eventually("forgotten", || capture.forget_ended(cookie).unwrap());
    assert_eq!(capture.counts(), MapCounts::default());
}

#[test]
fn changed_cgroup_is_attached_to() {
    let mut node = Node::new();
    let root = node.options.cgroup.clone();
    node.options.cgroup = root.join(node.name());
    fs::create_dir(&node.options.cgroup).unwrap();
    let pod = node.pod();
    let capture = node.capture();
    let listeners = pod.enrol(&capture);
    // This process is not in that cgroup.
    assert!(pod.inside(|| TcpStream::connect_timeout(&foreign(), LIMIT)).is_err());
    drop(capture);
    let cgroup = std::mem::replace(&mut node.options.cgroup, root);
    let capture = node.capture();
    let _client = pod.connect(foreign()).unwrap();
    assert_eq!(accept_captured(&capture, &listeners).1, foreign());
    fs::remove_dir(cgroup).unwrap();
}

#[test]
fn second_agent_on_the_same_folder_is_turned_away() {
    let node = Node::new();
    let _capture = node.capture();
    assert!(matches!(Capture::start(&node.options), Err(CaptureError::Busy(_))));
    assert!(matches!(detach(&node.options.pin_path), Err(CaptureError::Busy(_))));
}

#[test]
fn detaching_leaves_no_trace() {
    let node = Node::new();
    let (pod, neighbour) = (node.pod(), node.pod());
    let plain = set_up(&pod);
    let capture = node.capture();
    let _listeners = pod.enrol(&capture);
    pod.netns.add_return_route().unwrap();
    pod.netns.add_return_route().unwrap();
    assert_ne!(set_up(&pod), plain);
    let trace = Trace::of(&node.options);
    assert_eq!((trace.links.len(), trace.programs.len()), (12, 12));
    assert!(trace.maps.len() > 10);
    assert!(trace.remains());
    drop(capture);

    let report = detach(&node.options.pin_path).unwrap();
    assert_eq!(report, DetachReport { programs: 11, pods: 1, ended: 0, unreachable: vec![] });
    assert!(!node.options.pin_path.exists());
    assert_eq!(set_up(&pod), plain);
    eventually("nothing left in the kernel", || !trace.remains());
    let application = neighbour.application(7000);
    let mut client = pod.connect(SocketAddr::new(neighbour.v4, 7000)).unwrap();
    talk(&mut client, &mut accept(&application));
    assert_eq!(detach(&node.options.pin_path).unwrap(), DetachReport::default());
}

#[test]
fn programs_and_maps_show_their_names_in_full() {
    let node = Node::new();
    let pod = node.pod();
    let capture = node.capture();
    let _listeners = pod.enrol(&capture);
    let trace = Trace::of(&node.options);
    let programs: BTreeSet<String> = loaded_programs()
        .flatten()
        .filter(|program| trace.programs.contains(&program.id()))
        .map(|program| program.name_as_str().unwrap().to_owned())
        .collect();
    let expected = CGROUP_PROGRAMS.iter().chain(["cv_sk_lookup"].iter());
    assert_eq!(programs, expected.map(|name| (*name).to_owned()).collect());
    for map in loaded_maps().flatten().filter(|map| trace.maps.contains(&map.id())) {
        let name = map.name_as_str().unwrap();
        // The compiler's constants, and the log of the library, have names of their own.
        let known = ["cv_", ".rodata", "AYA_LOGS"].iter().any(|prefix| name.starts_with(prefix));
        assert!(known && name.len() <= 15, "{name}");
    }
}

/// Somewhere to write the log to.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn programs_log_at_debug() {
    let mut node = Node::new();
    node.options.log_level = LevelFilter::DEBUG;
    let (pod, neighbour) = (node.pod(), node.pod());
    let capture = node.capture();
    let listeners = pod.enrol(&capture);
    for to in ["192.0.2.1:80", "[2001:db8::1]:80", "127.0.0.1:15001"] {
        pod.connect(to.parse().unwrap()).unwrap();
    }
    close(listeners);
    expect_refused(&pod, foreign());
    expect_refused(&neighbour, SocketAddr::new(pod.v4, 8080));
    let written = Written::default();
    let writer = written.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::DEBUG)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let expected = [
        "captured to ::ffff:192.0.2.1 port 80".to_owned(),
        "captured to 2001:db8::1 port 80".to_owned(),
        format!("netns {}: no flow for port", pod.netns.cookie()),
        "outbound connection refused, the agent does not listen".to_owned(),
        "port 8080 refused, the agent does not listen".to_owned(),
    ];
    let log = || String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    runtime.block_on(async {
        let forward = capture.logs().unwrap().forward();
        let complete = async {
            while !expected.iter().all(|line| log().contains(line)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            result = forward => result.unwrap(),
            result = tokio::time::timeout(LIMIT, complete) => {
                assert!(result.is_ok(), "{}", log());
            }
        }
    });
}

/// Identifiers of what an agent has in the kernel.
struct Trace {
    links: BTreeSet<u32>,
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
}

impl Trace {
    fn of(options: &CaptureOptions) -> Trace {
        let mut links = BTreeSet::new();
        let mut programs = BTreeSet::new();
        for folder in ["links", "pods"] {
            for entry in fs::read_dir(options.pin_path.join(folder)).unwrap() {
                let link: FdLink = PinnedLink::from_pin(entry.unwrap().path()).unwrap().into();
                let info = link.info().unwrap();
                links.insert(info.id());
                programs.insert(info.program_id());
            }
        }
        let mut maps = BTreeSet::new();
        for program in loaded_programs().flatten().filter(|found| programs.contains(&found.id())) {
            maps.extend(program.map_ids().unwrap().unwrap());
        }
        let path = options.pin_path.join("maps").join(POD_FLOWS_MAP);
        let pods = Map::HashOfMaps(MapData::from_pin(path).unwrap());
        let pods: HashOfMaps<MapData, u64, MapData> = pods.try_into().unwrap();
        for cookie in pods.keys() {
            let flows: MapData = pods.get(&cookie.unwrap(), 0).unwrap();
            maps.insert(flows.info().unwrap().id());
        }
        Trace { links, programs, maps }
    }

    fn remains(&self) -> bool {
        loaded_links().flatten().any(|link| self.links.contains(&link.id()))
            || loaded_programs().flatten().any(|program| self.programs.contains(&program.id()))
            || loaded_maps().flatten().any(|map| self.maps.contains(&map.id()))
    }
}

fn programs_behind_links(options: &CaptureOptions) -> BTreeSet<u32> {
    Trace::of(options).programs
}

/// A pod's rules, routes and the settings that belong to them.
fn set_up(pod: &Pod) -> Vec<String> {
    let mut found: Vec<String> =
        ["rule", "-6 rule", "route show table 100", "-6 route show table 100"]
            .iter()
            .map(|what| ip_output(&format!("-n {} {what}", pod.name())))
            .collect();
    for setting in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
        let path = format!("/proc/sys/net/{setting}");
        found.push(pod.inside(|| fs::read_to_string(path).unwrap()));
    }
    found
}
