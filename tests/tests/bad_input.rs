//! Peers that misbehave on the tunnel port: each gets its answer, and nobody else notices.

#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec};
use culvert_lab::wait;
use culvert_tests::figures::{self, Figures};
use culvert_tests::peer::{Forge, Leaf, Peer, within};
use culvert_tests::{binary, call, connect, echo, serve};
use http::{Method, Request};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PORT: u16 = 8080;
const GOOD: &str = "spiffe://cluster.local/ns/web/sa/client";

/// A server with its agent, a good client on the other node, and a place for bad ones.
fn mesh() -> Running {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod_with(PodSpec::unknown("outsider"))
        .node("b")
        .pod("server", "shop", "server")
        .pod_with(PodSpec::outside("beside", "shop", "beside"))
        .pod_with(PodSpec::outside("bound", "shop", "bound").behind(&gate().key()))
        .service(ServiceSpec::new("api", "shop").port(80, PORT).endpoint("server"))
        .service(ServiceSpec::new("front", "shop").port(80, 80).behind(&gate().key()))
        .service(gate())
        .policy(PolicySpec::deny("closed", "shop", vec![vec![vec![Match::any().port(8081)]]]))
        .start()
        .unwrap();
    serve(&mesh, "server", PORT, echo).unwrap();
    serve(&mesh, "server", 80, echo).unwrap();
    serve(&mesh, "server", 8081, echo).unwrap();
    mesh
}

/// A service that is a waypoint, with the server behind it.
fn gate() -> ServiceSpec {
    ServiceSpec::new("gate", "shop").port(15008, 15008).endpoint("server")
}

fn server(mesh: &Running) -> [IpAddr; 2] {
    mesh.pod("server").addresses()
}

fn good(mesh: &Running) -> Peer {
    Peer::with(mesh, "outsider", &Forge::of_mesh(mesh).unwrap(), &Leaf::uris(&[GOOD])).unwrap()
}

