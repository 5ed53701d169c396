//! Every parser of bytes from outside, by name: what fuzz targets and the replay of their seeds run.
//!
//! Each takes any bytes and must not panic. What it asserts must hold for all of them: above all
//! that what was read, printed and read again is the same.

mod control;
mod names;
mod operator;
mod tls;
mod tunnel;

/// One parser.
#[derive(Clone, Copy)]
pub struct Parser {
    /// Also the name of its fuzz target and of the folder with its seeds.
    pub name: &'static str,
    pub run: fn(&[u8]),
}

/// All of them, those of unauthenticated peers first.
pub const ALL: &[Parser] = &[
    // From whoever connects, and from the peers of the mesh.
    Parser { name: "tls_hello", run: tls::hello },
    Parser { name: "tls_records", run: tls::records },
    Parser { name: "tunnel_server", run: tunnel::server },
    Parser { name: "tunnel_client", run: tunnel::client },
    Parser { name: "connect_headers", run: tunnel::headers },
    Parser { name: "authority", run: names::authority },
    Parser { name: "identity", run: names::identity },
    Parser { name: "proxy_header", run: tunnel::proxy_header },
    // From pods.
    Parser { name: "dns_question", run: names::dns_question },
    // From the control plane and the node's CNI plugin.
    Parser { name: "address", run: control::address },
    Parser { name: "authorization", run: control::authorization },
    Parser { name: "discovery", run: control::discovery },
    Parser { name: "discovery_stream", run: control::discovery_stream },
    Parser { name: "certificate_answer", run: control::certificate_answer },
    Parser { name: "zds_packets", run: control::zds_packets },
    // From another agent of the node.
    Parser { name: "handover_packets", run: control::handover_packets },
    // From the operator.
    Parser { name: "mesh_file", run: operator::mesh_file },
    Parser { name: "settings", run: operator::settings },
    Parser { name: "log_directives", run: operator::log_directives },
    Parser { name: "revocation_list", run: operator::revocation_list },
    Parser { name: "resolv_conf", run: operator::resolv_conf },
];

/// Runs the parser of this name.
pub fn run(name: &str, bytes: &[u8]) {
    let parser = ALL.iter().find(|parser| parser.name == name);
    let parser = parser.unwrap_or_else(|| panic!("there is no parser {name:?}"));
    (parser.run)(bytes);
}
