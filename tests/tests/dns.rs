//! Names: what pods ask is answered from the mesh, or by the agent's name servers.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{PodSpec, Running};
use culvert_lab::place::Place;
use culvert_lab::wait;
use culvert_tests::names::{
    LARGE, NameServer, TTL, ask_connected, ask_tcp, ask_udp, framed, query, query_with_edns,
    read_framed, udp_socket,
};
use culvert_tests::{LIMIT, binary};
use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{RData, RecordType};

/// Name servers that nobody is: the pods ask them, and the agent answers.
const SERVERS: [&str; 2] = ["192.0.2.53:53", "[2001:db8::53]:53"];

/// The services that questions are about, beside the workloads behind the headless ones.
const SERVICES: &str = r#"
  - {name: cart, namespace: shop, hostname: cart.shop.svc.cluster.local, ports: {}, vips: ["/10.96.0.1", "/fd00:96::1", "n2/10.97.0.1"]}
  - {name: api, namespace: other, hostname: api.other.svc.cluster.local, ports: {}, vips: ["/10.96.0.2"]}
  - {name: head, namespace: shop, hostname: head.shop.svc.cluster.local, ports: {}, vips: []}
  - {name: headv4, namespace: shop, hostname: headv4.shop.svc.cluster.local, ports: {}, vips: [], ipFamilies: IPv4}
  - {name: ext, namespace: shop, hostname: www.ext.example, ports: {}, vips: ["/240.240.0.1"]}
  - {name: novip, namespace: shop, hostname: novip.example, ports: {}, vips: []}
  - {name: wild, namespace: shop, hostname: "*.wild.example", ports: {}, vips: ["/240.240.0.2"]}
  - {name: dup1, namespace: a, hostname: dup.example, ports: {}, vips: ["/240.240.0.3"]}
  - {name: dup2, namespace: b, hostname: dup.example, ports: {}, vips: ["/240.240.0.4"], canonical: true}
  - {name: priv, namespace: a, hostname: priv.example, ports: {}, vips: ["/240.240.0.5"], visibility: Namespace}
  - {name: cid, namespace: shop, hostname: cidr.example, ports: {}, vips: [], cidrVips: [{network: "", cidr: 240.241.0.0/24}]}
  - {name: far, namespace: shop, hostname: far.shop.svc.cluster.local, ports: {}, vips: ["n2/10.97.0.9"]}
  - {name: db, namespace: shop, hostname: db.shop.svc.cluster.local, ports: {5432: 5432}, vips: ["/10.96.0.3"]}
"#;
const WORKLOADS: &str = r#"
  - {uid: h-0, name: h-0, namespace: shop, workloadIps: ["10.1.0.1", "fd00::a1"], services: {shop/head.shop.svc.cluster.local: {}, shop/headv4.shop.svc.cluster.local: {}}}
  - {uid: h-1, name: h-1, namespace: shop, workloadIps: ["10.1.0.2", "10.1.0.22"], services: {shop/head.shop.svc.cluster.local: {}}}
  - {uid: h-2, name: h-2, namespace: shop, workloadIps: ["10.1.0.3"], status: Unhealthy, services: {shop/head.shop.svc.cluster.local: {}}}
  - {uid: db, name: db, namespace: shop, workloadIps: [], hostname: db.elsewhere.example, services: {shop/db.shop.svc.cluster.local: {5432: 5432}}}
"#;

/// A node with two enrolled pods, one that is not, and one with the agent's name server.
struct Town {
    agent: Agent,
    server: NameServer,
    mesh: Running,
}

impl Town {
    fn new() -> Town {
        let mesh = culvert_tests::mesh_with_names()
            .node("a")
            .pod("client", "shop", "client")
            .pod("neighbour", "a", "neighbour")
            .pod_with(PodSpec::outside("plain", "shop", "plain"))
            .pod_with(PodSpec::unknown("resolver"))
            .start()
            .unwrap();
        let resolver = mesh.pod("resolver");
        let server = NameServer::start(resolver.place(), resolver.v4().into()).unwrap();
        let agent = start(&mesh, &server);
        Town { agent, server, mesh }
    }

