//! Asking name servers: those of the agent's own `resolv.conf`, from within a pod or by itself.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_resolver::Resolver;
use hickory_resolver::config::{LookupIpStrategy, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::iocompat::AsyncIoTokioAsStd;
use hickory_resolver::net::runtime::{
    DnsUdpSocket, RuntimeProvider, TokioHandle, TokioRuntimeProvider, TokioTime,
};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::system_conf::{parse_resolv_conf, read_system_conf};
use tokio::io::ReadBuf;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::message::{Question, Reply};
use crate::capture::{Netns, Redirection};
use crate::dial;

/// How many answers are remembered for one pod.
const REMEMBERED: u64 = 1024;
/// How long the connection to a name server may take when the resolver does not say.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// The end of every question, whatever `resolv.conf` says of time-outs and attempts.
const LIMIT: Duration = Duration::from_secs(30);

/// The name servers to ask, and how.
#[derive(Clone)]
pub struct Upstreams {
    config: ResolverConfig,
    options: ResolverOpts,
}

/// Why nobody can be asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no name servers: {0}")]
pub struct NoUpstreams(NetError);

impl Upstreams {
    /// Those of the agent's `/etc/resolv.conf`, with its options.
    pub fn of_system() -> Result<Upstreams, NoUpstreams> {
        let (config, options) = read_system_conf().map_err(NoUpstreams)?;
        Ok(Upstreams { config, options })
    }

    /// Those of the text of such a file (resolv.conf(5)).
    pub fn parse(text: &str) -> Result<Upstreams, NoUpstreams> {
        let (config, options) = parse_resolv_conf(text).map_err(NoUpstreams)?;
        Ok(Upstreams { config, options })
    }

    /// Asks from within a pod, for whole names only and without the agent's hosts file.
    pub(super) fn in_pod(&self, sockets: PodSockets) -> Result<PodResolver, NoUpstreams> {
        let servers = self.config.name_servers().to_vec();
        let config = ResolverConfig::from_parts(None, Vec::new(), servers);
        let mut builder = Resolver::builder_with_config(config, PodRuntime::new(sockets));
        let options = builder.options_mut();
        *options = self.options.clone();
        options.use_hosts_file = ResolveHosts::Never;
        options.cache_size = REMEMBERED;
        options.preserve_intermediates = true;
        // The pod's own sockets shall not meet a port of ours outside the ephemeral ones.
        options.os_port_selection = true;
        Ok(PodResolver(builder.build().map_err(NoUpstreams)?))
    }

    /// Asks as the agent itself, which has a search list and a hosts file.
    pub fn own(&self) -> Result<OwnResolver, NoUpstreams> {
        let runtime = TokioRuntimeProvider::default();
        let mut builder = Resolver::builder_with_config(self.config.clone(), runtime);
        let options = builder.options_mut();
        *options = self.options.clone();
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        Ok(OwnResolver(builder.build().map_err(NoUpstreams)?))
    }
}

/// Looks up names as any process beside the agent would.
#[derive(Clone)]
pub struct OwnResolver(Resolver<TokioRuntimeProvider>);

impl OwnResolver {
    /// All addresses of a name, of both families.
    pub async fn addresses(&self, hostname: &str) -> Result<Vec<IpAddr>, NetError> {
        let found = self.0.lookup_ip(hostname).await?;
        Ok(found.iter().map(|ip| ip.to_canonical()).collect())
    }
}

/// Looks up names on behalf of one pod, and remembers what it heard.
pub(super) struct PodResolver(Resolver<PodRuntime>);

impl PodResolver {
    /// What name servers say of a question. The error is for the log; clients get a reply anyway.
    pub async fn ask(&self, question: &Question) -> (Reply, Option<NetError>) {
        let asked = timeout(LIMIT, self.0.lookup(question.name().clone(), question.kind()));
        let error = match asked.await {
            Ok(Ok(found)) => {
                let mut answers = found.answers().to_vec();
                for record in answers.iter_mut().filter(|record| record.name == *question.name()) {
                    // As the client wrote it: some compare letter by letter.
                    record.name = question.name().clone();
                }
                let additionals = found.additionals().to_vec();
                return (Reply { answers, additionals, ..Reply::default() }, None);
            }
            Ok(Err(error)) => error,
            Err(_elapsed) => NetError::Timeout,
        };
        let reply = match &error {
            NetError::Dns(DnsError::NoRecordsFound(none)) => Reply {
                code: none.response_code,
                // It tells for how long there is nothing (RFC 2308 section 3).
                authorities: none
                    .soa
                    .iter()
                    .map(|soa| (**soa).clone().into_record_of_rdata())
                    .collect(),
                ..Reply::default()
            },
            NetError::Dns(DnsError::ResponseCode(code)) if code.high() == 0 => {
                Reply::failure(*code)
            }
            _ => Reply::failure(ResponseCode::ServFail),
        };
        (reply, Some(error))
    }
}

/// Where a pod's questions leave: its namespace, by sockets that are not captured.
#[derive(Clone)]
pub(super) struct PodSockets {
    pub netns: Arc<Netns>,
    pub redirection: Redirection,
}

/// The resolver's runtime, with the sockets of one pod.
#[derive(Clone)]
struct PodRuntime {
    handle: TokioHandle,
    sockets: PodSockets,
}

impl PodRuntime {
    fn new(sockets: PodSockets) -> Self {
        Self { handle: TokioHandle::default(), sockets }
    }
}

impl RuntimeProvider for PodRuntime {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = Connected;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> TokioHandle {
        self.handle.clone()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        _bind: Option<SocketAddr>,
        limit: Option<Duration>,
    ) -> Pin<Box<dyn Future<Output = io::Result<Self::Tcp>> + Send>> {
        let PodSockets { netns, redirection } = self.sockets.clone();
        Box::pin(async move {
            let connecting = async {
                match is_agents(server) {
                    true => TcpStream::connect(server).await,
                    false => dial::dial_out(&netns, &redirection, None, server).await,
                }
            };
            let connected = timeout(limit.unwrap_or(CONNECT_LIMIT), connecting).await;
            connected.map_err(|_elapsed| io::ErrorKind::TimedOut)?.map(AsyncIoTokioAsStd)
        })
    }

    fn bind_udp(
        &self,
        _local: SocketAddr,
        server: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = io::Result<Connected>> + Send>> {
        let PodSockets { netns, redirection } = self.sockets.clone();
        Box::pin(async move {
            let socket = match is_agents(server) {
                true => dial::udp(server)?,
                false => dial::udp_out(&netns, &redirection, server)?,
            };
            Ok(Connected { socket, server })
        })
    }
}

/// A name server on loopback is one beside the agent, not one in the pod.
fn is_agents(server: SocketAddr) -> bool {
    server.ip().is_loopback()
}

/// A socket that hears its server only, also when there is none.
pub(super) struct Connected {
    socket: UdpSocket,
    server: SocketAddr,
}

impl DnsUdpSocket for Connected {
    type Time = TokioTime;

    fn poll_recv_from(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<(usize, SocketAddr)>> {
        let mut buffer = ReadBuf::new(buffer);
        ready!(self.socket.poll_recv(cx, &mut buffer))?;
        Poll::Ready(Ok((buffer.filled().len(), self.server)))
    }

    fn poll_send_to(
        &self,
        cx: &mut Context<'_>,
        bytes: &[u8],
        _server: SocketAddr,
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_send(cx, bytes)
    }
}
