//! The stream to the control plane, opened again whenever it ends.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest as Request;
use http::uri::PathAndQuery;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tonic::{Code, Status};

use super::Publish;
use super::arriving::{Arriving, FEW, WAITING};
use super::backoff::{Backoff, End};
use super::incoming::{Event, Incoming};
use super::intake::{Intake, Outcome};
use super::keeper::{Keeper, Turn};
use super::needs::Needs;
use super::read::{Piece, Reader};
use super::session::{Kind, subscribe};
use super::status::{XdsConnection, XdsStatus};
use crate::control::Control;
use crate::telemetry::{Termination, XdsMetrics};

const METHOD: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// How long a control plane may take until it sends anything. It accepts streams late when many
/// come at once, and always answers the first requests.
const FIRST_RESPONSE: Duration = Duration::from_secs(60);
/// The same when another address can be tried.
const FIRST_OF_SEVERAL: Duration = Duration::from_secs(10);
/// How long nothing may come of a response that began, while the connection is alive.
const STALLED: Duration = Duration::from_secs(60);
/// Requests that wait for the control plane to read them.
const OUTGOING: usize = 1024;

pub(super) struct Client<P> {
    pub control: Control,
    /// For what is read where it is received.
    pub reader: Reader,
    pub intake: Arc<Mutex<Intake>>,
    pub publish: Arc<P>,
    pub needs: Arc<Needs>,
    pub status: watch::Sender<XdsStatus>,
    pub metrics: XdsMetrics,
    pub keeper: Option<Keeper>,
    /// An address that gave no answer: the next attempt begins after it.
    pub avoid: Option<Arc<str>>,
}

/// How an attempt ended, and why.
struct Ended {
    end: End,
    error: Option<String>,
}

impl Ended {
    fn unopened(error: impl ToString) -> Self {
        Self { end: End::Unopened, error: Some(error.to_string()) }
    }

    fn failed(error: impl ToString) -> Self {
        Self { end: End::Failed, error: Some(error.to_string()) }
    }
}

