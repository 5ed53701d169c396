//! The mesh that the cases run on, once per path, and what a case needs of it.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec};
use culvert_lab::wait;
use culvert_tests::direct::{self, Verdict};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// How long one step may take on a loaded machine.
pub const LIMIT: Duration = Duration::from_secs(30);
/// How long is waited for what must not happen.
pub const A_WHILE: Duration = Duration::from_millis(400);

/// Not captured, neither at the client nor at the server.
pub const EXCLUDED_PORT: u16 = 9090;
/// Denied by a policy from the start.
pub const DENIED_PORT: u16 = 9999;
/// Where the service leads.
pub const SERVICE_PORT: u16 = 80;
pub const SERVICE_TARGET: u16 = 7080;
/// Where the service behind a waypoint would lead.
pub const GUARDED_TARGET: u16 = 7081;

/// The way between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Two nodes without agents.
    Plain,
    /// Both pods on one node with an agent, which carries everything.
    Same,
    /// Pods on two nodes, each with an agent.
    Cross,
    /// Both pods on one node, carried by the kernel.
    Direct,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// A running mesh with its agents.
pub struct Ground {
    pub path: Path,
    pub mesh: Running,
    agents: Vec<(&'static str, Agent)>,
    /// One connection per family that was opened before all cases.
    idle: Vec<Pair>,
    block: Mutex<()>,
}

/// The two ends that applications have of one connection.
pub struct Pair {
    pub client: TcpStream,
    pub server: TcpStream,
}

/// What one case sees.
#[derive(Clone, Copy)]
pub struct Stage<'g> {
    pub ground: &'g Ground,
    pub family: Family,
}

impl Ground {
    /// Starts the mesh and the agents of this path.
    pub fn start(path: Path) -> Result<Self> {
        let mut client = PodSpec::new("client", "web", "client");
        client.exclude_outbound_ports = vec![EXCLUDED_PORT];
        client.exclude_outbound_cidrs = vec!["10.244.2.2/32".into(), "fd00:10:244:2::2/128".into()];
        let mut server = PodSpec::new("server", "shop", "server");
        server.exclude_inbound_ports = vec![EXCLUDED_PORT];
        let at_server = |mesh: Mesh, server: PodSpec| {
            mesh.pod_with(server)
                .pod_with(PodSpec::new("distant", "shop", "distant"))
                .pod_with(PodSpec::new("fresh", "shop", "fresh"))
                .pod_with(PodSpec::new("doomed", "shop", "doomed"))
                .pod_with(PodSpec { enrolled: false, ..PodSpec::new("silent", "shop", "silent") })
                .pod_with(PodSpec::waypoint("gate", "shop", "gate"))
                .pod_with(PodSpec::outside("outside", "away", "outside"))
        };
        let mesh = match path {
            Path::Plain => Mesh::new(),
            Path::Same | Path::Cross | Path::Direct => culvert_tests::mesh(),
        };
        let mesh = mesh
            .node("a")
            .pod_with(client)
            .pod_with(PodSpec { enrolled: false, ..PodSpec::new("late", "web", "late") })
            .pod("early", "web", "early");
        // The excluded pod is the first of node b: its addresses are those of the exclusion.
        let excluded = PodSpec::outside("excluded", "away", "excluded");
        let mesh = match path {
            Path::Same | Path::Direct => at_server(mesh, server).node("b").pod_with(excluded),
            Path::Plain | Path::Cross => at_server(mesh.node("b").pod_with(excluded), server),
        };
        let rule = |port| vec![vec![vec![Match::any().port(port)]]];
        let mesh = mesh
            .service(
                ServiceSpec::new("shop", "shop")
                    .port(SERVICE_PORT, SERVICE_TARGET)
                    .endpoint("server"),
            )
            .service(ServiceSpec::new("gate", "shop").port(15008, 15008).endpoint("gate"))
            .service(
                ServiceSpec::new("guarded", "shop")
                    .port(SERVICE_PORT, GUARDED_TARGET)
                    .endpoint("server")
                    .behind("shop/gate.shop.svc.cluster.local"),
            )
            .policy(PolicySpec::deny("never", "shop", rule(DENIED_PORT)))
            .start()?;
        let mut ground =
            Self { path, mesh, agents: Vec::new(), idle: Vec::new(), block: Mutex::new(()) };
        if path == Path::Plain {
            let netns = ground.mesh.pod("client").place().netns();
            netns.sysctl("net/ipv4/tcp_syn_retries", "2")?;
        }
        ground.silence()?;
        ground.start_missing_agents()?;
        for family in [Family::V4, Family::V6] {
            let pair = Stage { ground: &ground, family }.pair().context("the idle connection")?;
            ground.idle.push(pair);
        }
        Ok(ground)
    }

