//! Responses that are encoded before anyone asks for them, so that who measures the one that takes
//! them does not measure the one that makes them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use hyper::body::{Body as HttpBody, Frame};
use prost::Message;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower_service::Service;

use super::world::World;

/// A message as gRPC has it on HTTP/2: after a byte that says it is not compressed, and its length.
#[derive(Clone, Debug)]
pub struct Prepared(Bytes);

impl Prepared {
    pub fn new(message: &impl Message) -> Self {
        let length = message.encoded_len();
        let mut bytes = BytesMut::with_capacity(5 + length);
        bytes.put_u8(0);
        bytes.put_u32(u32::try_from(length).expect("gRPC has no larger messages"));
        message.encode(&mut bytes).expect("there is room for it");
        Self(bytes.freeze())
    }
}

/// A service whose answers also bring what the world has prepared.
#[derive(Clone)]
pub struct Preparing<S> {
    pub service: S,
    pub world: Arc<World>,
}

impl<S: NamedService> NamedService for Preparing<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Preparing<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let prepared = self.world.listen();
        let answer = self.service.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Both { body, prepared }))) })
    }
}

/// Each frame of `body` has whole messages, so that others may stand between them.
struct Both {
    body: Body,
    prepared: mpsc::UnboundedReceiver<Prepared>,
}

impl HttpBody for Both {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.prepared.poll_recv(context) {
            Poll::Ready(Some(Prepared(bytes))) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            Poll::Ready(None) | Poll::Pending => Pin::new(&mut self.body).poll_frame(context),
        }
    }
}