    fn place(&self, pod: &str) -> &Place {
        self.mesh.pod(pod).place()
    }

    fn client(&self) -> &Place {
        self.place("client")
    }

    /// Asks in every way, and expects the same each time.
    fn expect(&self, pod: &str, question: &Message, expected: &str) {
        let place = self.place(pod);
        for server in SERVERS.map(addr) {
            for (how, answer) in [
                ("udp", ask_udp(place, server, question)),
                ("connected udp", ask_connected(place, server, question)),
                ("tcp", ask_tcp(place, server, question)),
            ] {
                let answer = answer.unwrap_or_else(|error| panic!("{how} {server}: {error}"));
                assert_eq!(told(&answer), expected, "{how} {server} {}", question.queries[0]);
                assert_eq!(answer.metadata.recursion_desired, question.metadata.recursion_desired);
                assert!(answer.metadata.recursion_available);
                assert!(answer.queries[0].name().eq_case(question.queries[0].name()));
            }
        }
    }

    fn ask(&self, name: &str) -> Message {
        ask_udp(self.client(), addr(SERVERS[0]), &query(name, RecordType::A)).unwrap()
    }
}

/// Starts the node's agent with that name server in its `resolv.conf`, in a mount namespace.
fn start(mesh: &Running, server: &NameServer) -> Agent {
    let state = mesh.lab().state();
    let text = fs::read_to_string(mesh.config()).unwrap();
    let text = text.replacen("workloads:", &format!("workloads:{WORKLOADS}"), 1);
    let text = text.replacen("services:\npolicies:", &format!("services:{SERVICES}policies:"), 1);
    let config = state.join("names.yaml");
    fs::write(&config, text).unwrap();
    let resolv_conf = state.join("agent-resolv.conf");
    fs::write(&resolv_conf, server.resolv_conf()).unwrap();
    let script = format!(
        "#!/bin/sh\nexport ISTIO_META_DNS_CAPTURE=true\n\
         [ \"$1\" = run ] || exec {culvert} \"$@\"\n\
         exec unshare -m --propagation slave sh -c \
         'mount --bind {resolv_conf} /etc/resolv.conf && exec {culvert} \"$@\"' culvert \"$@\"\n",
        culvert = binary().display(),
        resolv_conf = resolv_conf.display(),
    );
    let wrapper = state.join("culvert-with-names");
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let options =
        AgentOptions { log: "info,dns=debug".to_owned(), ..AgentOptions::new(&wrapper, &config) };
    mesh.agent_with("a", &options).unwrap()
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// An answer in one line: its code unless it is NOERROR, `AA`, and its records. Owners are told
/// where they are not the name of the question, letter by letter; addresses are sorted.
fn told(answer: &Message) -> String {
    let mut words = Vec::new();
    if answer.metadata.response_code != ResponseCode::NoError {
        words.push(format!("{:?}", answer.metadata.response_code));
    }
    if answer.metadata.authoritative {
        words.push("AA".to_owned());
    }
    let asked = answer.queries[0].name();
    let mut records: Vec<String> = Vec::new();
    for record in &answer.answers {
        if answer.metadata.authoritative {
            assert_eq!(record.ttl, 30);
        }
        let data = match &record.data {
            RData::A(ip) => ip.0.to_string(),
            RData::AAAA(ip) => ip.0.to_string(),
            RData::CNAME(name) => format!("CNAME {}", name.0),
            RData::TXT(_) => "TXT".to_owned(),
            other => other.to_string(),
        };
        let owner =
            if record.name.eq_case(asked) { String::new() } else { format!("{} ", record.name) };
        records.push(owner + &data);
    }
    let aliases = records.iter().filter(|record| record.starts_with("CNAME")).count();
    records[aliases..].sort_unstable();
    words.extend(records);
    words.join(" ")
}

#[test]
fn known_names_are_answered_from_the_mesh() {
    const FORWARDED: &str = "192.0.2.99";
    let town = Town::new();
    for (name, kind, expected) in [
        ("cart.shop.svc.cluster.local", "A", "AA 10.96.0.1"),
        ("cart.shop.svc.cluster.local", "AAAA", "AA fd00:96::1"),
        ("cart", "A", "AA 10.96.0.1"),
        ("cart.shop", "A", "AA 10.96.0.1"),
        ("cart.shop.svc", "A", "AA 10.96.0.1"),
        ("CaRt.ShOp.svc.cluster.local", "A", "AA 10.96.0.1"),
        ("api", "A", FORWARDED),
        ("api.other", "A", "AA 10.96.0.2"),
        ("api.other.svc.cluster.local", "AAAA", "AA"),
        ("api.shop.svc.cluster.local", "A", FORWARDED),
        ("head.shop.svc.cluster.local", "A", "AA 10.1.0.1 10.1.0.2"),
        ("head.shop.svc.cluster.local", "AAAA", "AA fd00::a1"),
        ("headv4.shop.svc.cluster.local", "AAAA", "AA"),
        ("h-0.head.shop.svc.cluster.local", "A", FORWARDED),
        ("nosuch.shop.svc.cluster.local", "A", FORWARDED),
        ("www.ext.example", "A", "AA 240.240.0.1"),
        ("www.ext.example", "AAAA", "AA"),
        ("novip.example", "A", FORWARDED),
        ("cidr.example", "A", FORWARDED),
        ("priv.example", "A", FORWARDED),
        ("wild.example", "A", FORWARDED),
        ("foo.wild.example", "A", "AA 240.240.0.2"),
        ("a.b.wild.example", "A", "AA 240.240.0.2"),
        ("dup.example", "A", "AA 240.240.0.4"),
        ("far.shop.svc.cluster.local", "A", "AA"),
        ("cart.shop.svc.cluster.local", "TXT", "TXT"),
        (
            "cart.shop.svc.cluster.local.shop.svc.cluster.local",
            "A",
            "AA CNAME cart.shop.svc.cluster.local. cart.shop.svc.cluster.local. 10.96.0.1",
        ),
        ("cart.shop.shop.svc.cluster.local", "A", "AA CNAME cart.shop. cart.shop. 10.96.0.1"),
        ("cart.svc.cluster.local", "A", "AA CNAME cart. cart. 10.96.0.1"),
        (
            "api.other.svc.cluster.local.cluster.local",
            "A",
            "AA CNAME api.other.svc.cluster.local. api.other.svc.cluster.local. 10.96.0.2",
        ),
        (
            "www.ext.example.shop.svc.cluster.local",
            "A",
            "AA CNAME www.ext.example. www.ext.example. 240.240.0.1",
        ),
        ("www.ext.example.shop.svc.cluster.local", "AAAA", "AA"),
        ("foo.wild.example.svc.cluster.local", "A", "AA 240.240.0.2"),
        (
            "head.shop.svc.cluster.local.svc.cluster.local",
            "A",
            "AA CNAME head.shop.svc.cluster.local. head.shop.svc.cluster.local. 10.1.0.1 \
             head.shop.svc.cluster.local. 10.1.0.2",
        ),
    ] {
        town.expect("client", &query(name, kind.parse().unwrap()), expected);
    }
    // A client of another namespace.
    town.expect("neighbour", &query("priv.example", RecordType::A), "AA 240.240.0.5");
}

#[test]
fn clients_are_answered_in_kind() {
    let town = Town::new();
    let mut undesired = query("cart.shop", RecordType::A);
    undesired.metadata.recursion_desired = false;
    town.expect("client", &undesired, "AA 10.96.0.1");
    for name in ["cart.shop", "unknown.example"] {
        for (payload, dnssec_ok) in [(4096, true), (512, false)] {
            let question = query_with_edns(name, RecordType::A, payload, dnssec_ok);
            let answer = ask_udp(town.client(), addr(SERVERS[0]), &question).unwrap();
            let edns = answer.edns.unwrap();
            assert_eq!((edns.max_payload(), edns.flags().dnssec_ok), (payload, dnssec_ok));
        }
    }
    let mut notify = query("cart.shop", RecordType::A);
    notify.metadata.op_code = OpCode::Notify;
    let mut response = query("cart.shop", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    for (message, code) in [(notify, ResponseCode::NotImp), (response, ResponseCode::FormErr)] {
        for ask in [ask_udp, ask_connected, ask_tcp] {
            let answer = ask(town.client(), addr(SERVERS[0]), &message).unwrap();
            assert_eq!(answer.metadata.response_code, code);
        }
    }
}

#[test]
fn what_name_servers_say_is_passed_on() {
    let town = Town::new();
    for (name, expected) in [
        ("nx.example", "NXDomain"),
        ("refused.example", "Refused"),
        ("empty.example", ""),
        ("other.example", "192.0.2.99"),
    ] {
        town.expect("client", &query(name, RecordType::A), expected);
    }
    // For how long there is nothing.
    let negative = town.ask("nx.example");
    assert_eq!(negative.authorities.len(), 1);
    assert_eq!(negative.authorities[0].record_type(), RecordType::SOA);
    let asked = town.server.asked("refused.example").len();
    assert!(asked > 1, "tried again after an error: {asked}");
    // The pod itself asks.
    let own = town.mesh.pod("client").addresses();
    assert!(town.server.asked("other.example").iter().all(|asked| own.contains(&asked.from)));
    // An answer of more than 512 bytes is fetched over TCP, and cut for those who take less.
    let large = query("large.example", RecordType::A);
    let cut = ask_udp(town.client(), addr(SERVERS[0]), &large).unwrap();
    assert!(cut.metadata.truncation && !cut.answers.is_empty());
    let whole = ask_tcp(town.client(), addr(SERVERS[0]), &large).unwrap();
    assert_eq!((whole.metadata.truncation, whole.answers.len()), (false, LARGE as usize));
    assert!(town.server.asked("large.example").iter().any(|asked| asked.over_tcp));
}

#[test]
fn a_silent_name_server_is_a_failure_in_the_end() {
    let town = Town::new();
    let begun = Instant::now();
    let answer = town.ask("silent.example");
    assert_eq!(told(&answer), "ServFail");
    assert!(begun.elapsed() >= Duration::from_secs(2), "two attempts of a second");
    // Others are not kept waiting.
    let socket = udp_socket(town.client(), addr(SERVERS[0])).unwrap();
    let silent = query("silent.other.example", RecordType::A).to_vec().unwrap();
    for _ in 0..300 {
        socket.send_to(&silent, addr(SERVERS[0])).unwrap();
    }
    assert_eq!(told(&town.ask("cart.shop")), "AA 10.96.0.1");
    let asked =
        ask_udp(town.place("neighbour"), addr(SERVERS[0]), &query("x.example", RecordType::A));
    assert_eq!(told(&asked.unwrap()), "192.0.2.99");
}

#[test]
fn answers_are_remembered_and_grow_old() {
    let town = Town::new();
    let first = town.ask("once.example");
    assert_eq!(first.answers[0].ttl, TTL);
    wait::until("a smaller time to live", LIMIT, || town.ask("once.example").answers[0].ttl < TTL)
        .unwrap();
    assert_eq!(town.server.asked("once.example").len(), 1);
    // In other letters it is the same name, told as it was asked.
    let again = town.ask("OnCe.Example");
    assert_eq!(again.answers[0].name.to_ascii(), "OnCe.Example.");
    assert_eq!(town.server.asked("once.example").len(), 1);
    // A negative answer is remembered as long as its zone says.
    for _ in 0..2 {
        assert_eq!(told(&town.ask("nx.once.example")), "NXDomain");
    }
    assert_eq!(town.server.asked("nx.once.example").len(), 1);
    // Not for another pod.
    let question = query("once.example", RecordType::A);
    ask_udp(town.place("neighbour"), addr(SERVERS[0]), &question).unwrap();
    assert_eq!(town.server.asked("once.example").len(), 2);
}

/// Runs `getent` in a pod whose `resolv.conf` names a server that nobody is.
fn getent(town: &Town, pod: &str, name: &str) -> anyhow::Result<String> {
    let state = town.mesh.lab().state();
    let resolv_conf = state.join("pod-resolv.conf");
    let text = "nameserver 192.0.2.53\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\n\
                options ndots:5\n";
    fs::write(&resolv_conf, text)?;
    let switch = state.join("pod-nsswitch.conf");
    fs::write(&switch, "hosts: dns\n")?;
    let script = format!(
        "mount --bind {} /etc/resolv.conf && \
         {{ [ ! -e /etc/nsswitch.conf ] || mount --bind {} /etc/nsswitch.conf; }} && \
         exec getent ahostsv4 {name}",
        resolv_conf.display(),
        switch.display(),
    );
    town.place(pod).output("unshare", &["-m", "sh", "-c", &script])
}

#[test]
fn the_c_library_resolves_names() {
    let town = Town::new();
    for (name, ip) in [
        ("cart", "10.96.0.1"),
        ("cart.shop.svc.cluster.local", "10.96.0.1"),
        ("www.ext.example", "240.240.0.1"),
        ("plain.upstream.example.", "192.0.2.99"),
    ] {
        let found = getent(&town, "client", name).unwrap();
        assert!(found.contains(ip), "{name}: {found}");
    }
}

#[test]
fn resolvers_of_the_pod_and_pods_that_are_not_enrolled_are_left_alone() {
    let town = Town::new();
    let question = query("www.ext.example", RecordType::A);
    for own in ["127.0.0.53", "127.0.0.11", "::1"] {
        let ip: IpAddr = own.parse().unwrap();
        let local = NameServer::start(town.client(), ip).unwrap();
        // Of loopback istio-cni's rules spare 127.0.0.1 alone when the question comes over TCP.
        let by_tcp = ip.is_ipv6() || !culvert_tests::is_by_rules();
        let ways = [ask_udp, ask_connected, ask_tcp];
        let ways = if by_tcp { &ways[..] } else { &ways[..2] };
        for ask in ways {
            let answer = ask(town.client(), SocketAddr::new(ip, 53), &question).unwrap();
            assert_eq!(told(&answer), "192.0.2.99");
        }
        assert_eq!(local.asked("www.ext.example").len(), ways.len(), "{own}");
    }
    let server = SocketAddr::new(town.mesh.pod("resolver").v4().into(), 53);
    for ask in [ask_udp, ask_connected, ask_tcp] {
        assert_eq!(told(&ask(town.place("plain"), server, &question).unwrap()), "192.0.2.99");
    }
    let asked = town.server.asked("www.ext.example");
    let plain = town.mesh.pod("plain").addresses();
    assert_eq!(asked.len(), 3);
    assert!(asked.iter().all(|asked| plain.contains(&asked.from)));
}

#[test]
fn without_the_agent_no_question_gets_out() {
    let mut town = Town::new();
    let server = SocketAddr::new(town.mesh.pod("resolver").v4().into(), 53);
    let question = query("cart.shop", RecordType::A);
    assert_eq!(told(&ask_udp(town.client(), server, &question).unwrap()), "AA 10.96.0.1");
    town.agent.process().kill().unwrap();
    for ask in [ask_connected, ask_tcp] {
        let refused = ask(town.client(), server, &question).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    let unconnected = udp_socket(town.client(), server).unwrap();
    unconnected.send_to(&question.to_vec().unwrap(), server).unwrap();
    let town = Town { agent: start(&town.mesh, &town.server), ..town };
    assert_eq!(told(&ask_udp(town.client(), server, &question).unwrap()), "AA 10.96.0.1");
    assert_eq!(town.server.asked("cart.shop").len(), 0);
}

#[test]
fn questions_that_wait_are_answered_when_the_agent_ends() {
    let mut town = Town::new();
    let socket = udp_socket(town.client(), addr(SERVERS[0])).unwrap();
    let question = query("silent.example", RecordType::A).to_vec().unwrap();
    socket.send_to(&question, addr(SERVERS[0])).unwrap();
    wait::until("the question to be passed on", LIMIT, || {
        !town.server.asked("silent.example").is_empty()
    })
    .unwrap();
    town.agent.process().terminate(LIMIT).unwrap();
    let mut buffer = [0; 512];
    let (length, _) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(told(&Message::from_vec(&buffer[..length]).unwrap()), "ServFail");
}

#[test]
fn thousands_of_questions_at_once_are_answered() {
    const CLIENTS: usize = 16;
    const EACH: usize = 150;
    let town = Town::new();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let town = &town;
            scope.spawn(move || {
                let server = addr(SERVERS[client % 2]);
                for n in 0..EACH {
                    let known = query("head.shop", RecordType::A);
                    let answer = ask_udp(town.client(), server, &known).unwrap();
                    assert_eq!(told(&answer), "AA 10.1.0.1 10.1.0.2");
                    if n % 5 == 0 {
                        let name = format!("n{n}.c{client}.example");
                        let other = query(&name, RecordType::A);
                        let answer = ask_connected(town.client(), server, &other).unwrap();
                        assert_eq!(told(&answer), "192.0.2.99");
                    }
                }
            });
        }
    });
    let counted = |name| town.agent.metric(name, &["request_query_type=\"a\""]).unwrap();
    let forwarded = CLIENTS * EACH.div_ceil(5);
    assert_eq!(counted("istio_dns_requests_total"), (CLIENTS * EACH + forwarded) as f64);
    assert_eq!(counted("istio_dns_upstream_requests_total"), forwarded as f64);
}

