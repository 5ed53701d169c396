//! The control plane's half of the stream: gRPC over HTTP/2, its messages read while they arrive.

use http::header::{CONTENT_TYPE, HeaderValue, TE};
use http::uri::PathAndQuery;
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codec::{Codec, EncodeBody};
use tonic::{Code, Status};
use tonic_prost::ProstCodec;
use tower_service::Service;

use culvert_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest as Request;

use super::frames::{FrameError, Frames, Part};
use super::wire::Response;
use crate::control::{ControlChannel, MAX_MESSAGE};

/// A message with more bytes is dealt with on a thread of its own, while it arrives.
pub(super) const LARGE: usize = 256 << 10;

/// What came.
#[derive(Debug)]
pub(super) enum Event {
    /// A whole message.
    Message(Response),
    /// The beginning of a large message of this many bytes; its parts follow.
    Large(usize),
}

/// A stream that was accepted.
#[derive(Debug)]
pub(super) struct Incoming {
    body: Body,
    frames: Frames,
    /// The small message that is being read.
    message: Response,
}

impl Incoming {
    /// Calls `method` with what `requests` brings.
    pub async fn open(
        mut channel: ControlChannel,
        method: PathAndQuery,
        requests: mpsc::Receiver<Request>,
    ) -> Result<Self, Status> {
        std::future::poll_fn(|context| channel.poll_ready(context)).await?;
        let requests = ReceiverStream::new(requests).map(Ok);
        let encoder = ProstCodec::<Request, Response>::default().encoder();
        let body = EncodeBody::new_client(encoder, requests, None, Some(MAX_MESSAGE));
        let mut request = http::Request::new(Body::new(body));
        *request.method_mut() = http::Method::POST;
        *request.version_mut() = http::Version::HTTP_2;
        *request.uri_mut() = method.into();
        request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        let grpc = HeaderValue::from_static("application/grpc");
        request.headers_mut().insert(CONTENT_TYPE, grpc);
        let response = channel.call(request).await?;
        if let Some(status) = Status::from_header_map(response.headers())
            && status.code() != Code::Ok
        {
            return Err(status);
        }
        if response.status() != http::StatusCode::OK {
            let why = format!("it answered with HTTP status {}", response.status());
            return Err(Status::unavailable(why));
        }
        let (frames, message) = (Frames::default(), Response::default());
        Ok(Self { body: response.into_body(), frames, message })
    }

    /// What comes next; `None` at the end. Loses nothing when it is not awaited to its end.
    pub async fn event(&mut self) -> Result<Option<Event>, Status> {
        loop {
            match self.frames.part().map_err(unreadable)? {
                Some(Part::Begin(length)) if length > LARGE => {
                    return Ok(Some(Event::Large(length)));
                }
                Some(Part::Begin(_)) => {}
                Some(Part::Resource(resource)) => self.message.resources.push(resource),
                Some(Part::End(rest)) => {
                    let resources = std::mem::take(&mut self.message.resources);
                    return Ok(Some(Event::Message(Response { resources, ..rest })));
                }
                None if self.read().await? => {}
                None => return Ok(None),
            }
        }
    }

    /// The next parts of a large message, with its end as the last of all.
    pub async fn parts(&mut self) -> Result<Vec<Part>, Status> {
        let mut parts = Vec::new();
        loop {
            match self.frames.part().map_err(unreadable)? {
                Some(part) => {
                    let is_end = matches!(part, Part::End(_));
                    parts.push(part);
                    if is_end {
                        return Ok(parts);
                    }
                }
                None if !parts.is_empty() => return Ok(parts),
                None if self.read().await? => {}
                None => return Err(unreadable(FrameError::Truncated)),
            }
        }
    }

    /// Whether there was more.
    async fn read(&mut self) -> Result<bool, Status> {
        let frame = match self.body.frame().await {
            Some(frame) => frame?,
            None => {
                self.frames.end().map_err(unreadable)?;
                return Err(Status::unknown("the stream ended without a status"));
            }
        };
        match frame.into_data() {
            Ok(data) => {
                self.frames.push(&data);
                Ok(true)
            }
            Err(frame) => {
                let trailers = frame.into_trailers().unwrap_or_default();
                match Status::from_header_map(&trailers) {
                    Some(status) if status.code() != Code::Ok => Err(status),
                    Some(_) => self.frames.end().map_err(unreadable).map(|()| false),
                    None => Err(Status::unknown("the stream ended without a status")),
                }
            }
        }
    }
}

fn unreadable(error: FrameError) -> Status {
    Status::internal(error.to_string())
}
