//! From the control plane's messages to the values of the core.
//!
//! A resource is valid whole or rejected whole, with a reason that names the field. What a number
//! means that nobody has defined yet is not guessed, except where the protocol says so.

mod authorization;
mod fields;
mod raw;
mod service;
mod workload;

use std::sync::Arc;

use bytes::Bytes;
use culvert_core::authorization::Authorization;
use culvert_core::intern::Interner;
use culvert_core::service::Service;
use culvert_core::workload::Workload;
use culvert_proto::istio::security;
use prost::Message;

/// Why a resource is not taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("cannot be read: {0}")]
    Unreadable(#[from] prost::DecodeError),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{field}: {value} {why}")]
    Invalid { field: &'static str, value: String, why: &'static str },
}

impl Rejection {
    fn invalid(field: &'static str, value: impl ToString, why: &'static str) -> Self {
        Self::Invalid { field, value: value.to_string(), why }
    }

    pub(super) fn of_other_type(url: &str) -> Self {
        Self::invalid("type_url", url, "is not that of the response")
    }

    fn undefined(field: &'static str, number: i32) -> Self {
        Self::invalid(field, number, "is not defined")
    }
}

/// An `istio.workload.Address`.
#[derive(Debug)]
pub enum Address {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
}

/// Decodes, and keeps texts that many resources repeat only once.
#[derive(Debug, Default)]
pub struct Decoder {
    interner: Interner,
    before: workload::Before,
}

impl Decoder {
    /// Reads `istio.workload.Address`.
    pub fn address(&mut self, bytes: Bytes) -> Result<Address, Rejection> {
        match raw::Address::decode(bytes)?.r#type {
            Some(raw::Type::Workload(workload)) => {
                workload::decode(workload, &mut self.interner, &mut self.before)
                    .map(Address::Workload)
            }
            Some(raw::Type::Service(service)) => {
                let service = service::decode(*service, &mut self.interner)?;
                Ok(Address::Service(Arc::new(service)))
            }
            None => Err(Rejection::Missing("both workload and service")),
        }
    }

    /// Reads `istio.security.Authorization`.
    pub fn authorization(&mut self, bytes: Bytes) -> Result<Authorization, Rejection> {
        authorization::decode(security::Authorization::decode(bytes)?, &mut self.interner)
    }
}

#[cfg(test)]
mod tests;
