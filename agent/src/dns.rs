//! Names: each pod's questions are answered from the mesh, or passed on to the agent's name servers.

mod message;
mod resolver;
mod tcp;
mod udp;

use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;

use culvert_core::names::{self, Answer, Client, Directory, Family};
use culvert_core::workload::Workload;
use futures_util::FutureExt;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{RData, Record, RecordType};
use rand::seq::SliceRandom;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::capture::DnsSockets;
use crate::drain::DrainWatch;
use crate::node::Node;
use crate::pods::Pod;
use crate::telemetry::DnsSource;

pub use message::{Question, Rejected, Reply, Transport};
pub use resolver::{NoUpstreams, OwnResolver, Upstreams};
use resolver::{PodResolver, PodSockets};

/// How long clients may keep what the mesh answers, in seconds.
const TTL: u32 = 30;
/// How many questions of one pod may wait for something; further ones fail at once.
const WAITING: usize = 2048;
/// How many questions of one pod may be at name servers.
const ASKED: usize = 128;

/// How names are served; the same for all pods of the node.
#[derive(Clone)]
pub struct Dns {
    /// Of the listeners, UDP and TCP.
    pub port: u16,
    /// Without a dot at either end, in lower case.
    pub cluster_domain: Arc<str>,
    /// Whose services win when several namespaces have a name.
    pub prefer_namespace: Option<Arc<str>>,
    /// Whether clients are told IPv6 addresses.
    pub ipv6: bool,
    /// `None`: what the mesh does not know fails.
    pub upstreams: Option<Upstreams>,
}

/// Answers the questions of `pod` until it leaves or the agent drains; those that were read before
/// are answered still.
pub async fn serve(
    node: Arc<Node>,
    dns: Dns,
    pod: Arc<Pod>,
    sockets: DnsSockets,
    drain: DrainWatch,
) {
    let names = Arc::new(PodNames::new(node, dns, pod.clone()));
    let mut serving = JoinSet::new();
    for socket in sockets.udp {
        match UdpSocket::from_std(socket) {
            Ok(socket) => {
                serving.spawn(udp::serve(names.clone(), socket, drain.clone()));
            }
            Err(error) => tracing::error!(workload = %pod.uid, %error, "cannot serve DNS"),
        }
    }
    for listener in sockets.tcp {
        match TcpListener::from_std(listener) {
            Ok(listener) => {
                serving.spawn(tcp::serve(names.clone(), listener, drain.clone()));
            }
            Err(error) => tracing::error!(workload = %pod.uid, %error, "cannot serve DNS"),
        }
    }
    tokio::select! {
        () = async { while serving.join_next().await.is_some() {} } => {}
        () = pod.is_gone() => {}
        () = drain.expired() => {}
    }
    // What is left is cut with the set.
}

/// What one pod may ask, and of whom.
struct PodNames {
    node: Arc<Node>,
    dns: Dns,
    pod: Arc<Pod>,
    resolver: Option<PodResolver>,
    waiting: Semaphore,
    asked: Semaphore,
}

impl PodNames {
    fn new(node: Arc<Node>, dns: Dns, pod: Arc<Pod>) -> Self {
        let sockets = PodSockets { netns: pod.netns.clone(), redirection: node.capture.clone() };
        let resolver = dns.upstreams.as_ref().and_then(|upstreams| {
            let built = upstreams.in_pod(sockets);
            built.inspect_err(|error| tracing::error!(workload = %pod.uid, %error)).ok()
        });
        let (waiting, asked) = (Semaphore::new(WAITING), Semaphore::new(ASKED));
        Self { node, dns, pod, resolver, waiting, asked }
    }

    /// The answer to a message; `None` when there is none.
    async fn respond(self: Arc<Self>, bytes: Vec<u8>, transport: Transport) -> Option<Vec<u8>> {
        let question = match Question::parse(&bytes) {
            Ok(question) => question,
            Err(Rejected::Silently) => return None,
            Err(Rejected::With(answer)) => return Some(answer),
        };
        drop(bytes);
        let reply = self.reply(&question, transport).await;
        Some(question.answer(reply, transport))
    }