#[test]
fn a_flood_from_one_pod_leaves_others_answered() {
    let town = Town::new();
    let server = addr(SERVERS[0]);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for flooder in 0..3 {
            let (town, over) = (&town, &over);
            scope.spawn(move || {
                let socket = udp_socket(town.client(), server).unwrap();
                let mut n = 0u64;
                while !over.load(Ordering::Relaxed) {
                    n += 1;
                    let name = match n % 3 {
                        0 => "cart.shop".to_owned(),
                        1 => format!("silent.n{n}.f{flooder}.example"),
                        _ => format!("x{n}.f{flooder}.example"),
                    };
                    let question = query(&name, RecordType::A).to_vec().unwrap();
                    // What finds no room is part of a flood.
                    let _ = socket.send_to(&question, server);
                }
            });
        }
        // Connections that ask nothing.
        let idle: Vec<_> = (0..200)
            .filter_map(|_| town.client().run(|| TcpStream::connect_timeout(&server, LIMIT)).ok())
            .collect();
        for n in 0..30 {
            let place = town.place("neighbour");
            let known = ask_udp(place, server, &query("cart.shop", RecordType::A));
            assert_eq!(told(&known.unwrap()), "AA 10.96.0.1");
            let other = ask_tcp(place, server, &query(&format!("calm{n}.example"), RecordType::A));
            assert_eq!(told(&other.unwrap()), "192.0.2.99");
        }
        over.store(true, Ordering::Relaxed);
        drop(idle);
    });
    // And it passes: the pod itself is served again.
    wait::until("the flood to pass", 3 * LIMIT, || {
        let place = town.client();
        ask_tcp(place, server, &query("after.example", RecordType::A))
            .is_ok_and(|answer| told(&answer) == "192.0.2.99")
    })
    .unwrap();
}

