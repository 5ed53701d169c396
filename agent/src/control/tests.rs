#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use bytes::Bytes;
use culvert_proto::istio::v1::auth::IstioCertificateRequest;
use culvert_proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use http::HeaderMap;
use http_body_util::Empty;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::SanType;
use rustls::ServerConfig;
use rustls::sign::SingleCertAndKey;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::config::{Roots, Token};
use crate::tls::testing::{Authority, Wanted};

/// Answers every request with status 7 and hands its headers to the test.
struct Server {
    addr: SocketAddr,
    requests: mpsc::Receiver<HeaderMap>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    async fn start(authority: &Authority, name: &str) -> Self {
        Self::with_protocols(authority, name, &[b"h2"]).await
    }

    async fn with_protocols(authority: &Authority, name: &str, alpn: &[&[u8]]) -> Self {
        let leaf = authority.leaf(Wanted {
            names: vec![SanType::DnsName(name.try_into().unwrap())],
            ..Wanted::uris(&[])
        });
        let mut config = ServerConfig::builder_with_provider(Arc::new(crate::tls::provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(leaf.certified())));
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (seen, requests) = mpsc::channel(16);
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let task = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (acceptor, seen) = (acceptor.clone(), seen.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(tcp).await else { return };
                    let answer = service_fn(move |request: Request<hyper::body::Incoming>| {
                        let (seen, headers) = (seen.clone(), request.headers().clone());
                        async move {
                            seen.send(headers).await.unwrap();
                            let answer = Response::builder()
                                .header("content-type", "application/grpc")
                                .header("grpc-status", "7")
                                .header("grpc-message", "no");
                            Ok::<_, Infallible>(answer.body(Empty::<Bytes>::new()).unwrap())
                        }
                    });
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(stream), answer).await;
                });
            }
        });
        Self { addr, requests, task }
    }

    fn address(&self) -> String {
        format!("https://localhost:{}", self.addr.port())
    }
}

fn settings(addresses: Vec<String>, roots: Roots) -> ControlPlane {
    ControlPlane {
        addresses,
        roots,
        alt_hostname: None,
        token: None,
        headers: Vec::new(),
        cluster_id: "c1".into(),
    }
}

fn written(directory: &TempDir, name: &str, content: &str) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

async fn ask(channel: &ControlChannel) -> Status {
    let mut client = IstioCertificateServiceClient::new(channel.clone());
    client.create_certificate(IstioCertificateRequest::default()).await.unwrap_err()
}

#[tokio::test]
async fn a_request_carries_token_cluster_and_further_headers() {
    let authority = Authority::root("root");
    let mut server = Server::start(&authority, "localhost").await;
    let directory = TempDir::new().unwrap();
    let token = written(&directory, "token", "one\n");
    let control = Control::new(&ControlPlane {
        token: Some(Token::File(token.clone())),
        headers: vec![("X-Extra".to_owned(), "more".to_owned())],
        ..settings(vec![server.address()], Roots::Pem(authority.pem.clone()))
    });
    let channel = control.connect().await.unwrap();
    assert_eq!(ask(&channel).await.code(), tonic::Code::PermissionDenied);
    let headers = server.requests.recv().await.unwrap();
    assert_eq!(headers["authorization"], "Bearer one");
    assert_eq!(headers["clusterid"], "c1");
    assert_eq!(headers["x-extra"], "more");

    fs::write(&token, "two").unwrap();
    ask(&channel).await;
    assert_eq!(server.requests.recv().await.unwrap()["authorization"], "Bearer two");
    server.task.abort();
}

#[tokio::test]
async fn an_unusable_token_is_an_error_that_names_the_file_and_not_the_token() {
    let authority = Authority::root("root");
    let server = Server::start(&authority, "localhost").await;
    let directory = TempDir::new().unwrap();
    for (content, why) in
        [("", "it is empty"), ("\n", "it is empty"), ("se cret", "white space"), ("a\nb", "white")]
    {
        let path = written(&directory, "token", content);
        let control = Control::new(&ControlPlane {
            token: Some(Token::File(path.clone())),
            ..settings(vec![server.address()], Roots::Pem(authority.pem.clone()))
        });
        let status = ask(&control.connect().await.unwrap()).await;
        assert_eq!(status.code(), tonic::Code::Unauthenticated);
        assert!(status.message().contains(&path.display().to_string()), "{status}");
        assert!(status.message().contains(why), "{status}");
        assert!(!status.message().contains("cret"), "{status}");
    }
    let missing = directory.path().join("missing");
    let control = Control::new(&ControlPlane {
        token: Some(Token::File(missing)),
        ..settings(vec![server.address()], Roots::Pem(authority.pem.clone()))
    });
    let status = ask(&control.connect().await.unwrap()).await;
    assert!(status.message().contains("missing: No such file"), "{status}");
}

