//! Header blocks: requests and answers as they come and as they leave.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};

use super::super::hpack::{self, Decoder, Field, HpackError, known};

/// Bytes that a header counts beside its name and value (RFC 9113 section 10.5.1).
const OVERHEAD: usize = 32;

/// A header block under way.
pub(super) struct Block {
    pub(super) stream: u32,
    pub(super) end_stream: bool,
    pub(super) bytes: Vec<u8>,
}

/// A request that nobody has taken yet.
pub(in crate::hbone) struct Arrived {
    pub(in crate::hbone) stream: u32,
    pub(in crate::hbone) method: Method,
    /// `:authority` as the peer wrote it; empty if there was none.
    pub(in crate::hbone) authority: String,
    pub(in crate::hbone) headers: HeaderMap,
}

/// An answer.
#[derive(Debug)]
pub(in crate::hbone) struct Head {
    pub(in crate::hbone) status: StatusCode,
    pub(in crate::hbone) headers: HeaderMap,
}

/// A message that breaks the rules, but leaves the connection whole (RFC 9113 section 8.1.1).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The headers of one block.
#[derive(Default)]
pub(super) struct Fields {
    method: Option<Bytes>,
    authority: Option<Bytes>,
    status: Option<Bytes>,
    headers: HeaderMap,
    size: usize,
    malformed: bool,
}

impl Fields {
    /// The error leaves the connection useless; that a message is malformed or larger than
    /// `limit` does not.
    pub(super) fn decode(
        decoder: &mut Decoder,
        block: &[u8],
        limit: u32,
    ) -> Result<Self, HpackError> {
        let mut fields = Self::default();
        decoder.decode(block, |field| {
            fields.size += field.name.len() + field.value.len() + OVERHEAD;
            if fields.size > limit as usize || !fields.add(field) {
                fields.malformed = true;
            }
        })?;
        Ok(fields)
    }

    /// `false` if it must not be there.
    fn add(&mut self, Field { name, value }: Field) -> bool {
        if name.first() == Some(&b':') {
            let slot = match name.as_ref() {
                b":method" => &mut self.method,
                b":authority" => &mut self.authority,
                b":status" => &mut self.status,
                b":scheme" | b":path" => return self.headers.is_empty(),
                _ => return false,
            };
            return self.headers.is_empty() && slot.replace(value).is_none();
        }
        // Those of a connection have no place in HTTP/2 (RFC 9113 section 8.2.2).
        const OF_A_CONNECTION: [&[u8]; 5] =
            [b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"];
        let is_lower = !name.iter().any(u8::is_ascii_uppercase);
        if !is_lower || OF_A_CONNECTION.contains(&name.as_ref()) {
            return false;
        }
        match (HeaderName::from_bytes(&name), HeaderValue::from_maybe_shared(value)) {
            (Ok(name), Ok(value)) => self.headers.try_append(name, value).is_ok(),
            _ => false,
        }
    }

    pub(super) fn request(self, stream: u32) -> Result<Arrived, Malformed> {
        if self.malformed || self.status.is_some() {
            return Err(Malformed);
        }
        let method = Method::from_bytes(&self.method.ok_or(Malformed)?).map_err(|_| Malformed)?;
        let authority = self.authority.unwrap_or_default();
        let authority = std::str::from_utf8(&authority).map_err(|_| Malformed)?.to_owned();
        Ok(Arrived { stream, method, authority, headers: self.headers })
    }

    pub(super) fn answer(self) -> Result<Head, Malformed> {
        if self.malformed || self.method.is_some() || self.authority.is_some() {
            return Err(Malformed);
        }
        let status = StatusCode::from_bytes(&self.status.ok_or(Malformed)?);
        Ok(Head { status: status.map_err(|_| Malformed)?, headers: self.headers })
    }

    pub(super) fn is_malformed(&self) -> bool {
        self.malformed
    }
}

/// The header block of a CONNECT.
pub(in crate::hbone) fn request(request: &Request<()>) -> Vec<u8> {
    let mut block = Vec::with_capacity(256);
    let authority = request.uri().authority().map_or("", |authority| authority.as_str());
    hpack::put_known(&mut block, known::METHOD, request.method().as_str().as_bytes());
    hpack::put_known(&mut block, known::AUTHORITY, authority.as_bytes());
    put_all(&mut block, request.headers());
    block
}

/// The header block of an answer.
pub(super) fn answer(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let mut block = Vec::with_capacity(128);
    match status {
        StatusCode::OK => hpack::put_indexed(&mut block, known::STATUS),
        _ => hpack::put_known(&mut block, known::STATUS, status.as_str().as_bytes()),
    }
    put_all(&mut block, headers);
    block
}

fn put_all(block: &mut Vec<u8>, headers: &HeaderMap) {
    for (name, value) in headers {
        hpack::put(block, name.as_str().as_bytes(), value.as_bytes());
    }
}