impl<P: Publish> Client<P> {
    /// Never ends.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new();
        loop {
            self.status.send_modify(|status| status.connection = XdsConnection::Connecting);
            let ended = self.attempt().await;
            self.metrics.terminated(match ended.end {
                End::Unopened => Termination::ConnectionError,
                End::Failed => Termination::Error,
                End::Broken => Termination::Reconnect,
                End::Complete => Termination::Complete,
            });
            let delay = backoff.after(ended.end, &mut rand::rng());
            self.status
                .send_modify(|status| status.ended(ended.error.as_deref(), SystemTime::now()));
            match (ended.end, &ended.error) {
                (End::Unopened | End::Failed, Some(error)) => {
                    tracing::warn!(%error, retry_in = ?delay, "no stream from the control plane");
                }
                (_, error) => {
                    let error = error.as_deref().unwrap_or("closed in good order");
                    tracing::info!(error, "the control plane's stream ended, connecting again");
                }
            }
            self.pause(delay).await;
        }
    }

    async fn pause(&mut self, delay: Duration) {
        let until = Instant::now() + delay;
        loop {
            tokio::select! {
                () = sleep_until(until) => return,
                turn = turn(&mut self.keeper, false) => self.keep(turn),
            }
        }
    }

    /// Connects, opens a stream, and follows it to its end.
    async fn attempt(&mut self) -> Ended {
        let connected = match self.avoid.take() {
            Some(failed) => self.control.connect_after(&failed).await,
            None => self.control.connect().await,
        };
        let channel = match connected {
            Ok(channel) => channel,
            Err(error) => return Ended::unopened(error),
        };
        let address = channel.address().clone();
        let (requests, outgoing) = mpsc::channel(OUTGOING);
        self.begin(&requests);
        let deadline = Instant::now() + self.patience();
        let method = PathAndQuery::from_static(METHOD);
        let stream = match timeout_at(deadline, Incoming::open(channel, method, outgoing)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(status)) => {
                self.avoid = Some(address.clone());
                return Ended::unopened(told(&address, &status));
            }
            Err(_) => {
                self.avoid = Some(address.clone());
                return Ended::unopened(silent(&address));
            }
        };
        tracing::info!(%address, "stream from the control plane is open");
        let open = XdsConnection::Open { address: address.clone() };
        self.status.send_modify(|status| status.connection = open);
        let (ended, brought) = self.follow(stream, requests, deadline, &address).await;
        if brought {
            return ended;
        }
        // A control plane that accepts streams and gives nothing is as good as none; and it must
        // not be asked as often as possible.
        self.avoid = Some(address);
        Ended { end: End::Failed, ..ended }
    }

    fn begin(&self, requests: &mpsc::Sender<Request>) {
        let intake = self.intake.lock();
        for request in intake.session.open() {
            // There is room for these.
            let _ = requests.try_send(request);
        }
        self.needs.reopened(|name| intake.session.names(Kind::Address).contains(name));
    }

    fn patience(&self) -> Duration {
        match self.control.addresses() {
            0 | 1 => FIRST_RESPONSE,
            _ => FIRST_OF_SEVERAL,
        }
    }

    /// Also gives whether the stream brought anything.
    async fn follow(
        &mut self,
        mut stream: Incoming,
        requests: mpsc::Sender<Request>,
        deadline: Instant,
        address: &str,
    ) -> (Ended, bool) {
        let needs = self.needs.clone();
        let mut brought = false;
        loop {
            let request = tokio::select! {
                event = stream.event() => match self.take(event, &mut stream).await {
                    Ok(Some(answer)) => {
                        brought = true;
                        answer
                    }
                    Ok(None) => return (Ended { end: End::Complete, error: None }, brought),
                    Err(status) => {
                        let (end, error) = (end_of(&status), Some(told(address, &status)));
                        return (Ended { end, error }, brought);
                    }
                },
                (wanted, given_up) = needs.wanted() => subscribe(&wanted, &given_up),
                () = sleep_until(deadline), if !brought => {
                    return (Ended::failed(silent(address)), false);
                }
                turn = turn(&mut self.keeper, brought) => {
                    self.keep(turn);
                    continue;
                }
            };
            if requests.try_send(request).is_err() {
                let error = format!("{address}: it does not read what it is sent");
                return (Ended::failed(error), brought);
            }
        }
    }

    /// Takes over what came and gives the answer to it.
    async fn take(
        &mut self,
        event: Result<Option<Event>, Status>,
        stream: &mut Incoming,
    ) -> Result<Option<Request>, Status> {
        let (size, outcome) = match event? {
            None => return Ok(None),
            Some(Event::Message(response)) => {
                let publish = self.publish.clone();
                let publish = |changes: &mut dyn Iterator<Item = _>| publish.publish(changes);
                let size = response.size();
                (size, self.intake.lock().take(response, &self.needs, publish))
            }
            Some(Event::Large(size)) => (size, self.take_arriving(stream, size).await?),
        };
        let url = Kind::of_url(&outcome.answer.type_url).map_or("other", Kind::url);
        self.metrics.received(url, size as u64);
        tracing::debug!(
            url,
            size,
            accepted = outcome.accepted,
            removed = outcome.removed,
            rejected = outcome.rejected.len(),
            "took over a response of the control plane"
        );
        if let Some(keeper) = &mut self.keeper
            && outcome.accepted + outcome.removed > 0
        {
            keeper.changed();
        }
        let intake = self.intake.lock();
        let now = SystemTime::now();
        self.status.send_modify(|status| status.pushed(&outcome, &intake.session, now));
        Ok(Some(outcome.answer))
    }

    /// Receives a large response here, and takes it over on a thread of its own meanwhile. Resources
    /// are read by either, so that both have the same to do.
    async fn take_arriving(
        &mut self,
        stream: &mut Incoming,
        size: usize,
    ) -> Result<Outcome, Status> {
        let (groups, arriving) = mpsc::channel(WAITING);
        let (intake, needs, publish) =
            (self.intake.clone(), self.needs.clone(), self.publish.clone());
        let arriving = Arriving::new(Handle::current(), arriving);
        let taken = tokio::task::spawn_blocking(move || {
            let publish = |changes: &mut dyn Iterator<Item = _>| publish.publish(changes);
            intake.lock().take_arriving(arriving, size, &needs, publish)
        });
        let received = loop {
            let group = match timeout(STALLED, stream.parts()).await {
                Ok(Ok(group)) => group,
                Ok(Err(status)) => break Err(status),
                Err(_) => break Err(Status::unavailable("it stopped within a response")),
            };
            let pieces = group.into_iter().filter_map(Piece::of);
            let group: Vec<Piece> = match groups.max_capacity() - groups.capacity() < FEW {
                true => pieces.collect(),
                false => pieces.map(|piece| self.reader.piece(piece)).collect(),
            };
            let is_last = matches!(group.last(), Some(Piece::End(_)));
            // If nobody takes it any more, the thread says why.
            if groups.send(group).await.is_err() || is_last {
                break Ok(());
            }
        };
        drop(groups);
        let outcome = match taken.await {
            Ok(outcome) => outcome,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        received?;
        outcome.ok_or_else(|| Status::internal("the response was not taken over"))
    }

    fn keep(&mut self, turn: Turn) {
        let Some(keeper) = &mut self.keeper else { return };
        match turn {
            Turn::Write => {
                let content = self.intake.lock().content.clone();
                keeper.write(content.unwrap_or_default());
            }
            Turn::Renew => keeper.renew(),
            Turn::Done => {}
        }
    }
}

/// Never ready without a keeper.
async fn turn(keeper: &mut Option<Keeper>, renewing: bool) -> Turn {
    match keeper {
        Some(keeper) => keeper.turn(renewing).await,
        None => std::future::pending().await,
    }
}

fn end_of(status: &Status) -> End {
    let going = ["transport is closing", "received prior goaway"];
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => End::Broken,
        Code::Unavailable if going.iter().any(|text| status.message().contains(text)) => {
            End::Broken
        }
        _ => End::Failed,
    }
}

fn told(address: &str, status: &Status) -> String {
    format!("{address}: {:?}: {}", status.code(), status.message())
}

fn silent(address: &str) -> String {
    format!("{address}: it accepted the stream and sent nothing")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn endings_of_a_living_cluster_call_for_connecting_at_once() {
        for (code, message, end) in [
            (Code::Unknown, "", End::Broken),
            (Code::Cancelled, "", End::Broken),
            (Code::DeadlineExceeded, "", End::Broken),
            (Code::Unavailable, "the transport is closing", End::Broken),
            (Code::Unavailable, "closing: received prior goaway: code: NO_ERROR", End::Broken),
            (Code::Unavailable, "overloaded", End::Failed),
            (Code::Unauthenticated, "", End::Failed),
            (Code::Internal, "", End::Failed),
        ] {
            assert_eq!(end_of(&Status::new(code, message)), end, "{code:?} {message}");
        }
    }
}