    /// Leaves the pod `silent` without a way to answer anyone but its node.
    fn silence(&self) -> Result<()> {
        let silent = self.mesh.pod("silent").place().netns();
        silent.ip("route del default\nroute del ::/0\n")
    }

    /// The nodes that have agents.
    pub fn nodes(&self) -> &'static [&'static str] {
        match self.path {
            Path::Plain => &[],
            Path::Same | Path::Direct => &["a"],
            Path::Cross => &["a", "b"],
        }
    }

    /// Starts the agents of this path that do not run.
    pub fn start_missing_agents(&mut self) -> Result<()> {
        for node in self.nodes() {
            if self.agents.iter_mut().all(|(name, _)| name != node) {
                self.start_agent(node)?;
            }
        }
        Ok(())
    }

    pub fn start_agent(&mut self, node: &'static str) -> Result<()> {
        let same_node = match self.path {
            Path::Direct => "kernel",
            Path::Plain | Path::Same | Path::Cross => "agent",
        };
        let options = direct::with(&self.mesh, &[("CULVERT_SAME_NODE", same_node)]);
        let agent = self.mesh.agent_with(node, &options)?;
        self.agents.push((node, agent));
        Ok(())
    }

    /// The running agent of a node.
    pub fn agent(&mut self, node: &str) -> Result<&mut Agent> {
        let found = self.agents.iter_mut().find(|(name, _)| *name == node);
        found.map(|(_, agent)| agent).with_context(|| format!("no agent runs on node {node}"))
    }

    pub fn kill_agent(&mut self, node: &str) -> Result<()> {
        self.agent(node)?.process().kill()?;
        self.forget_agent(node);
        Ok(())
    }

    /// Forgets an agent whose process has ended.
    pub fn forget_agent(&mut self, node: &str) {
        self.agents.retain(|(name, _)| *name != node);
    }

    pub fn stages(&self) -> [Stage<'_>; 2] {
        [Family::V4, Family::V6].map(|family| Stage { ground: self, family })
    }

    /// Cuts the way between the client and the pod `distant` until the guard is dropped.
    pub fn cut(&self) -> Result<Cut<'_>> {
        let turn = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = Cut { ground: self, _turn: turn };
        cut.route("add")?;
        Ok(cut)
    }

    pub fn take_idle(&self, family: Family) -> Option<&Pair> {
        self.idle.get(family as usize)
    }
}

/// While it lives, nothing comes back from the pod `distant` to the client.
pub struct Cut<'g> {
    ground: &'g Ground,
    _turn: MutexGuard<'g, ()>,
}

impl Cut<'_> {
    fn route(&self, verb: &str) -> Result<()> {
        let client = self.ground.mesh.pod("client");
        let (v4, v6) = (client.v4(), client.v6());
        let distant = self.ground.mesh.pod("distant").place().netns();
        distant.ip(&format!("route {verb} blackhole {v4}/32\nroute {verb} blackhole {v6}/128\n"))
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.route("del") {
            eprintln!("mending the way: {error:#}");
        }
    }
}

