//! Takes over one response: first its resources in their order, then its removals.

use std::sync::Arc;

use bytes::Bytes;
use culvert_core::snapshot::Change;
use culvert_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest as Request;
use prost::Message;

use super::arriving::Arriving;
use super::decode::{Address, Decoder, Rejection};
use super::kept::Content;
use super::needs::{Found, Needs};
use super::session::{Item, Kind, Rejections, Session, Version};
use super::wire::{Resource, Response};

/// How many removals of unknown names the log tells of for each response.
const UNKNOWN_TOLD: usize = 10;

/// All that a response changes.
pub(super) struct Intake {
    pub session: Session,
    decoder: Decoder,
    /// The resources as they came, when they are to be kept on disk.
    pub content: Option<Content>,
}

/// What became of a response.
#[derive(Debug)]
pub(super) struct Outcome {
    pub answer: Request,
    pub accepted: usize,
    pub removed: usize,
    pub rejected: Rejections,
}

impl Intake {
    pub fn new(session: Session, content: Option<Content>) -> Self {
        Self { session, decoder: Decoder::default(), content }
    }

    /// Hands the changes of `response` to `publish`, which must take all of them. They are made as
    /// they are taken, so that no more than the message and the result is in memory.
    pub fn take(
        &mut self,
        response: Response,
        needs: &Needs,
        publish: impl FnOnce(&mut dyn Iterator<Item = Change>),
    ) -> Outcome {
        let Response { resources, type_url, nonce, removed_resources } = response;
        let mut tally = Tally { kind: Kind::of_url(&type_url), ..Tally::default() };
        if let Some(kind) = tally.kind {
            self.session.names_mut(kind).expect(resources.len());
            let (resources, removals) = (resources.into_iter(), removed_resources.into_iter());
            publish(&mut Changes { intake: self, needs, resources, removals, tally: &mut tally });
        } else {
            tracing::warn!(%type_url, "resources of a type that was not asked for are ignored");
        }
        self.finish(&type_url, &nonce, tally, needs)
    }

    /// Takes over a response while it arrives: section by section, and what it removes at last.
    ///
    /// Of what type its resources are is told by the first of them. `None`: it broke off. What came
    /// of it stays in force, as each resource stands by itself; the next stream names it as held and
    /// brings the rest.
    pub fn take_arriving(
        &mut self,
        mut arriving: Arriving,
        needs: &Needs,
        mut publish: impl FnMut(&mut dyn Iterator<Item = Change>),
    ) -> Option<Outcome> {
        let mut tally = Tally::default();
        while arriving.begin_section() {
            let (resources, removals) = (&mut arriving, Vec::new().into_iter());
            publish(&mut Changes { intake: self, needs, resources, removals, tally: &mut tally });
        }
        let Response { type_url, nonce, removed_resources, .. } = arriving.end()?;
        let kind = Kind::of_url(&type_url);
        match tally.kind {
            None if kind.is_none() => {
                tracing::warn!(%type_url, "resources of a type that was not asked for are ignored");
                tally = Tally::default();
            }
            Some(told) if kind != Some(told) => {
                let why = format!("type_url: {type_url} is not that of its resources");
                tally.reject("response".to_owned(), why);
            }
            None | Some(_) => {
                tally.kind = kind;
                let (resources, removals) = (std::iter::empty(), removed_resources.into_iter());
                let tally = &mut tally;
                publish(&mut Changes { intake: self, needs, resources, removals, tally });
            }
        }
        Some(self.finish(&type_url, &nonce, tally, needs))
    }

    fn finish(&mut self, type_url: &str, nonce: &str, tally: Tally, needs: &Needs) -> Outcome {
        // Only now does who waits find what it waited for.
        needs.answered(&tally.answered);
        let Tally { accepted, removed, rejected, .. } = tally;
        let answer = self.session.answer(type_url, nonce, &rejected);
        Outcome { answer, accepted, removed, rejected }
    }

    /// Takes over what was kept on disk. A resource that cannot be read any more is left out.
    pub fn restore(
        &mut self,
        kind: Kind,
        name: &str,
        version: &str,
        value: Bytes,
    ) -> Option<Change> {
        let raw = value.clone();
        match self.read(kind, name, value) {
            Ok((name, change, item)) => {
                let version = Version::new(version);
                if let Some(content) = &mut self.content {
                    content.put(item, name.clone(), version.clone(), &raw);
                }
                self.session.names_mut(kind).accept(name, version, item);
                Some(change)
            }
            Err(error) => {
                tracing::warn!(name, %error, "a kept resource is left out");
                None
            }
        }
    }

