//! Capture on the real kernel. These tests make network namespaces and attach programs to the
//! cgroup's root: they need root on Linux.

#![allow(clippy::unwrap_used)]

#[path = "capture/lab.rs"]
mod lab;

use std::net::SocketAddr;

use lab::*;

/// An address that no one has; the node has no route to it.
const FOREIGN_V4: &str = "192.0.2.1:80";
const FOREIGN_V6: &str = "[2001:db8::1]:80";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn outbound_ipv4_is_captured_with_its_original_destination() {
    let node = Node::new();
    let pod = node.pod();
    let capture = node.capture();
    let listeners = pod.enrol(&capture);
    let mut client = pod.connect(addr(FOREIGN_V4)).unwrap();
    let (mut accepted, original) = accept_captured(&capture, &listeners);
    assert_eq!(original, addr(FOREIGN_V4));
    assert_eq!(client.peer_addr().unwrap(), addr(FOREIGN_V4));
    assert_eq!(client.local_addr().unwrap().ip(), pod.v4);
    talk(&mut client, &mut accepted);
    assert_eq!(capture.counts().flows, 0);
}
