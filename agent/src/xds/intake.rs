//! Takes over one response: first its resources in their order, then its removals.

use std::sync::Arc;

use bytes::Bytes;
use culvert_core::snapshot::Change;
use culvert_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest as Request;

use super::arriving::Arriving;
use super::decode::Rejection;
use super::kept::Content;
use super::needs::{Found, Needs};
use super::read::{Read, Reader, Resource};
use super::session::{Item, Kind, Rejections, Session, Version};
use super::wire::Response;

/// How many removals of unknown names the log tells of for each response.
const UNKNOWN_TOLD: usize = 10;
/// Bytes of a large response for each of which a name is expected: rather too many than too few.
const BYTES_PER_NAME: usize = 512;

/// All that a response changes.
pub(super) struct Intake {
    pub session: Session,
    /// The resources as they came, when they are to be kept on disk.
    pub content: Option<Content>,
    /// For what nobody has read yet.
    pub reader: Reader,
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
        let reader = match content {
            Some(_) => Reader::keeping(),
            None => Reader::default(),
        };
        Self { session, content, reader }
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
            let resources = resources.into_iter().map(Resource::Unread);
            let removals = removed_resources.into_iter();
            publish(&mut Changes { intake: self, needs, resources, removals, tally: &mut tally });
        } else {
            tracing::warn!(%type_url, "resources of a type that was not asked for are ignored");
        }
        self.finish(&type_url, &nonce, tally, needs)
    }

    /// Takes over a response of `size` bytes while it arrives: section by section, and what it
    /// removes at last.
    ///
    /// Of what type its resources are is told by the first of them. `None`: it broke off. What came
    /// of it stays in force, as each resource stands by itself; the next stream names it as held and
    /// brings the rest.
    pub fn take_arriving(
        &mut self,
        mut arriving: Arriving,
        size: usize,
        needs: &Needs,
        mut publish: impl FnMut(&mut dyn Iterator<Item = Change>),
    ) -> Option<Outcome> {
        let mut tally = Tally { expected: size / BYTES_PER_NAME, ..Tally::default() };
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
        version: Version,
        value: Bytes,
    ) -> Option<Change> {
        let Read { name, version, raw, change, .. } =
            self.reader.content(kind, name, version, value);
        match change {
            Ok(change) => Some(self.accept(kind, name, version, raw, change)),
            Err(error) => {
                tracing::warn!(name = &*name, %error, "a kept resource is left out");
                None
            }
        }
    }

    fn accept(
        &mut self,
        kind: Kind,
        name: Arc<str>,
        version: Version,
        raw: Option<Bytes>,
        mut change: Change,
    ) -> Change {
        let item = match change {
            Change::Workload(_) => Item::Workload,
            Change::Service(_) => Item::Service,
            _ => Item::Policy,
        };
        let kept = self.content.as_mut().zip(raw).map(|it| (it, version.clone()));
        // As it is held already, so that nothing is in memory twice.
        let name = self.session.names_mut(kind).accept(name, version, item);
        if let Some(((content, raw), version)) = kept {
            content.put(item, name.clone(), version, raw);
        }
        if let Change::Workload(workload) = &mut change
            && !Arc::ptr_eq(&workload.uid, &name)
        {
            Arc::make_mut(workload).uid = name;
        }
        change
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
    /// How many of the first type may come.
    expected: usize,
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

impl<R: Iterator<Item = Resource>> Changes<'_, R> {
    fn resource(&mut self, resource: Resource) -> Option<Change> {
        let index = self.tally.resources;
        self.tally.resources += 1;
        let read = match self.intake.reader.resource(resource) {
            Ok(read) => read,
            Err(error) => {
                self.tally.reject(format!("resource {index}"), error.to_string());
                return None;
            }
        };
        let Read { name, version, aliases, kind: told, raw, change } = read;
        if self.tally.kind.is_none()
            && let Some(kind) = told
        {
            self.tally.kind = told;
            self.intake.session.names_mut(kind).expect(self.tally.expected);
        }
        let kind = self.tally.kind;
        if self.needs.are_asked() && kind == Some(Kind::Address) {
            let names = aliases.into_iter().chain([name.to_string()]);
            self.tally.answered.extend(names.map(|name| (name, Found::Known)));
        }
        match (told, change) {
            (Some(told), Ok(change)) if kind == Some(told) => {
                self.tally.accepted += 1;
                Some(self.intake.accept(told, name, version, raw, change))
            }
            (Some(told), _) if kind != Some(told) => {
                self.tally
                    .reject(name.to_string(), Rejection::of_other_type(told.url()).to_string());
                None
            }
            (_, change) => {
                let error = change.err().map(|error| error.to_string());
                self.tally.reject(name.to_string(), error.unwrap_or_default());
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

impl<R: Iterator<Item = Resource>> Iterator for Changes<'_, R> {
    type Item = Change;

    fn next(&mut self) -> Option<Change> {
        while let Some(resource) = self.resources.next() {
            if let Some(change) = self.resource(resource) {
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