#[tokio::test]
async fn the_roots_are_read_for_each_connection() {
    let (old, new) = (Authority::root("old"), Authority::root("new"));
    let server = Server::start(&new, "localhost").await;
    let directory = TempDir::new().unwrap();
    let roots = written(&directory, "root.pem", &old.pem);
    let control = Control::new(&settings(vec![server.address()], Roots::File(roots.clone())));
    let error = control.connect().await.unwrap_err().to_string();
    assert!(error.contains("tls") && error.contains("UnknownIssuer"), "{error}");

    fs::write(&roots, &new.pem).unwrap();
    control.connect().await.unwrap();

    for (content, why) in [("nothing", "no certificate"), ("", "no certificate")] {
        fs::write(&roots, content).unwrap();
        let error = control.connect().await.unwrap_err().to_string();
        assert!(error.contains("root.pem") && error.contains(why), "{error}");
    }
    fs::remove_file(&roots).unwrap();
    let error = control.connect().await.unwrap_err().to_string();
    assert!(error.contains("root.pem: No such file"), "{error}");
}

#[tokio::test]
async fn the_alternative_name_is_accepted_and_no_other() {
    let authority = Authority::root("root");
    let server = Server::start(&authority, "istiod.istio-system.svc").await;
    let plane = settings(vec![server.address()], Roots::Pem(authority.pem.clone()));
    let error = Control::new(&plane).connect().await.unwrap_err().to_string();
    assert!(error.contains("localhost"), "{error}");
    for (name, accepted) in [("istiod.istio-system.svc", true), ("other.svc", false)] {
        let plane = ControlPlane { alt_hostname: Some(name.to_owned()), ..plane.clone() };
        assert_eq!(Control::new(&plane).connect().await.is_ok(), accepted, "{name}");
    }
}

#[tokio::test]
async fn a_server_without_http2_is_refused() {
    let authority = Authority::root("root");
    let server = Server::with_protocols(&authority, "localhost", &[]).await;
    let control =
        Control::new(&settings(vec![server.address()], Roots::Pem(authority.pem.clone())));
    let error = control.connect().await.unwrap_err().to_string();
    assert!(error.contains("does not speak http/2"), "{error}");
}

#[tokio::test]
async fn addresses_are_tried_in_their_order() {
    let authority = Authority::root("root");
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (one, two) = (
        Server::start(&authority, "localhost").await,
        Server::start(&authority, "localhost").await,
    );
    let addresses =
        vec![format!("https://127.0.0.1:{}", closed.port()), one.address(), two.address()];
    let control = Control::new(&settings(addresses, Roots::Pem(authority.pem.clone())));
    let channel = control.connect().await.unwrap();
    assert_eq!(**channel.address(), one.address());
    let channel = control.connect_after(channel.address()).await.unwrap();
    assert_eq!(**channel.address(), two.address());
    let channel = control.connect_after(channel.address()).await.unwrap();
    assert_eq!(**channel.address(), one.address());
}

#[tokio::test]
async fn what_cannot_be_reached_is_named() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let pem = Authority::root("root").pem;
    for (address, why) in [
        (format!("https://{closed}"), format!("control plane {closed}: connect: {closed}: ")),
        ("https://nowhere.invalid:1".to_owned(), "nowhere.invalid:1: dns".to_owned()),
        ("http://localhost:1".to_owned(), "only https is spoken".to_owned()),
        ("https://".to_owned(), "control plane address \"https://\"".to_owned()),
    ] {
        let control = Control::new(&settings(vec![address], Roots::Pem(pem.clone())));
        let error = control.connect().await.unwrap_err().to_string();
        assert!(error.contains(&why), "{error}");
    }
    let control = Control::new(&settings(Vec::new(), Roots::Pem(pem)));
    assert!(matches!(control.connect().await, Err(ControlError::NoAddress)));
}

#[test]
fn settings_do_not_show_a_literal_token() {
    let token = Some(Token::Literal("secret".to_owned()));
    let plane = ControlPlane { token, ..settings(Vec::new(), Roots::System) };
    assert!(!format!("{plane:?}").contains("secret"));
}
