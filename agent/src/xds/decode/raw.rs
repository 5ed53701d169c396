//! `istio.workload.Address` with texts that are slices of the message: there are very many workloads,
//! and nearly all of their texts are known already, so that a copy of each would be for nothing.
//!
//! Field numbers as in `workloadapi/workload.proto`. Whether a text is one is for whoever takes it.

use bytes::Bytes;
use culvert_proto::istio::workload as proto;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Address {
    #[prost(oneof = "Type", tags = "1, 2")]
    pub r#type: Option<Type>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Type {
    #[prost(message, boxed, tag = "1")]
    Workload(Box<Workload>),
    #[prost(message, boxed, tag = "2")]
    Service(Box<proto::Service>),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Workload {
    #[prost(bytes = "bytes", tag = "20")]
    pub uid: Bytes,
    #[prost(bytes = "bytes", tag = "1")]
    pub name: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub namespace: Bytes,
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub addresses: Vec<Bytes>,
    #[prost(bytes = "bytes", tag = "21")]
    pub hostname: Bytes,
    #[prost(bytes = "bytes", tag = "4")]
    pub network: Bytes,
    #[prost(int32, tag = "5")]
    pub tunnel_protocol: i32,
    #[prost(bytes = "bytes", tag = "6")]
    pub trust_domain: Bytes,
    #[prost(bytes = "bytes", tag = "7")]
    pub service_account: Bytes,
    #[prost(message, optional, tag = "8")]
    pub waypoint: Option<proto::GatewayAddress>,
    #[prost(message, optional, tag = "19")]
    pub network_gateway: Option<proto::GatewayAddress>,
    #[prost(bytes = "bytes", tag = "9")]
    pub node: Bytes,
    #[prost(bytes = "bytes", tag = "10")]
    pub canonical_name: Bytes,
    #[prost(bytes = "bytes", tag = "11")]
    pub canonical_revision: Bytes,
    #[prost(int32, tag = "12")]
    pub workload_type: i32,
    #[prost(bytes = "bytes", tag = "13")]
    pub workload_name: Bytes,
    #[prost(bool, tag = "14")]
    pub native_tunnel: bool,
    #[prost(message, optional, tag = "23")]
    pub application_tunnel: Option<proto::ApplicationTunnel>,
    /// The entries of a map, each an encoded [`Membership`].
    #[prost(bytes = "bytes", repeated, tag = "22")]
    pub services: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "16")]
    pub authorization_policies: Vec<Bytes>,
    #[prost(int32, tag = "17")]
    pub status: i32,
    #[prost(bytes = "bytes", tag = "18")]
    pub cluster_id: Bytes,
    #[prost(message, optional, tag = "24")]
    pub locality: Option<Locality>,
    #[prost(int32, tag = "25")]
    pub network_mode: i32,
    /// Only to be read: what is unreadable in them makes the resource so.
    #[prost(message, repeated, tag = "26")]
    pub extensions: Vec<proto::Extension>,
    #[prost(message, optional, tag = "27")]
    pub capacity: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Membership {
    /// `namespace/hostname`.
    #[prost(bytes = "bytes", tag = "1")]
    pub service: Bytes,
    #[prost(message, optional, tag = "2")]
    pub ports: Option<proto::PortList>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Locality {
    #[prost(bytes = "bytes", tag = "1")]
    pub region: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub zone: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub subzone: Bytes,
}