    fn read(
        &mut self,
        kind: Kind,
        name: &str,
        value: Bytes,
    ) -> Result<(Arc<str>, Change, Item), Rejection> {
        // The name as it is held already, so that nothing is kept twice.
        let held = self.session.names(kind).shared(name);
        match kind {
            Kind::Address => match self.decoder.address(value)? {
                Address::Workload(mut workload) => {
                    is_called(name, &workload.uid, "uid")?;
                    let key = held.unwrap_or_else(|| workload.uid.clone());
                    workload.uid = key.clone();
                    Ok((key, Change::Workload(workload), Item::Workload))
                }
                Address::Service(service) => {
                    is_called(name, &service.key().to_string(), "namespace/hostname")?;
                    let key = held.unwrap_or_else(|| name.into());
                    Ok((key, Change::Service(service), Item::Service))
                }
            },
            Kind::Authorization => {
                let policy = self.decoder.authorization(value)?;
                is_called(name, &policy.key(), "namespace/name")?;
                let key = held.unwrap_or_else(|| name.into());
                Ok((key, Change::Authorization(policy), Item::Policy))
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

/// The changes of one response, or of a section of it, made when they are taken.
struct Changes<'a, R> {
    intake: &'a mut Intake,
    needs: &'a Needs,
    resources: R,
    removals: std::vec::IntoIter<String>,
    tally: &'a mut Tally,
}

/// What became of a response so far.
#[derive(Default)]
struct Tally {
    /// Of what type its resources are, as soon as that is known.
    kind: Option<Kind>,
    /// How many there were.
    resources: usize,
    /// What an on-demand need may have been called.
    answered: Vec<(String, Found)>,
    accepted: usize,
    removed: usize,
    rejected: Rejections,
    /// Removals of what was not known.
    unknown: usize,
}

impl Tally {
    fn reject(&mut self, name: String, why: String) {
        if self.rejected.add(name.clone(), why.clone()) {
            tracing::warn!(name, error = why, "resource rejected");
        } else {
            tracing::debug!(name, error = why, "resource rejected");
        }
    }
}

impl<R: Iterator<Item = Bytes>> Changes<'_, R> {
    fn resource(&mut self, bytes: Bytes) -> Option<Change> {
        let index = self.tally.resources;
        self.tally.resources += 1;
        let resource = match Resource::decode(bytes) {
            Ok(resource) => resource,
            Err(error) => {
                let why = Rejection::Unreadable(error).to_string();
                self.tally.reject(format!("resource {index}"), why);
                return None;
            }
        };
        let Resource { version, payload, name, aliases } = resource;
        let told = payload.as_ref().and_then(|payload| Kind::of_url(&payload.type_url));
        let kind = self.tally.kind.or(told);
        self.tally.kind = kind;
        if self.needs.are_asked() && kind == Some(Kind::Address) {
            let names = aliases.into_iter().chain([name.clone()]);
            self.tally.answered.extend(names.map(|name| (name, Found::Known)));
        }
        let read = match (payload, told) {
            (None, _) => Err(Rejection::Missing("resource")),
            (Some(payload), Some(own)) if kind == told => {
                let raw = payload.value.clone();
                let read = self.intake.read(own, &name, payload.value);
                read.map(|read| (own, raw, read))
            }
            (Some(payload), _) => Err(Rejection::Invalid {
                field: "type_url",
                value: payload.type_url,
                why: "is not that of the response",
            }),
        };
        match read {
            Ok((kind, raw, (key, change, item))) => {
                let version = Version::new(&version);
                if let Some(content) = &mut self.intake.content {
                    content.put(item, key.clone(), version.clone(), &raw);
                }
                self.intake.session.names_mut(kind).accept(key, version, item);
                self.tally.accepted += 1;
                Some(change)
            }
            Err(error) => {
                self.tally.reject(name, error.to_string());
                None
            }
        }
    }

    fn removal(&mut self, name: String) -> Option<Change> {
        let kind = self.tally.kind?;
        let removed = self.intake.session.names_mut(kind).remove(&name);
        if let Some(content) = &mut self.intake.content {
            content.remove(removed, &name);
        }
        let change = match removed {
            Some(Item::Workload) => Some(Change::RemoveWorkload(name.as_str().into())),
            Some(Item::Service) => name.parse().ok().map(Change::RemoveService),
            Some(Item::Policy) => Some(Change::RemoveAuthorization(name.as_str().into())),
            None => {
                self.tell_unknown(&name);
                None
            }
        };
        self.tally.removed += usize::from(change.is_some());
        if self.needs.are_asked() && kind == Kind::Address {
            self.tally.answered.push((name, Found::Nothing));
        }
        change
    }

    /// Uids of workloads that never came are usual after a new connection, and on demand any name
    /// that does not exist is answered so.
    fn tell_unknown(&mut self, name: &str) {
        self.tally.unknown += 1;
        let is_uid = name.split_once('/').is_some_and(|(_, rest)| rest.contains('/'));
        if is_uid || self.needs.are_asked() || self.tally.unknown > UNKNOWN_TOLD {
            tracing::debug!(name, "removal of an unknown resource");
        } else {
            tracing::warn!(name, "removal of an unknown resource");
        }
    }
}

impl<R: Iterator<Item = Bytes>> Iterator for Changes<'_, R> {
    type Item = Change;

    fn next(&mut self) -> Option<Change> {
        while let Some(bytes) = self.resources.next() {
            if let Some(change) = self.resource(bytes) {
                return Some(change);
            }
        }
        while let Some(name) = self.removals.next() {
            if let Some(change) = self.removal(name) {
                return Some(change);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