#[test]
fn tcp_carries_several_questions_and_no_nonsense() {
    let town = Town::new();
    let server = addr(SERVERS[0]);
    let connect = || {
        let stream = town.client().run(|| TcpStream::connect_timeout(&server, LIMIT)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    };
    let mut stream = connect();
    // The slow one does not keep the others waiting.
    let mut all = Vec::new();
    let names = ["silent.example", "cart.shop", "head.shop", "x.example"];
    for (id, name) in names.iter().enumerate() {
        let mut question = query(name, RecordType::A);
        question.metadata.id = id as u16;
        all.extend(framed(&question.to_vec().unwrap()));
    }
    stream.write_all(&all).unwrap();
    let mut order = Vec::new();
    for _ in names {
        let answer = Message::from_vec(&read_framed(&mut stream).unwrap()).unwrap();
        order.push(names[usize::from(answer.metadata.id)]);
    }
    assert_eq!(order.last(), Some(&"silent.example"), "{order:?}");
    // An unknown beginning, an empty message, one that is cut off: an end, and nothing else.
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0], &[0, 40, 1, 2, 3]] {
        let mut stream = connect();
        stream.write_all(bytes).unwrap();
        let ended = read_framed(&mut stream).unwrap_err();
        let fine = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
        assert!(fine.contains(&ended.kind()), "{ended}");
    }
    assert_eq!(told(&town.ask("cart.shop")), "AA 10.96.0.1");
}