    /// Does not wait for anything when the mesh knows the name.
    async fn reply(&self, question: &Question, transport: Transport) -> Reply {
        let failed = || Reply::failure(ResponseCode::ServFail);
        let client = match self.node.workload_of(&self.pod).now_or_never() {
            Some(known) => known,
            None => {
                let Ok(_waiting) = self.waiting.try_acquire() else { return failed() };
                self.node.workload_of(&self.pod).await
            }
        };
        let client = match client {
            Ok(client) => client,
            Err(error) => {
                tracing::debug!(target: "dns", domain = %question.name(), %error);
                return failed();
            }
        };
        let source = DnsSource::new(&client, question.kind().into(), transport.label());
        self.node.telemetry.dns().request(&source);
        if let Some(reply) = self.known(question, &client) {
            return reply;
        }
        let Ok(_waiting) = self.waiting.try_acquire() else {
            tell(&client, question, &Outcome::Failed(&"too many questions"));
            return failed();
        };
        self.forward(question, &client, &source).await
    }

    /// What the mesh answers, if it knows the name.
    fn known(&self, question: &Question, client: &Workload) -> Option<Reply> {
        let family = match question.kind() {
            RecordType::A => Family::V4,
            RecordType::AAAA => Family::V6,
            _ => return None,
        };
        let hostname = question.hostname().filter(|_| question.is_internet())?;
        let snapshot = self.node.mesh.snapshot();
        let directory = Directory {
            snapshot: &snapshot,
            cluster_domain: &self.dns.cluster_domain,
            preferred_namespace: self.dns.prefer_namespace.as_deref(),
            ipv6: self.dns.ipv6,
        };
        let asks = Client { namespace: &client.namespace, network: &client.network };
        let answer = names::answer(&directory, &asks, &hostname, family);
        let answers = match answer {
            Answer::Unknown => return None,
            Answer::Empty => {
                tell(client, question, &Outcome::NoRecords);
                Vec::new()
            }
            Answer::Addresses { canonical, addresses } => {
                let answers = records(question, canonical.as_deref(), addresses);
                let aliases = canonical.iter().count();
                tell(client, question, &Outcome::Success { aliases });
                answers
            }
        };
        Some(Reply { authoritative: true, answers, ..Reply::default() })
    }

    /// What the name servers answer.
    async fn forward(&self, question: &Question, client: &Workload, source: &DnsSource) -> Reply {
        // Whatever is said of another class is not remembered apart from this one.
        if !question.is_internet() {
            tell(client, question, &Outcome::Failed(&"class is not IN"));
            return Reply::failure(ResponseCode::Refused);
        }
        let (Some(resolver), Ok(_asked)) = (&self.resolver, self.asked.acquire().await) else {
            tell(client, question, &Outcome::Failed(&"no name servers"));
            return Reply::failure(ResponseCode::ServFail);
        };
        let begun = Instant::now();
        let (reply, error) = resolver.ask(question).await;
        self.node.telemetry.dns().forwarded(source, begun.elapsed(), error.is_some());
        match &error {
            None => tell(client, question, &Outcome::Forwarded),
            Some(error) => tell(client, question, &Outcome::Failed(error)),
        }
        reply
    }
}

/// Address records in random order, after the name that they belong to.
fn records(
    question: &Question,
    canonical: Option<&str>,
    mut addresses: Vec<IpAddr>,
) -> Vec<Record> {
    addresses.shuffle(&mut rand::rng());
    let owner = canonical.and_then(|name| question.first_labels(name.split('.').count()));
    let alias = owner.clone().map(|target| {
        Record::from_rdata(question.name().clone(), TTL, RData::CNAME(CNAME(target)))
    });
    let owner = owner.unwrap_or_else(|| question.name().clone());
    let addresses = addresses.into_iter().map(|ip| {
        let data = match ip {
            IpAddr::V4(ip) => RData::A(A(ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
        };
        Record::from_rdata(owner.clone(), TTL, data)
    });
    alias.into_iter().chain(addresses).collect()
}

/// What became of a question, for the log.
enum Outcome<'a> {
    Success { aliases: usize },
    NoRecords,
    Forwarded,
    Failed(&'a dyn Display),
}

fn tell(client: &Workload, question: &Question, outcome: &Outcome) {
    if !tracing::enabled!(target: "dns", tracing::Level::DEBUG) {
        return;
    }
    let (result, endpoints) = match outcome {
        Outcome::Success { aliases } => ("success".to_owned(), *aliases),
        Outcome::NoRecords => ("no records".to_owned(), 0),
        Outcome::Forwarded => ("forwarded".to_owned(), 0),
        Outcome::Failed(error) => (format!("forwarding failed ({error})"), 0),
    };
    tracing::event!(
        target: "dns",
        tracing::Level::DEBUG,
        src.workload = &*client.name,
        src.namespace = &*client.namespace,
        query = %question.kind(),
        domain = %question.name(),
        result,
        endpoints,
    );
}