impl Stage<'_> {
    pub fn path(&self) -> Path {
        self.ground.path
    }

    /// Whether an agent carries the connection.
    pub fn carried(&self) -> bool {
        matches!(self.path(), Path::Same | Path::Cross)
    }

    /// Where the kernel is to carry connections to `listener`, lets one go before, through the agent.
    pub fn warm(&self, listener: &TcpListener, to: SocketAddr) -> Result<()> {
        if self.path() != Path::Direct {
            return Ok(());
        }
        let (_, agent) = self.ground.agents.first().context("no agent")?;
        let mut first = Pair { client: self.connect(to)?, server: accept(listener)? };
        first.talk()?;
        drop(first);
        wait::until_some(format!("a verdict on {to}"), LIMIT, || {
            match direct::verdict(agent, "web/client", (to.ip(), to.port()))? {
                Verdict::Given => Ok(()),
                Verdict::Missing(because) => bail!("{because}"),
            }
        })
    }

    pub fn ip(&self, pod: &str) -> IpAddr {
        let pod = self.ground.mesh.pod(pod);
        match self.family {
            Family::V4 => pod.v4().into(),
            Family::V6 => pod.v6().into(),
        }
    }

    /// A service's virtual address.
    pub fn service(&self, name: &str) -> IpAddr {
        self.ground.mesh.service(name)[self.family as usize]
    }

    pub fn inside<T: Send>(&self, pod: &str, work: impl FnOnce() -> T + Send) -> T {
        self.ground.mesh.pod(pod).place().run(work)
    }

    fn any(&self) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    fn domain(&self) -> Domain {
        match self.family {
            Family::V4 => Domain::IPV4,
            Family::V6 => Domain::IPV6,
        }
    }

    /// A socket in a pod.
    pub fn socket_in(&self, pod: &str, kind: Type, protocol: Option<Protocol>) -> Result<Socket> {
        let domain = self.domain();
        Ok(self.inside(pod, || Socket::new(domain, kind, protocol))?)
    }

    /// A fresh TCP socket in the client's pod, with time limits.
    pub fn socket(&self) -> Result<Socket> {
        let socket = self.socket_in("client", Type::STREAM, Some(Protocol::TCP))?;
        limit(&socket)?;
        Ok(socket)
    }

    /// A listener in a pod; port 0 picks a free one.
    pub fn listen_at(&self, pod: &str, port: u16, backlog: i32) -> Result<TcpListener> {
        let socket = self.socket_in(pod, Type::STREAM, Some(Protocol::TCP))?;
        if self.family == Family::V6 {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(self.any(), port).into())?;
        socket.listen(backlog)?;
        // It bounds accept(2) as well.
        socket.set_read_timeout(Some(LIMIT))?;
        Ok(socket.into())
    }

    /// A listener in the server's pod and the address that leads to it.
    pub fn listen(&self) -> Result<(TcpListener, SocketAddr)> {
        self.listen_in("server")
    }

    pub fn listen_in(&self, pod: &str) -> Result<(TcpListener, SocketAddr)> {
        let listener = self.listen_at(pod, 0, 128)?;
        let to = SocketAddr::new(self.ip(pod), listener.local_addr()?.port());
        self.warm(&listener, to)?;
        Ok((listener, to))
    }

    /// An address of the server's pod where nobody listens.
    pub fn closed(&self) -> Result<SocketAddr> {
        let (listener, to) = self.listen()?;
        drop(listener);
        direct::closed(self.ground.mesh.pod("server").place(), to)?;
        Ok(to)
    }

    pub fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        self.connect_from("client", to)
    }

    pub fn connect_from(&self, pod: &str, to: SocketAddr) -> Result<TcpStream> {
        let socket = self.socket_in(pod, Type::STREAM, Some(Protocol::TCP))?;
        limit(&socket)?;
        socket.connect(&to.into()).with_context(|| format!("connecting to {to}"))?;
        Ok(socket.into())
    }

    /// A connection from the client to the server.
    pub fn pair(&self) -> Result<Pair> {
        self.pair_to("server")
    }

    pub fn pair_to(&self, pod: &str) -> Result<Pair> {
        let (listener, to) = self.listen_in(pod)?;
        let client = self.connect(to)?;
        Ok(Pair { client, server: accept(&listener)? })
    }

    /// Connects a prepared socket to the server.
    pub fn pair_of(&self, socket: Socket) -> Result<Pair> {
        limit(&socket)?;
        let (listener, to) = self.listen()?;
        socket.connect(&to.into()).with_context(|| format!("connecting to {to}"))?;
        Ok(Pair { client: socket.into(), server: accept(&listener)? })
    }
}

