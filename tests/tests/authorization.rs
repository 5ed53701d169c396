//! Policies decide at the destination: on tunnels, on one node and in plain, at first and later.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running};
use culvert_tests::expect::{counted, edit, is_refused, is_reset, logged, rule};
use culvert_tests::{binary, call, connect, echo, serve, who};

/// Clients of three identities and one without, and two servers for each of them to call: one on
/// their own node, one on another.
fn mesh(servers: &[(&str, &str)]) -> Mesh {
    let mut mesh = culvert_tests::mesh()
        .node("a")
        .pod("front", "web", "front")
        .pod("back", "web", "back")
        .pod("ops", "ops", "front")
        .pod_with(PodSpec::outside("plain", "web", "front"));
    for (name, namespace) in servers {
        mesh = mesh.pod(&format!("near-{name}"), namespace, "server");
    }
    mesh = mesh.node("b");
    for (name, namespace) in servers {
        mesh = mesh.pod(&format!("far-{name}"), namespace, "server");
    }
    mesh
}

const CLIENTS: [&str; 4] = ["front", "back", "ops", "plain"];

/// A match on each attribute of a connection, at a port of its own, and whom it matches.
fn attributes(mesh: &Running) -> Vec<(u16, Match, &'static [&'static str])> {
    let of = |name: &str| mesh.pod(name).v4();
    let any = Match::any;
    vec![
        (9001, any().principal("cluster.local/ns/web/sa/front"), &["front"]),
        (9002, any().with("namespaces", "[!Exact web]"), &["front", "back"]),
        (9003, any().service_account("web", "front"), &["front"]),
        (9004, any().with("sourceIps", &format!("[\"{}/32\"]", of("back"))), &["back"]),
        (9005, any(), &["front", "back", "ops", "plain"]),
        (9006, any().with("notPrincipals", "[!Presence []]"), &["plain"]),
        (9007, any().with("principals", "[!Presence []]"), &["front", "back", "ops"]),
        (9008, any().with("notDestinationIps", "[\"0.0.0.0/0\"]"), &[]),
    ]
}