fn wait_logged(agent: &Agent, text: &str) {
    wait::until_some(format!("{text:?} in the log"), wait::SOON, || {
        let log = agent.log();
        if log.contains(text) { Ok(()) } else { Err(log) }
    })
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_answered_as_the_contract_says() {
    let mesh = mesh();
    let b = mesh.agent("b", &binary()).unwrap();
    let [v4, v6] = server(&mesh);
    let other = mesh.pod("beside").v4();
    let bound = mesh.pod("bound").v4();
    let front = mesh.service("front")[0];
    let tunnel = good(&mesh).h2(v4).await.unwrap();
    tunnel.connect(&format!("{v4}:{PORT}")).await.unwrap().echo("warm").await.unwrap();
    let start = Figures::of(&b).unwrap();

    let accepted = [
        format!("{v4}:{PORT}"),
        "api.shop.svc.cluster.local:80".to_owned(),
        // The server is among what the waypoint of these is: they mean it.
        format!("{bound}:{PORT}"),
        format!("{front}:80"),
    ];
    for authority in &accepted {
        let answer = tunnel.connect(authority).await.unwrap();
        assert_eq!(answer.status, 200, "{authority}");
        answer.echo("hello").await.unwrap();
    }
    let refused = [
        (format!("{v4}"), 400, "is neither IP:port nor host:port"),
        (format!("{v4}:"), 400, "is neither IP:port nor host:port"),
        (format!("{v4}:65536"), 400, "is neither IP:port nor host:port"),
        (format!("{other}:{PORT}"), 400, "ip mismatch"),
        ("10.1.0.9:8080".to_owned(), 400, "ip mismatch"),
        // Addressed by its other address, on a connection to this one.
        (format!("[{v6}]:{PORT}"), 400, "ip mismatch"),
        ("api.shop.svc.cluster.local:81".to_owned(), 503, "cannot resolve port"),
        ("nosuch.example:80".to_owned(), 503, "no service or workload for hostname"),
        (format!("{v4}:15008"), 503, "recursive call"),
        (format!("{v4}:15006"), 503, "recursive call"),
        (format!("{v4}:15001"), 503, "recursive call"),
        (format!("{v4}:9"), 503, "connection failed: "),
        (format!("{v4}:8081"), 401, "shop/closed"),
    ];
    for (authority, status, reason) in &refused {
        let answer = tunnel.connect(authority).await.unwrap();
        assert_eq!(answer.status.as_u16(), *status, "{authority}");
        assert!(answer.recv.is_end_stream(), "{authority}: a refusal with a body");
        if *status == 401 {
            let by = answer.headers.get("x-culvert-denied-by").unwrap();
            assert!(by.to_str().unwrap().contains("shop/closed"), "{by:?}");
        }
        wait_logged(&b, reason);
    }
    let mut get = Request::new(());
    *get.uri_mut() = format!("https://{v4}:{PORT}/").parse().unwrap();
    assert_eq!(tunnel.request(get).await.unwrap().status, 400);
    let mut post = Request::new(());
    *post.method_mut() = Method::POST;
    *post.uri_mut() = format!("https://{v4}:{PORT}/").parse().unwrap();
    assert_eq!(tunnel.request(post).await.unwrap().status, 400);
    wait_logged(&b, "method GET is not CONNECT");
    tunnel.connect(&accepted[0]).await.unwrap().echo("still here").await.unwrap();
    start.wait_back(&b).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_headers_do_no_harm() {
    let mesh = mesh();
    let b = mesh.agent("b", &binary()).unwrap();
    let to = server(&mesh)[1];
    let authority = format!("[{to}]:{PORT}");
    let tunnel = good(&mesh).h2(to).await.unwrap();
    let long = vec![b'x'; 30 << 10];
    let cases: [&[(&'static str, &[u8])]; 12] = [
        &[("traceparent", &[b'0'; 55])],
        &[("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x")],
        &[("traceparent", b"-------------------------------------------------------")],
        &[("traceparent", &[0xff; 55])],
        &[("baggage", b"=,=,,,k8s.cluster.name,k8s.cluster.name=,k8s.pod.name=a=b=c")],
        &[("baggage", &[0xc3, 0x28]), ("baggage", b"k8s.cluster.name=c")],
        &[("baggage", &long)],
        &[("forwarded", b"for=;host=;host"), ("forwarded", b"host=\"")],
        &[("forwarded", &[b';'; 4096])],
        &[("forwarded", "host=pr\u{f6}to".as_bytes())],
        &[("x-forwarded-network", &[0xfe; 8])],
        &[("x-forwarded-network", b"")],
    ];
    for headers in cases {
        let answer = tunnel.connect_with(&authority, headers).await.unwrap();
        answer.echo("hello").await.unwrap();
    }
    // More than the agent takes: the request fails, its connection does not.
    let huge = vec![b'x'; 80 << 10];
    let answer = tunnel.connect_with(&authority, &[("baggage", &huge)]).await;
    assert!(answer.as_ref().map_or(true, |answer| answer.status == 431), "{answer:?}");
    tunnel.connect(&authority).await.unwrap().echo("after").await.unwrap();
    assert!(!b.log().contains("panicked"), "{}", b.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_certificates_are_refused_with_their_reason() {
    let mesh = mesh();
    let b = mesh.agent("b", &binary()).unwrap();
    let to = server(&mesh)[0];
    let (forge, foreign) = (Forge::of_mesh(&mesh).unwrap(), Forge::foreign().unwrap());
    let (now, minute) = (OffsetDateTime::now_utc(), time::Duration::MINUTE);
    let leaf = Leaf::uris(&[GOOD]);
    let in_dns = vec!["client.web".to_owned()];
    let with = |forge: &Forge, leaf: &Leaf| Peer::with(&mesh, "outsider", forge, leaf).unwrap();
    let authority = format!("{to}:{PORT}");
    good(&mesh).h2(to).await.unwrap().connect(&authority).await.unwrap();
    let start = Figures::of(&b).unwrap();
    let bad = [
        (with(&foreign, &leaf), "does not end at a root that we trust"),
        (with(&forge, &Leaf { not_after: now - minute, ..leaf.clone() }), "it expired"),
        (with(&forge, &Leaf { not_before: now + minute, ..leaf.clone() }), "not valid yet"),
        (with(&forge, &Leaf::uris(&[])), "names no workload identity"),
        (with(&forge, &Leaf { dns: in_dns, ..Leaf::uris(&[]) }), "names no workload identity"),
        (with(&forge, &Leaf::uris(&["https://cluster.local/"])), "names no workload identity"),
        (
            with(&forge, &Leaf::uris(&["spiffe://elsewhere/ns/web/sa/client"])),
            "of another trust domain than our cluster.local",
        ),
        (Peer::without(&mesh, "outsider").unwrap(), "none was presented"),
    ];
    for (peer, reason) in bad {
        let mut first = [0];
        let outcome = match peer.tls(to).await {
            Ok(mut stream) => within(stream.read(&mut first)).await.unwrap(),
            Err(error) => Err(error),
        };
        assert!(!matches!(outcome, Ok(1..)), "served in spite of {reason:?}");
        wait_logged(&b, reason);
    }
    // One of several names is of our domain; the first one is who it is.
    let two = ["spiffe://elsewhere/ns/x/sa/y", GOOD];
    let tunnel = with(&forge, &Leaf::uris(&two)).h2(to).await.unwrap();
    tunnel.connect(&authority).await.unwrap().echo("hello").await.unwrap();
    wait_logged(&b, "src.identity=\"spiffe://elsewhere/ns/x/sa/y\"");
    drop(tunnel);
    let tunnel = good(&mesh).h2(to).await.unwrap();
    tunnel.connect(&authority).await.unwrap().echo("hello").await.unwrap();
    drop(tunnel);
    start.wait_back(&b).unwrap();
}

#[test]
fn pre_shared_keys_and_old_versions_prove_nothing() {
    let mesh = mesh();
    let b = mesh.agent("b", &binary()).unwrap();
    let to = server(&mesh)[0];
    let place = mesh.pod("outsider").place();
    let client = |options: &str| {
        let line = format!(
            "printf 'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n' | \
             openssl s_client -connect {to}:15008 -alpn h2 {options} 2>&1; true"
        );
        place.output("sh", &["-c", &line]).unwrap()
    };
    let offered = client("-tls1_3 -psk 00112233445566778899aabbccddeeff -psk_identity anyone");
    assert!(!offered.contains("Reused, TLSv1.3"), "{offered}");
    wait_logged(&b, "none was presented");
    client("-tls1_2");
    wait_logged(&b, "unacceptable");
    let a = mesh.agent("a", &binary()).unwrap();
    assert_eq!(call(&mesh, "client", (to, PORT), "hello").unwrap(), "hello");
    drop(a);
}

/// A frame (RFC 9113 section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

fn preface() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat()
}

/// The header block of a CONNECT: literals without indexing (RFC 7541 section 6.2.2).
fn connect_block(authority: &str) -> Vec<u8> {
    let mut block = vec![0x02, 7];
    block.extend(b"CONNECT");
    block.extend([0x01, u8::try_from(authority.len()).unwrap()]);
    block.extend(authority.as_bytes());
    block
}

/// Sends `bytes` in a verified connection, and waits until the other side has ended it.
async fn send_until_closed(peer: &Peer, to: IpAddr, bytes: &[u8]) {
    let (mut reader, mut writer) = tokio::io::split(peer.tls(to).await.unwrap());
    let ended = async {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(1..) = reader.read(&mut buffer).await {}
    };
    let send = async {
        // The other side may have had enough before the end.
        let _ = writer.write_all(bytes).await;
        let _ = writer.flush().await;
        std::future::pending::<()>().await;
    };
    within(async {
        tokio::select! {
            () = ended => {}
            () = send => {}
        }
    })
    .await
    .unwrap_or_else(|error| panic!("not closed: {error}; sent {:?}", bytes.get(..64)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_frames_end_their_own_connection_only() {
    let mesh = mesh();
    let _a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let to = server(&mesh)[0];
    let mut live = connect(&mesh, "client", (to, PORT)).unwrap();
    assert_eq!(call(&mesh, "client", (to, PORT), "hello").unwrap(), "hello");
    let peer = good(&mesh);
    let start = Figures::of(&b).unwrap();
    let block = connect_block(&format!("{to}:{PORT}"));
    let part = frame(CONTINUATION, 0, 1, &block);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("another protocol", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        (
            "random bytes",
            (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect(),
        ),
        ("too large a frame", [preface(), vec![0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1]].concat()),
        ("data without a stream", [preface(), frame(DATA, 0, 0, b"x")].concat()),
        ("a window that overflows", {
            let most = 0x7fff_ffffu32.to_be_bytes();
            [preface(), frame(WINDOW_UPDATE, 0, 0, &most), frame(WINDOW_UPDATE, 0, 0, &most)]
                .concat()
        }),
        (
            "headers that cannot be read",
            [preface(), frame(HEADERS, END_HEADERS, 1, &[0xff; 40])].concat(),
        ),
        ("a client's even stream", [preface(), frame(HEADERS, END_HEADERS, 2, &block)].concat()),
        ("settings of no length", [preface(), frame(SETTINGS, 0, 0, &[0; 5])].concat()),
        ("a ping of no length", [preface(), frame(PING, 0, 0, &[0; 3])].concat()),
        ("headers that never end", {
            let mut bytes = [preface(), frame(HEADERS, 0, 1, &block)].concat();
            (0..20_000).for_each(|_| bytes.extend(&part));
            bytes
        }),
        ("a ping within headers", {
            [preface(), frame(HEADERS, 0, 1, &block), frame(PING, 0, 0, &[0; 8])].concat()
        }),
        ("goodbye", [preface(), frame(GOAWAY, 0, 0, &[0; 8])].concat()),
    ];
    for (name, bytes) in cases {
        println_case(name);
        send_until_closed(&peer, to, &bytes).await;
        std::io::Write::write_all(&mut live, b"on").unwrap();
        std::io::Read::read_exact(&mut live, &mut [0; 2]).unwrap();
    }
    for reason in ["http2 handshake failed", "h2 failed"] {
        wait_logged(&b, reason);
    }
    start.wait_back(&b).unwrap();
}

/// Shown by the harness when the test fails.
fn println_case(name: &str) {
    eprintln!("case: {name}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_are_bounded_and_hold_up_nobody() {
    let mesh = mesh();
    let _a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let to = server(&mesh)[0];
    assert_eq!(call(&mesh, "client", (to, PORT), "hello").unwrap(), "hello");
    let peer = good(&mesh);
    let start = Figures::of(&b).unwrap();
    let resident = figures::resident(&b).unwrap();
    let block = connect_block(&format!("{to}:{PORT}"));
    let resets: Vec<u8> = (0..20_000u32)
        .flat_map(|n| {
            let stream = 2 * n + 1;
            let cancel = 8u32.to_be_bytes();
            [frame(HEADERS, END_HEADERS, stream, &block), frame(RST_STREAM, 0, stream, &cancel)]
        })
        .flatten()
        .collect();
    let pings = frame(PING, 0, 0, &[7; 8]).repeat(100_000);
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(50_000);
    let opened: Vec<u8> =
        (0..5_000u32).flat_map(|n| frame(HEADERS, END_HEADERS, 2 * n + 1, &block)).collect();
    let empty =
        [frame(HEADERS, END_HEADERS, 1, &block), frame(DATA, 0, 1, &[]).repeat(100_000)].concat();
    let floods = [
        ("resets", resets),
        ("pings", pings),
        ("settings", settings),
        ("streams", opened),
        ("empty data", empty),
    ];
    for (name, flood) in floods {
        println_case(name);
        let stream = peer.tls(to).await.unwrap();
        // Nothing of what is answered is read.
        let (reader, mut writer) = tokio::io::split(stream);
        let flooding = tokio::spawn(async move {
            let sent = async {
                writer.write_all(&preface()).await?;
                writer.write_all(&flood).await?;
                writer.flush().await
            };
            let _ = within(sent).await;
            writer
        });
        for _ in 0..20 {
            let begun = Instant::now();
            let answer = tokio::task::block_in_place(|| call(&mesh, "client", (to, PORT), "hello"));
            assert_eq!(answer.unwrap(), "hello");
            assert!(begun.elapsed() < Duration::from_secs(5), "{name}: {:?}", begun.elapsed());
        }
        flooding.abort();
        let _ = flooding.await;
        drop(reader);
        let grown = figures::resident(&b).unwrap().saturating_sub(resident);
        assert!(grown < 64 << 20, "{name}: {} MiB more resident", grown >> 20);
    }
    start.wait_back(&b).unwrap();
}
