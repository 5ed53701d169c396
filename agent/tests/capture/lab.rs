//! A node and its pods in network namespaces, a capture on them, and its removal.

#![allow(dead_code)] // Each test binary uses a part of this.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use culvert_agent::capture::{
    Capture, CaptureOptions, Listeners, Netns, PodSpec, detach, find_cgroup,
};
use tracing::level_filters::LevelFilter;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(20);

/// More bytes than the headers of a segment have.
const OVERHEAD: usize = 100;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Runs `ip` and expects success.
pub fn ip(arguments: &str) {
    ip_output(arguments);
}

/// The same, with what it prints; nothing when it says that a table does not exist.
pub fn ip_output(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("ip runs");
    let told = String::from_utf8_lossy(&output.stderr);
    let fine = output.status.success() || told.contains("FIB table does not exist");
    assert!(fine, "ip {arguments}: {told} (these tests need root on Linux)");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command and expects success.
pub fn run(command: &str, arguments: &[&str]) {
    let output = Command::new(command).args(arguments).output().expect("the command runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {arguments:?}: {told}");
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A node: a namespace that routes between its pods, and its own folder of pins.
pub struct Node {
    name: String,
    id: u32,
    pods: AtomicU32,
    pub netns: Netns,
    pub options: CaptureOptions,
}

impl Node {
    pub fn new() -> Node {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("cvk{}x{id}", std::process::id());
        ip(&format!("netns add {name}"));
        let netns = Netns::open(format!("/run/netns/{name}")).unwrap();
        ip(&format!("-n {name} link set lo up"));
        netns
            .run(|| {
                fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
                fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
            })
            .unwrap();
        let options = CaptureOptions {
            cgroup: find_cgroup().expect("cgroup version 2 is mounted"),
            pin_path: PathBuf::from("/sys/fs/bpf").join(&name),
            node: netns.cookie(),
            max_pods: 16,
            max_verdicts: 64,
            max_direct: 1024,
            log_level: LevelFilter::OFF,
        };
        Node { name, id, pods: AtomicU32::new(0), netns, options }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn capture(&self) -> Capture {
        Capture::start(&self.options).unwrap()
    }

    /// The node's end of a pod's link.
    pub fn link_of(&self, pod: &Pod) -> String {
        pod.host.clone()
    }

    /// Routes to a pod anew, after its link was down.
    pub fn route_to(&self, pod: &Pod) {
        let (node, host) = (&self.name, &pod.host);
        ip(&format!("-n {node} route replace {}/32 dev {host}", pod.v4));
        ip(&format!("-n {node} -6 addr replace fe80::1/64 dev {host} nodad"));
        ip(&format!("-n {node} -6 route replace {}/128 dev {host}", pod.v6));
    }

    /// Gives another pod's addresses to a pod, and routes there.
    pub fn succeed(&self, successor: &Pod, earlier: &Pod) {
        let (node, host, name) = (&self.name, &successor.host, &successor.name);
        let (v4, v6) = (earlier.v4, earlier.v6);
        ip(&format!("-n {name} addr add {v4}/32 dev eth0"));
        ip(&format!("-n {name} -6 addr add {v6}/128 dev eth0 nodad"));
        ip(&format!("-n {node} route replace {v4}/32 dev {host}"));
        ip(&format!("-n {node} -6 route replace {v6}/128 dev {host}"));
    }

    /// A pod with one address of each family, reachable from the node and from its other pods.
    pub fn pod(&self) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        let name = format!("{}p{number}", self.name);
        let node = &self.name;
        let subnet = self.id % 250;
        let v4 = format!("10.{subnet}.0.{number}");
        let v6 = format!("fd77:{subnet}::{number}");
        ip(&format!("netns add {name}"));
        let host = format!("h{number}");
        ip(&format!("-n {node} link add {host} type veth peer name eth0 netns {name}"));
        ip(&format!("-n {name} link set lo up"));
        ip(&format!("-n {name} addr add {v4}/32 dev eth0"));
        ip(&format!("-n {name} -6 addr add {v6}/128 dev eth0 nodad"));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {node} addr add 169.254.1.1/32 dev {host}"));
        ip(&format!("-n {node} link set {host} up"));
        ip(&format!("-n {node} -6 addr add fe80::1/64 dev {host} nodad"));
        ip(&format!("-n {node} route add {v4}/32 dev {host}"));
        ip(&format!("-n {node} -6 route add {v6}/128 dev {host}"));
        ip(&format!("-n {name} route add 169.254.1.1 dev eth0"));
        ip(&format!("-n {name} route add default via 169.254.1.1 dev eth0"));
        ip(&format!("-n {name} -6 route add default via fe80::1 dev eth0"));
        let netns = Netns::open(format!("/run/netns/{name}")).unwrap();
        Pod { name, host, netns, v4: v4.parse().unwrap(), v6: v6.parse().unwrap() }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let detached = detach(&self.options.pin_path);
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
        if !std::thread::panicking() {
            detached.unwrap();
        }
    }
}

pub struct Pod {
    name: String,
    host: String,
    pub netns: Netns,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

impl Pod {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn spec(&self) -> PodSpec {
        PodSpec { addresses: vec![self.v4, self.v6], ..PodSpec::default() }
    }

    pub fn inside<T>(&self, work: impl FnOnce() -> T) -> T {
        self.netns.run(work).unwrap()
    }

    /// Enrols the pod with fresh listeners.
    pub fn enrol(&self, capture: &Capture) -> Listeners {
        self.enrol_with(capture, &self.spec())
    }

    pub fn enrol_with(&self, capture: &Capture, spec: &PodSpec) -> Listeners {
        let listeners = self.netns.listen().unwrap();
        let fds = (&listeners).into();
        capture.enrol(self.netns.as_fd(), self.netns.cookie(), spec, &fds).unwrap();
        listeners
    }

    /// An application that listens on every address of both families.
    pub fn application(&self, port: u16) -> TcpListener {
        let started = Instant::now();
        loop {
            match self.inside(|| TcpListener::bind(("::", port))) {
                // Another test's starting process may still hold the listener that was here before.
                Err(error) if error.kind() == ErrorKind::AddrInUse && started.elapsed() < LIMIT => {
                    std::thread::park_timeout(Duration::from_millis(2));
                }
                bound => return bound.unwrap(),
            }
        }
    }

    /// Drops the next segment to a port that carries more than half of `length` bytes.
    pub fn lose_one_segment(&self, port: u16, length: usize) {
        self.lose_segments(port, length, &format!("quota until {} bytes", OVERHEAD + length));
    }

    /// Drops every segment to a port that carries more than half of `length` bytes.
    pub fn lose_all_segments(&self, port: u16, length: usize) {
        self.lose_segments(port, length, "");
    }

    fn lose_segments(&self, port: u16, length: usize, bound: &str) {
        let more = OVERHEAD + length / 2;
        let rules = format!(
            "add table inet loss
             delete table inet loss
             table inet loss {{
                 chain arriving {{
                     type filter hook input priority 0
                     tcp dport {port} meta length > {more} {bound} drop
                 }}
             }}"
        );
        let run = || Command::new("nft").arg(rules).output().expect("nft runs");
        let output = self.inside(run);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// A client in the pod.
    pub fn connect(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        self.inside(|| TcpStream::connect_timeout(&to, LIMIT))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// The next connection of a listener, whether blocking or not.
pub fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let started = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                // The listeners' sockets end with a reset unless the agent says otherwise.
                socket2::SockRef::from(&stream).set_linger(None).unwrap();
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                return stream;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                assert!(started.elapsed() < LIMIT, "no connection arrived");
                std::thread::park_timeout(Duration::from_millis(1));
            }
            Err(error) => panic!("accept: {error}"),
        }
    }
}

/// Ends listeners at once. Merely dropping them is not enough while another test starts a process,
/// which holds a copy of every descriptor until it runs its program.
pub fn close(listeners: Listeners) {
    for listener in [listeners.outbound, listeners.plaintext, listeners.hbone] {
        socket2::Socket::from(listener).shutdown(std::net::Shutdown::Both).unwrap();
    }
}

/// Whether nothing waits at a listener.
pub fn is_idle(listener: &TcpListener) -> bool {
    listener.set_nonblocking(true).unwrap();
    matches!(listener.accept(), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Bytes get from one end to the other.
pub fn talk(from: &mut TcpStream, to: &mut TcpStream) {
    to.set_read_timeout(Some(LIMIT)).unwrap();
    from.write_all(b"hello").unwrap();
    let mut received = [0; 5];
    to.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"hello");
}

/// Accepts a captured connection and tells where it was going.
pub fn accept_captured(capture: &Capture, listeners: &Listeners) -> (TcpStream, SocketAddr) {
    let accepted = accept(&listeners.outbound);
    let original = capture.original_dst(&accepted).unwrap();
    (accepted, original.map(|original| original.to.addr()).expect("an original destination"))
}