#[test]
fn each_attribute_allows_and_denies_on_each_path() {
    let mut mesh = mesh(&[("shop", "shop"), ("vault", "vault")]).start().unwrap();
    let attributes = attributes(&mesh);
    let rules = || -> Vec<_> {
        attributes.iter().map(|(port, one, _)| rule(one.clone().port(*port))).collect()
    };
    let policies = vec![
        PolicySpec::deny("some", "shop", rules()),
        PolicySpec::allow("some", "vault", rules()),
    ];
    mesh.change(|mesh| mesh.policies = policies).unwrap();
    for server in ["near-shop", "far-shop", "near-vault", "far-vault"] {
        for port in 9000..=9008 {
            serve(&mesh, server, port, who).unwrap();
        }
    }
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let mut wrong = Vec::new();
    for side in ["near", "far"] {
        let mut expect = |client: &str, server: String, port: u16, allowed: bool| {
            let to = (mesh.pod(&server).v4().into(), port);
            let told = match allowed {
                true => call(&mesh, client, to, "").map_err(anyhow::Error::from).and_then(|seen| {
                    anyhow::ensure!(seen == mesh.pod(client).v4().to_string(), "seen as {seen}");
                    Ok(())
                }),
                false => is_refused(&mesh, client, to),
            };
            if let Err(error) = told {
                let wish = if allowed { "allowed" } else { "refused" };
                wrong.push(format!("{client} to {server}:{port}, {wish}: {error:#}"));
            }
        };
        for client in CLIENTS {
            expect(client, format!("{side}-shop"), 9000, true);
            expect(client, format!("{side}-vault"), 9000, false);
            for (port, _, matching) in &attributes {
                let matches = matching.contains(&client);
                expect(client, format!("{side}-shop"), *port, !matches);
                expect(client, format!("{side}-vault"), *port, matches);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_refusal_names_the_policy_and_its_rule_at_both_ends() {
    let never = rule(Match::any().port(1));
    let front = rule(Match::any().service_account("web", "front"));
    let plain = rule(Match::any().with("notPrincipals", "[!Presence []]"));
    let mesh = mesh(&[("shop", "shop"), ("vault", "vault")])
        .policy(PolicySpec::deny("no-front", "shop", vec![never, front, plain]))
        .policy(PolicySpec::allow("nobody", "vault", vec![]))
        .start()
        .unwrap();
    for server in ["near-shop", "far-shop", "near-vault", "far-vault"] {
        serve(&mesh, server, 8080, who).unwrap();
    }
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let to = |name: &str| (IpAddr::from(mesh.pod(name).v4()), 8080);
    for (client, server) in [
        ("front", "near-shop"),
        ("front", "far-shop"),
        ("plain", "far-shop"),
        ("front", "near-vault"),
        ("front", "far-vault"),
    ] {
        is_refused(&mesh, client, to(server)).unwrap();
    }

    let told = "connection closed due to policy rejection: explicitly denied by: shop/no-front";
    let nobody = "allow policies exist, but none allowed";
    let far = |name| format!("dst.workload=\"far-{name}\"");
    let near = |name| format!("dst.workload=\"near-{name}\"");
    // HBONE: what the source knows of the reason comes from a header of the 401.
    let line = logged(&a, &["outbound", &far("shop"), "error=\"http status: 401"]).unwrap();
    assert!(line.contains("explicitly denied by: shop/no-front, rule 1"), "{line}");
    let line = logged(&a, &["outbound", &far("vault"), "error=\"http status: 401"]).unwrap();
    assert!(line.contains(nobody), "{line}");
    let decided = ["policy=\"shop/no-front\"", "rule=1", told];
    logged(&b, &[&["inbound", "src.workload=\"front\"", &far("shop")], &decided[..]].concat())
        .unwrap();
    logged(&b, &["inbound", &far("vault"), nobody]).unwrap();
    // Plaintext: the third rule.
    let decided = ["policy=\"shop/no-front\"", "rule=2", told];
    logged(&b, &[&["inbound", "src.workload=\"plain\"", &far("shop")], &decided[..]].concat())
        .unwrap();
    // One node: both ends are told by one agent.
    logged(&a, &["outbound", &near("shop"), told]).unwrap();
    logged(&a, &["inbound", &near("shop"), "policy=\"shop/no-front\"", "rule=1", told]).unwrap();
    logged(&a, &["inbound", &near("vault"), nobody]).unwrap();

    let name = "culvert_authorization_denied_total";
    let explicit = ["policy=\"shop/no-front\"", "reason=\"explicit\""];
    let nobody = ["policy=\"\"", "reason=\"none_allowed\""];
    counted(&a, name, &[&explicit[..], &["rule=\"1\""]].concat(), 1.0).unwrap();
    counted(&b, name, &[&explicit[..], &["rule=\"1\""]].concat(), 1.0).unwrap();
    counted(&b, name, &[&explicit[..], &["rule=\"2\""]].concat(), 1.0).unwrap();
    counted(&a, name, &nobody, 1.0).unwrap();
    counted(&b, name, &nobody, 1.0).unwrap();
}

#[test]
fn a_dry_run_is_told_and_counted_but_not_enforced() {
    let everything = || vec![rule(Match::any().port(8080))];
    let dry = |policy| PolicySpec { dry_run: true, ..policy };
    let mesh = mesh(&[("shop", "shop"), ("vault", "vault")])
        .policy(dry(PolicySpec::deny("maybe-not", "shop", everything())))
        .policy(dry(PolicySpec::allow("maybe-nobody", "vault", vec![])))
        .start()
        .unwrap();
    for server in ["near-shop", "far-shop", "far-vault"] {
        serve(&mesh, server, 8080, echo).unwrap();
    }
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    for (client, server) in [
        ("front", "near-shop"),
        ("front", "far-shop"),
        ("plain", "far-shop"),
        ("front", "far-vault"),
    ] {
        let to = (mesh.pod(server).v4().into(), 8080);
        assert_eq!(call(&mesh, client, to, "hello").unwrap(), "hello", "{client} {server}");
    }
    let name = "culvert_authorization_dry_run_total";
    let denied = ["policy=\"shop/maybe-not\"", "action=\"deny\"", "matched=\"true\""];
    let nobody = ["policy=\"vault/maybe-nobody\"", "action=\"allow\"", "matched=\"false\""];
    counted(&a, name, &denied, 1.0).unwrap();
    counted(&b, name, &denied, 2.0).unwrap();
    counted(&b, name, &nobody, 1.0).unwrap();
    logged(&a, &["dry run: would be denied by: shop/maybe-not"]).unwrap();
    logged(&b, &["dry run: would be denied by: shop/maybe-not"]).unwrap();
    logged(&b, &["dry run: would be denied: none allowed of vault/maybe-nobody"]).unwrap();
    counted(&b, "culvert_authorization_denied_total", &[], 0.0).unwrap();
}

/// An open connection of each path to one port.
struct Open(Vec<(&'static str, TcpStream)>);

/// A tunnel, one node, and plaintext.
const PATHS: [(&str, &str); 3] =
    [("front", "far-shop"), ("front", "near-shop"), ("plain", "far-shop")];

impl Open {
    fn new(mesh: &Running, port: u16) -> Self {
        let open = PATHS.iter().map(|(client, server)| {
            let to = (mesh.pod(server).v4().into(), port);
            (*server, connect(mesh, client, to).unwrap())
        });
        let mut open = Self(open.collect());
        open.work("when new");
        open
    }

    /// Each still answers.
    fn work(&mut self, when: &str) {
        for (server, stream) in &mut self.0 {
            stream.write_all(b"still?").unwrap_or_else(|error| panic!("{server} {when}: {error}"));
            let mut answer = [0; 6];
            stream.read_exact(&mut answer).unwrap_or_else(|e| panic!("{server} {when}: {e}"));
            assert_eq!(&answer, b"still?", "{server} {when}");
        }
    }

    /// Each is cut.
    fn are_closed(self, when: &str) {
        for (server, stream) in &self.0 {
            is_reset(stream).unwrap_or_else(|error| panic!("{server} {when}: {error:#}"));
        }
    }
}

/// How long after an edit its effect must show; the best of several, for the machine is busy.
const PROMPT: Duration = Duration::from_secs(3);

fn tell_closings(a: &Agent, b: &Agent, policy: &str, at_b: f64) {
    let name = "culvert_authorization_denied_total";
    let labels = [&format!("policy=\"{policy}\""), "reason=\"policy_change\""];
    counted(b, name, &labels, at_b).unwrap();
    counted(a, name, &labels, at_b / 2.0).unwrap();
}

#[test]
fn live_connections_are_judged_again_after_every_change() {
    let mut mesh = mesh(&[("shop", "shop")]).start().unwrap();
    for server in ["near-shop", "far-shop"] {
        serve(&mesh, server, 8080, echo).unwrap();
        serve(&mesh, server, 8081, echo).unwrap();
    }
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let agents = [&a, &b];
    let port = |port| vec![rule(Match::any().port(port))];
    let mut prompt = Vec::new();
    let mut witnesses = Open::new(&mesh, 8081);
    let mut open = Open::new(&mesh, 8080);
    counted(&a, "culvert_tunnel_connections", &[], 1.0).unwrap();

    let elsewhere = PolicySpec::deny("elsewhere", "other", port(8080));
    edit(&mut mesh, &agents, |mesh| mesh.policies = vec![elsewhere]).unwrap();
    open.work("after an unrelated policy came");

    let dry = PolicySpec { dry_run: true, ..PolicySpec::deny("dry", "shop", port(8080)) };
    edit(&mut mesh, &agents, |mesh| mesh.policies = vec![dry]).unwrap();
    open.work("after a policy in dry run came");

    let allow = PolicySpec::allow("all", "shop", [port(8080), port(8081)].concat());
    edit(&mut mesh, &agents, |mesh| mesh.policies = vec![allow]).unwrap();
    open.work("under a policy that allows them");
    edit(&mut mesh, &agents, |mesh| mesh.policies = vec![]).unwrap();
    open.work("after the only policy that allowed them went");

    let bound = PolicySpec::deny("bound", "shop", port(8080));
    let bound = PolicySpec { scope: "WorkloadSelector", ..bound };
    edit(&mut mesh, &agents, |mesh| mesh.policies = vec![bound]).unwrap();
    open.work("after a policy came that nothing is bound to");
    let changed = Instant::now();
    mesh.change(|mesh| {
        for pod in &mut mesh.pods {
            pod.policies = vec!["shop/bound".to_owned()];
        }
    })
    .unwrap();
    open.are_closed("after they were bound to a policy that denies them");
    prompt.push(changed.elapsed());
    tell_closings(&a, &b, "shop/bound", 2.0);
    edit(&mut mesh, &agents, |mesh| mesh.policies = vec![]).unwrap();

    let open = Open::new(&mesh, 8080);
    let global = PolicySpec { scope: "Global", ..PolicySpec::deny("no", "root", port(8080)) };
    let changed = Instant::now();
    mesh.change(|mesh| mesh.policies = vec![global]).unwrap();
    open.are_closed("after a policy came that denies them");
    prompt.push(changed.elapsed());
    tell_closings(&a, &b, "root/no", 2.0);

    let allowing = [
        PolicySpec::allow("one", "shop", port(8080)),
        PolicySpec::allow("other", "shop", port(8081)),
    ];
    edit(&mut mesh, &agents, |mesh| mesh.policies = allowing.to_vec()).unwrap();
    let open = Open::new(&mesh, 8080);
    let changed = Instant::now();
    mesh.change(|mesh| drop(mesh.policies.remove(0))).unwrap();
    open.are_closed("after the one policy that allowed them went");
    prompt.push(changed.elapsed());
    tell_closings(&a, &b, "", 2.0);

    witnesses.work("in the end");
    counted(&a, "culvert_tunnel_connections", &[], 1.0).unwrap();
    let told = "error=\"connection closed due to policy change\"";
    for policy in ["policy=\"shop/bound\"", "policy=\"root/no\""] {
        logged(&b, &["inbound", "src.workload=\"front\"", policy, "rule=0", told]).unwrap();
        logged(&b, &["inbound", "src.workload=\"plain\"", policy, "rule=0", told]).unwrap();
        logged(&a, &["inbound", policy, "rule=0", told]).unwrap();
    }
    assert!(prompt.iter().min() < Some(&PROMPT), "{prompt:?}");
}

#[test]
fn a_pod_is_known_by_its_service_account_of_now() {
    let renamed = rule(Match::any().service_account("web", "renamed"));
    let mut mesh = mesh(&[("shop", "shop")])
        .policy(PolicySpec::allow("renamed", "shop", vec![renamed]))
        .start()
        .unwrap();
    let targets = ["near-shop", "far-shop"].map(|server| {
        serve(&mesh, server, 8080, echo).unwrap();
        (IpAddr::from(mesh.pod(server).v4()), 8080)
    });
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let rename = |mesh: &mut Mesh, account: &str| {
        let front = mesh.pods.iter_mut().find(|pod| pod.name == "front");
        front.unwrap().service_account = account.to_owned();
    };
    for account in ["front", "renamed", "front"] {
        if account != mesh.spec("front").service_account {
            edit(&mut mesh, &[&a, &b], |mesh| rename(mesh, account)).unwrap();
        }
        for to in targets {
            if account == "renamed" {
                assert_eq!(call(&mesh, "front", to, "hello").unwrap(), "hello", "{to:?}");
            } else {
                is_refused(&mesh, "front", to).unwrap();
            }
        }
    }
}
