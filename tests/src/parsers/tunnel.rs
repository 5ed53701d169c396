//! What tunnel peers send: HTTP/2 frames and the headers of CONNECT; and what applications are sent.

use std::future::{pending, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use culvert_agent::hbone::headers::{
    Baggage, ConnectHeaders, Forwarded, ReceivedHeaders, TraceParent,
};
use culvert_agent::hbone::{self, HboneStream, Request, Settings, client};
use culvert_core::addr::Authority;
use culvert_core::admit::ProxyHeader;
use culvert_core::identity::Identity;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// RFC 9113 section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection whose peer has closed cannot take longer than this, on a busy machine too.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// What a client sends after its preface. The first byte says into what pieces it is cut.
pub(super) fn server(bytes: &[u8]) {
    let Some((cut, frames)) = bytes.split_first() else { return };
    let peer = Peer::new([PREFACE, frames].concat(), *cut);
    run(async {
        // Whether it ends in order or in an error is up to the bytes.
        let _ = hbone::serve(peer, &Settings::default(), answer, pending()).await;
    });
}

/// What a server sends to a client with one request. The first byte as for `server`.
pub(super) fn client(bytes: &[u8]) {
    let Some((cut, frames)) = bytes.split_first() else { return };
    let peer = Peer::new(frames.to_vec(), *cut);
    let request = ConnectHeaders {
        authority: Authority::Addr(SocketAddr::from(([10, 1, 0, 7], 8080))),
        baggage: Baggage::default(),
        forwarded: Forwarded { client: SocketAddr::from(([10, 2, 0, 3], 40112)), host: None },
        traceparent: TraceParent { trace_id: 1, parent_id: 1 },
        x_forwarded_network: None,
    };
    run(async {
        let (connection, driver) = client::handshake(peer, &Settings::default());
        let request = request.request().expect("the authority is valid");
        let asking = async move {
            if let Ok(accepted) = connection.connect(request, &mut hbone::First::none()).await {
                let _ = ReceivedHeaders::parse(&accepted.headers);
                read(accepted.stream).await;
            }
        };
        tokio::join!(asking, driver);
    });
}

/// Treats a request as an inbound corridor does, up to where the mesh decides.
async fn answer(request: Request) {
    let _ = ReceivedHeaders::parse(request.headers());
    match request.authority().parse::<Authority>() {
        Ok(authority) if *request.method() == Method::CONNECT => {
            assert_eq!(authority.to_string().parse(), Ok(authority));
            if let Ok(stream) = request.accept(Some("service.name=x")) {
                read(stream).await;
            }
        }
        _ => request.refuse(StatusCode::BAD_REQUEST, HeaderMap::new()),
    }
}

async fn read(mut stream: HboneStream) {
    let _ = poll_fn(|cx| stream.poll_fill(cx)).await;
    let mut slices = [io::IoSlice::new(&[]); 8];
    let filled = stream.received(&mut slices);
    let count = slices.iter().take(filled).map(|slice| slice.len()).sum();
    stream.consume(count);
}

pub(super) fn run(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime without I/O needs nothing");
    let ended = runtime.block_on(async { tokio::time::timeout(LIMIT, work).await });
    assert!(ended.is_ok(), "a closed connection did not end");
}

/// The far end of a connection: it has sent all it will, and takes whatever it gets.
pub(super) struct Peer {
    sent: Vec<u8>,
    read: usize,
    piece: usize,
}

impl Peer {
    pub(super) fn new(sent: Vec<u8>, cut: u8) -> Self {
        let piece = match cut {
            0 => usize::MAX,
            cut => cut.into(),
        };
        Self { sent, read: 0, piece }
    }
}

impl AsyncRead for Peer {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let size = self.piece.min(buf.remaining()).min(self.sent.len() - self.read);
        let end = self.read + size;
        buf.put_slice(&self.sent[self.read..end]);
        self.read = end;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Peer {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Lines of `name: value`.
pub(super) fn headers(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n').take(64) {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = parts.next().and_then(|name| HeaderName::from_bytes(name).ok());
        let value = parts.next().map(|value| value.strip_prefix(b" ").unwrap_or(value));
        let value = value.and_then(|value| HeaderValue::from_bytes(value).ok());
        if let (Some(name), Some(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    let received = ReceivedHeaders::parse(&headers);
    let _ = received.is_from_another_network("n1");
    if let Some(network) = &received.forwarded_network {
        assert!(!received.is_from_another_network(network));
    }
    if let Some(baggage) = &received.baggage {
        assert_eq!(reread("baggage", baggage).baggage.as_ref(), Some(baggage));
    }
    if let Some(trace) = received.traceparent {
        let text = headers["traceparent"].to_str().expect("it was read as text");
        assert_eq!(trace.to_string()[3..52], text[3..52]);
        assert_eq!(reread("traceparent", trace).traceparent, Some(trace));
    }
    if let Some(host) = received.forwarded_host
        && host.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
    {
        let client = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let forwarded = Forwarded { client, host: Some(host.as_str().into()) };
        assert_eq!(reread("forwarded", forwarded).forwarded_host, Some(host));
    }
}

fn reread(name: &'static str, value: impl ToString) -> ReceivedHeaders {
    let value = HeaderValue::try_from(value.to_string()).expect("it came from a header");
    ReceivedHeaders::parse(&HeaderMap::from_iter([(HeaderName::from_static(name), value)]))
}

/// A header for addresses and an identity made of the bytes, read back by its specification:
/// one byte of families, two addresses of 18 bytes, and the URI.
pub(super) fn proxy_header(bytes: &[u8]) {
    let Some((families, rest)) = bytes.split_first() else { return };
    let Some((source, rest)) = rest.split_first_chunk() else { return };
    let Some((destination, uri)) = rest.split_first_chunk() else { return };
    let header = ProxyHeader {
        source: addr(families & 1 != 0, source),
        destination: addr(families & 2 != 0, destination),
        identity: String::from_utf8_lossy(uri).parse::<Identity>().ok(),
    };
    let (source, destination, identity) = read_proxy(&header.to_bytes());
    let canonical = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
    assert_eq!(source, canonical(header.source));
    assert_eq!(destination, canonical(header.destination));
    if uri.len() < 60_000 {
        assert_eq!(identity, header.identity.map(|identity| identity.to_string()));
    }
}

fn addr(v6: bool, bytes: &[u8; 18]) -> SocketAddr {
    let [ip @ .., high, low] = *bytes;
    let [a, b, c, d, ..] = ip;
    let ip = if v6 { IpAddr::from(Ipv6Addr::from(ip)) } else { IpAddr::from([a, b, c, d]) };
    SocketAddr::new(ip, u16::from_be_bytes([high, low]))
}

/// PROXY protocol version 2, section 2.2: source, destination, and the value of type 0xD0.
fn read_proxy(bytes: &[u8]) -> (SocketAddr, SocketAddr, Option<String>) {
    let rest = bytes.strip_prefix(b"\r\n\r\n\0\r\nQUIT\n\x21").expect("signature and version");
    let (&[family, high, low], content) = rest.split_first_chunk().expect("family and length");
    assert_eq!(content.len(), usize::from(u16::from_be_bytes([high, low])));
    let size = match family {
        0x11 => 4,
        0x21 => 16,
        other => panic!("family {other:#x}"),
    };
    let (ips, rest) = content.split_at(2 * size);
    let (ports, mut values) = rest.split_at(4);
    let ip = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => IpAddr::from(v4),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).expect("16 bytes")).to_canonical(),
    };
    let port = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes[1]]);
    let mut identity = None;
    while let Some((&[kind, high, low], rest)) = values.split_first_chunk() {
        let (value, further) = rest.split_at(u16::from_be_bytes([high, low]).into());
        assert_eq!(kind, 0xD0);
        identity = Some(String::from_utf8(value.to_vec()).expect("a URI is text"));
        values = further;
    }
    assert!(values.is_empty());
    let (source, destination) = ips.split_at(size);
    (
        SocketAddr::new(ip(source), port(&ports[..2])),
        SocketAddr::new(ip(destination), port(&ports[2..])),
        identity,
    )
}
