//! What the scenarios of routing share: servers that tell where a connection arrived.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use culvert_lab::mesh::Running;
use culvert_tests::{call, serve};

/// Serves `port` of each pod: answers `<pod> <own address> <caller's address>` after the caller's end.
pub fn tell(mesh: &Running, pods: &[&str], port: u16) {
    for pod in pods {
        let name = (*pod).to_owned();
        serve(mesh, pod, port, move |stream, peer| answer(stream, &name, peer)).unwrap();
    }
}

fn answer(mut stream: TcpStream, name: &str, peer: SocketAddr) {
    let own = stream.local_addr().unwrap();
    let own = SocketAddr::new(own.ip().to_canonical(), own.port());
    let mut taken = Vec::new();
    // A caller that has gone away need not be told.
    let _ = stream.read_to_end(&mut taken);
    let _ = write!(stream, "{name} {own} {}", peer.ip());
}

/// Calls `to` from `pod`, and gives the answer's words.
pub fn ask(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> Vec<String> {
    let answer = call(mesh, pod, to, "x");
    let answer = answer.unwrap_or_else(|error| panic!("{pod} calls {to:?}: {error}"));
    answer.split(' ').map(str::to_owned).collect()
}

/// Which pod answers how many of so many calls.
pub fn shares(
    mesh: &Running,
    pod: &str,
    to: (IpAddr, u16),
    calls: usize,
) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..calls {
        *shares.entry(ask(mesh, pod, to).remove(0)).or_default() += 1;
    }
    shares
}
