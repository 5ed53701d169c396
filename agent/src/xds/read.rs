//! Reads resources by themselves, apart from what is held: so that the thread that receives them can
//! do it as well as the one that takes them over.

use std::sync::Arc;

use bytes::Bytes;
use culvert_core::snapshot::Change;
use prost::Message;

use super::decode::{Address, Decoder, Rejection};
use super::frames::Part;
use super::session::{Kind, Version};
use super::wire::{self, Response, text};

/// A resource that could be read at least so far that it has a name.
#[derive(Debug)]
pub(super) struct Read {
    pub name: Arc<str>,
    pub version: Version,
    /// The names by which it was asked for, when those are others.
    pub aliases: Vec<String>,
    /// Of what type it says to be; `None` of any other than the subscribed ones.
    pub kind: Option<Kind>,
    /// Its content as it came, when that is to be kept on disk.
    pub raw: Option<Bytes>,
    pub change: Result<Change, Rejection>,
}

/// A resource on its way to whoever takes it over, who reads it if nobody has.
#[derive(Debug)]
pub(super) enum Resource {
    /// As it came.
    Unread(Bytes),
    Read(Result<Read, Rejection>),
}

/// What a large response brings.
#[derive(Debug)]
pub(super) enum Piece {
    Resource(Resource),
    /// All but the resources.
    End(Response),
}

impl Piece {
    /// A part of a large response, unread; `None` of its beginning.
    pub fn of(part: Part) -> Option<Self> {
        match part {
            Part::Begin(_) => None,
            Part::Resource(resource) => Some(Self::Resource(Resource::Unread(resource))),
            Part::End(rest) => Some(Self::End(rest)),
        }
    }
}

/// Reads one after the other, and keeps texts that many of them repeat only once.
#[derive(Debug, Default)]
pub(super) struct Reader {
    decoder: Decoder,
    keeping: bool,
}

impl Reader {
    /// One that gives the content of each resource too.
    pub fn keeping() -> Self {
        Self { keeping: true, ..Self::default() }
    }

    /// One that gives the same and keeps texts of its own, for another thread.
    pub fn alike(&self) -> Self {
        Self { keeping: self.keeping, ..Self::default() }
    }

    /// The same piece with its resource read.
    pub fn piece(&mut self, piece: Piece) -> Piece {
        match piece {
            Piece::Resource(resource) => Piece::Resource(Resource::Read(self.resource(resource))),
            Piece::End(rest) => Piece::End(rest),
        }
    }

    /// Reads a resource, unless that was done before.
    pub fn resource(&mut self, resource: Resource) -> Result<Read, Rejection> {
        match resource {
            Resource::Unread(bytes) => self.encoded(bytes),
            Resource::Read(read) => read,
        }
    }

    /// Reads an encoded `Resource`.
    fn encoded(&mut self, bytes: Bytes) -> Result<Read, Rejection> {
        let wire::Resource { version, payload, name, aliases } = wire::Resource::decode(bytes)?;
        let (name, version) = (text("name", &name)?, Version::new(text("version", &version)?));
        let Some(payload) = payload else {
            let change = Err(Rejection::Missing("resource"));
            return Ok(Read { name: name.into(), version, aliases, kind: None, raw: None, change });
        };
        let Some(kind) = Kind::of_bytes(&payload.type_url) else {
            let url = String::from_utf8_lossy(&payload.type_url);
            let change = Err(Rejection::of_other_type(&url));
            return Ok(Read { name: name.into(), version, aliases, kind: None, raw: None, change });
        };
        Ok(Read { aliases, ..self.content(kind, name, version, payload.value) })
    }

    /// Reads the content of a resource.
    pub fn content(&mut self, kind: Kind, name: &str, version: Version, value: Bytes) -> Read {
        // Copied: a slice would hold on to all that it came with.
        let raw = self.keeping.then(|| Bytes::copy_from_slice(&value));
        let (name, change) = match self.change(kind, name, value) {
            Ok((name, change)) => (name, Ok(change)),
            Err(error) => (name.into(), Err(error)),
        };
        Read { name, version, aliases: Vec::new(), kind: Some(kind), raw, change }
    }

    fn change(
        &mut self,
        kind: Kind,
        name: &str,
        value: Bytes,
    ) -> Result<(Arc<str>, Change), Rejection> {
        match kind {
            Kind::Address => match self.decoder.address(value)? {
                Address::Workload(workload) => {
                    is_called(name, &workload.uid, "uid")?;
                    Ok((workload.uid.clone(), Change::Workload(workload)))
                }
                Address::Service(service) => {
                    is_called(name, &service.key().to_string(), "namespace/hostname")?;
                    Ok((name.into(), Change::Service(service)))
                }
            },
            Kind::Authorization => {
                let policy = self.decoder.authorization(value)?;
                is_called(name, &policy.key(), "namespace/name")?;
                Ok((name.into(), Change::Authorization(policy)))
            }
        }
    }
}

/// A resource is removed by its name: one that is called differently could never be.
fn is_called(name: &str, key: &str, field: &'static str) -> Result<(), Rejection> {
    match *key == *name {
        true => Ok(()),
        false => Err(Rejection::Invalid {
            field,
            value: key.to_owned(),
            why: "is not the resource's name",
        }),
    }
}