#[test]
fn questions_are_counted_and_told() {
    let town = Town::new();
    for name in ["cart.shop", "nx.example", "other.example"] {
        town.ask(name);
    }
    ask_tcp(town.client(), addr(SERVERS[0]), &query("cart", RecordType::AAAA)).unwrap();
    let count = |name: &str, labels: &[&str]| {
        let labels: Vec<&str> = [labels, &["source_canonical_service=\"client\""]].concat();
        town.agent.metric(name, &labels).unwrap()
    };
    let (udp, tcp) = ("request_protocol=\"udp\"", "request_protocol=\"tcp\"");
    assert_eq!(count("istio_dns_requests_total", &["request_query_type=\"a\"", udp]), 3.0);
    assert_eq!(count("istio_dns_requests_total", &["request_query_type=\"aaaa\"", tcp]), 1.0);
    assert_eq!(count("istio_dns_upstream_requests_total", &[udp]), 2.0);
    assert_eq!(count("istio_dns_upstream_failures_total", &[udp]), 1.0, "no records");
    assert_eq!(count("istio_dns_upstream_request_duration_seconds_count", &[]), 2.0);
    wait::until("the log", LIMIT, || {
        let log = town.agent.log();
        let line = log.lines().find(|line| line.contains("domain=cart.shop."));
        line.is_some_and(|line| {
            ["src.workload=\"client\"", "src.namespace=\"shop\"", "query=A", "result=\"success\""]
                .iter()
                .all(|field| line.contains(field))
        })
    })
    .unwrap();
}

#[test]
fn hostnames_of_workloads_are_looked_up_by_the_agent() {
    let town = Town::new();
    let to = SocketAddr::from(([10, 96, 0, 3], 5432));
    // What it stands for does not exist; that it was asked is what matters.
    let connected = town.client().run(|| TcpStream::connect_timeout(&to, LIMIT));
    wait::until("the question", LIMIT, || !town.server.asked("db.elsewhere.example").is_empty())
        .unwrap();
    drop(connected);
    let pods = town.mesh.pod("client").addresses();
    let asked = town.server.asked("db.elsewhere.example");
    assert!(asked.iter().all(|asked| !pods.contains(&asked.from)), "{asked:?}");
    let labels = ["hostname=\"db.elsewhere.example\"", "source_workload=\"client\""];
    assert_eq!(town.agent.metric("istio_on_demand_dns_total", &labels).unwrap(), 1.0);
}