impl Pair {
    /// Sends a few bytes each way.
    pub fn talk(&mut self) -> Result<()> {
        say(&mut self.client, &mut self.server, b"question").context("from client to server")?;
        say(&mut self.server, &mut self.client, b"answer").context("from server to client")
    }

    /// Closes both ends cleanly.
    pub fn finish(mut self) -> Result<()> {
        self.client.shutdown(Shutdown::Write)?;
        expect_end(&mut self.server)?;
        self.server.shutdown(Shutdown::Write)?;
        expect_end(&mut self.client)
    }
}

/// Sends `text` from one end to the other.
pub fn say(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) -> Result<()> {
    from.write_all(text).context("writing")?;
    let mut got = vec![0; text.len()];
    to.read_exact(&mut got).context("reading")?;
    ensure!(got == text, "{text:?} became {got:?}");
    Ok(())
}

pub fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let (stream, _) = listener.accept().context("accepting")?;
    limit(&stream)?;
    Ok(stream)
}

fn limit<'s, S>(socket: &'s S) -> Result<()>
where
    SockRef<'s>: From<&'s S>,
{
    let socket = SockRef::from(socket);
    socket.set_read_timeout(Some(LIMIT))?;
    socket.set_write_timeout(Some(LIMIT))?;
    Ok(())
}

/// Expects nothing but an end of file.
pub fn expect_end(stream: &mut TcpStream) -> Result<()> {
    let mut rest = [0; 64];
    match stream.read(&mut rest) {
        Ok(0) => Ok(()),
        Ok(count) => bail!("{count} bytes instead of an end of file"),
        Err(error) => bail!("{error} instead of an end of file"),
    }
}

/// Reads to the end, which has to be a reset; gives what came before it.
pub fn read_to_reset(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut got = Vec::new();
    match stream.read_to_end(&mut got) {
        Ok(_) => bail!("a clean end of file after {} bytes instead of ECONNRESET", got.len()),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(got),
        Err(error) => bail!("{error} instead of ECONNRESET"),
    }
}

/// Expects a reset and nothing else.
pub fn expect_reset(stream: &mut TcpStream) -> Result<()> {
    let got = read_to_reset(stream)?;
    ensure!(got.is_empty(), "{} bytes before the reset", got.len());
    Ok(())
}

/// Ends a connection with a reset.
pub fn reset(stream: TcpStream) -> Result<()> {
    Ok(SockRef::from(&stream).set_linger(Some(Duration::ZERO))?)
}

/// Expects an error of this kind.
pub fn expect_error<T>(result: std::io::Result<T>, kinds: &[ErrorKind]) -> Result<()> {
    match result {
        Ok(_) => bail!("success instead of {kinds:?}"),
        Err(error) => {
            ensure!(kinds.contains(&error.kind()), "{error:?} instead of {kinds:?}");
            Ok(())
        }
    }
}

/// Expects that the agent takes a connection and does not get it any further.
pub fn expect_refusal(stage: &Stage, to: SocketAddr) -> Result<()> {
    let client = stage.socket()?;
    let connected = client.connect(&to.into());
    expect_late_refusal(client, connected)
}

/// The reset may come before `connect` has returned.
pub fn expect_late_refusal(client: Socket, connected: std::io::Result<()>) -> Result<()> {
    match connected {
        Ok(()) => expect_reset(&mut client.into()),
        refused => expect_error(refused, &[ErrorKind::ConnectionReset]),
    }
}
