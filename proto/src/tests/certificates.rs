//! Bytes of the certificates messages, written by hand from the protocol's numbers.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use super::wire::{assert_wire, block, number};
use crate::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::istio::v1::auth::istio_certificate_service_server::*;
use crate::istio::v1::auth::*;
use tonic::codegen::Service;
use tonic::codegen::http;

fn signing_request() -> IstioCertificateRequest {
    let identity = prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue("spiffe://td/ns/n/sa/s".to_owned())),
    };
    let fields = BTreeMap::from([("ImpersonatedIdentity".to_owned(), identity)]);
    IstioCertificateRequest {
        csr: "PEM".to_owned(),
        validity_duration: 86400,
        metadata: Some(prost_types::Struct { fields }),
    }
}

#[test]
fn every_field_of_a_request_has_its_number() {
    let identity = block(2, block(3, "spiffe://td/ns/n/sa/s"));
    let metadata = block(1, [block(1, "ImpersonatedIdentity"), identity].concat());
    let wire = [block(1, "PEM"), number(3, 86400), block(4, metadata)];
    assert_wire(signing_request(), wire.concat());
}

#[test]
fn chain_keeps_its_order() {
    let response =
        IstioCertificateResponse { cert_chain: vec!["leaf".to_owned(), "root".to_owned()] };
    assert_wire(response, [block(1, "leaf"), block(1, "root")].concat());
}

struct Echo;

#[tonic::async_trait]
impl IstioCertificateService for Echo {
    async fn create_certificate(
        &self,
        request: tonic::Request<IstioCertificateRequest>,
    ) -> Result<tonic::Response<IstioCertificateResponse>, tonic::Status> {
        let cert_chain = vec![request.into_inner().csr];
        Ok(tonic::Response::new(IstioCertificateResponse { cert_chain }))
    }
}

type Answer = http::Response<tonic::body::Body>;

/// Passes requests to the server in this process, and notes the path of the last one.
#[derive(Clone)]
struct Recorder {
    server: IstioCertificateServiceServer<Echo>,
    path: Arc<Mutex<String>>,
}

impl Service<http::Request<tonic::body::Body>> for Recorder {
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        *self.path.lock().unwrap() = request.uri().path().to_owned();
        self.server.call(request)
    }
}

#[tokio::test]
async fn client_and_server_meet_at_the_method_that_authorities_serve() {
    let path = Arc::<Mutex<String>>::default();
    let server = IstioCertificateServiceServer::new(Echo);
    let mut client =
        IstioCertificateServiceClient::new(Recorder { server, path: Arc::clone(&path) });
    let response = client.create_certificate(signing_request()).await.unwrap().into_inner();
    assert_eq!(response.cert_chain, ["PEM"]);
    assert_eq!(*path.lock().unwrap(), "/istio.v1.auth.IstioCertificateService/CreateCertificate");
}
