//! Plain calls through the mesh: same node and across, both families, by pod and by service.

#![allow(clippy::unwrap_used)]

use culvert_lab::mesh::Mesh;
use culvert_tests::{binary, call, echo, serve};

#[test]
fn pods_call_each_other_on_one_node_and_across() {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "server")
        .node("b")
        .pod("far", "shop", "server")
        .start()
        .unwrap();
    serve(&mesh, "near", 8080, echo).unwrap();
    serve(&mesh, "far", 8080, echo).unwrap();
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    for name in ["near", "far"] {
        for ip in mesh.pod(name).addresses() {
            assert_eq!(call(&mesh, "client", (ip, 8080), "hello").unwrap(), "hello", "{name} {ip}");
        }
    }
}
