//! Certificates that are revoked while connections live: both ends cut them, and nobody else's.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Mesh, Running};
use culvert_lab::wait::{self, SOON};
use culvert_tests::control::ca::revocation_list;
use culvert_tests::expect::{counted, logged};
use culvert_tests::{binary, call, connect, echo, figures, serial_bytes, serve};
use rcgen::{Issuer, KeyPair};

const PORT: u16 = 8080;
const REJECTED: &str = "istio_crl_policy_rejections_total";
const UNTRACKED: &str = "istio_crl_untracked_connections_total";
const FAILED: &str = "istio_tcp_connections_failed_total";
const TOLD: &str = "connection closed: peer certificate revoked by CRL";

/// An agent with revocation lists of its own.
struct Listed {
    agent: Agent,
    crl: PathBuf,
}

impl Listed {
    fn start(mesh: &Running, node: &str) -> Self {
        let crl = mesh.lab().state().join(format!("{node}-crl.pem"));
        let mut options = AgentOptions::new(&binary(), &mesh.config());
        options.environment.push(("CRL_PATH".to_owned(), crl.to_str().unwrap().to_owned()));
        Self { agent: mesh.agent_with(node, &options).unwrap(), crl }
    }

    /// Revokes the certificates that `other` holds for the identities of these pods.
    fn revoke(&self, mesh: &Running, other: &Agent, pods: &[&str]) {
        let serials: Vec<_> = pods
            .iter()
            .map(|pod| {
                let identity = mesh.spec(pod).identity();
                let serial = figures::serial(other, &identity).unwrap().unwrap();
                serial_bytes(&serial).unwrap()
            })
            .collect();
        replace(&self.crl, &revocation_list(&issuer(&mesh.ca()), &serials));
    }
}

fn issuer(ca: &Path) -> Issuer<'static, KeyPair> {
    let read = |name: &str| fs::read_to_string(ca.join(name)).unwrap();
    let key = KeyPair::from_pem(&read("root.key")).unwrap();
    Issuer::from_ca_cert_pem(&read("root.pem"), key).unwrap()
}

fn replace(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    fs::write(&draft, text).unwrap();
    fs::rename(&draft, path).unwrap();
}

fn ping(mut stream: &TcpStream) -> std::io::Result<()> {
    stream.write_all(b"ping")?;
    stream.read_exact(&mut [0; 4])
}

/// Waits until an idle connection is cut by a reset.
fn is_cut(mut stream: &TcpStream) {
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
}

#[test]
fn revoked_peers_are_cut_off_and_refused_at_either_end() {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("other", "web", "other")
        .node("b")
        .pod("server", "shop", "server")
        .pod("second", "shop", "second")
        .start()
        .unwrap();
    for pod in ["server", "second"] {
        serve(&mesh, pod, PORT, echo).unwrap();
    }
    let (a, b) = (Listed::start(&mesh, "a"), Listed::start(&mesh, "b"));
    let to = |pod: &str| (mesh.pod(pod).v4().into(), PORT);
    let open = |from: &str, pod: &str| {
        let stream = connect(&mesh, from, to(pod)).unwrap();
        ping(&stream).unwrap();
        stream
    };
    let (revoked, unconcerned) = (open("client", "server"), open("other", "server"));

    // The server's end learns that the client is revoked.
    b.revoke(&mesh, &a.agent, &["client"]);
    is_cut(&revoked);
    ping(&unconcerned).unwrap();
    counted(&b.agent, REJECTED, &["reporter=\"destination\""], 1.0).unwrap();
    counted(&b.agent, FAILED, &["response_flags=\"CERT_REVOKED\""], 1.0).unwrap();
    logged(&b.agent, &[TOLD, "access"]).unwrap();
    call(&mesh, "client", to("server"), "hello").unwrap_err();
    wait::until("the handshake to be counted as refused", SOON, || {
        b.agent.metric(REJECTED, &["reporter=\"destination\""]).unwrap() >= 2.0
    })
    .unwrap();
    assert_eq!(call(&mesh, "other", to("server"), "hello").unwrap(), "hello");

    // Taken back, everybody is let in again.
    replace(&b.crl, "");
    wait::until("the client to be let in again", SOON, || {
        call(&mesh, "client", to("server"), "hello").is_ok_and(|answer| answer == "hello")
    })
    .unwrap();

    // The client's end learns that one of two servers is revoked.
    let (revoked, unconcerned) = (open("client", "second"), open("client", "server"));
    a.revoke(&mesh, &b.agent, &["second"]);
    is_cut(&revoked);
    ping(&unconcerned).unwrap();
    counted(&a.agent, FAILED, &["response_flags=\"CERT_REVOKED\""], 1.0).unwrap();
    logged(&a.agent, &[TOLD, "access"]).unwrap();
    assert!(a.agent.metric(REJECTED, &["reporter=\"source\""]).unwrap() >= 1.0);
    call(&mesh, "client", to("second"), "hello").unwrap_err();
    logged(&a.agent, &["it was revoked by its authority"]).unwrap();
    assert_eq!(call(&mesh, "client", to("server"), "hello").unwrap(), "hello");
    for agent in [&a.agent, &b.agent] {
        assert_eq!(agent.metric(UNTRACKED, &[]).unwrap(), 0.0);
    }
}
