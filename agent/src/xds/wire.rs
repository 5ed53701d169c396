//! The response of the delta stream, read no further than needed: resources stay slices of the
//! message until their turn comes, so that one that cannot be read spoils no other and a large
//! message is in memory once.
//!
//! Field numbers as in `envoy/service/discovery/v3/discovery.proto`; absent fields are not looked at.

use bytes::Bytes;

use super::decode::Rejection;

/// `envoy.service.discovery.v3.DeltaDiscoveryResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// Each an encoded `Resource`.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub resources: Vec<Bytes>,
    #[prost(string, tag = "4")]
    pub type_url: String,
    #[prost(string, tag = "5")]
    pub nonce: String,
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

impl Response {
    /// The bytes of its resources.
    pub fn size(&self) -> usize {
        self.resources.iter().map(Bytes::len).sum()
    }
}

/// `envoy.service.discovery.v3.Resource`.
///
/// Its texts are slices of the message too: each is soon compared or copied.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Resource {
    #[prost(bytes = "bytes", tag = "1")]
    pub version: Bytes,
    #[prost(message, optional, tag = "2")]
    pub payload: Option<Payload>,
    #[prost(bytes = "bytes", tag = "3")]
    pub name: Bytes,
    #[prost(string, repeated, tag = "4")]
    pub aliases: Vec<String>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Payload {
    #[prost(bytes = "bytes", tag = "1")]
    pub type_url: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// A field that holds a text.
pub(super) fn text<'a>(field: &'static str, bytes: &'a [u8]) -> Result<&'a str, Rejection> {
    std::str::from_utf8(bytes).map_err(|_| Rejection::Invalid {
        field,
        value: String::from_utf8_lossy(bytes).into_owned(),
        why: "is not UTF-8",
    })
}
