//! The mesh of the demo with its applications.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_lab::agent::Agent;
use culvert_lab::lab::Attach;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec, TRUST_DOMAIN};
use culvert_lab::pki::Authority;
use culvert_lab::process::Process;
use culvert_lab::wait;
use culvert_lab::waypoint::{self, Passage};

use crate::shell::{self, Steps};

/// Where nginx listens in its pods.
pub const WEB: u16 = 8080;
/// Where iperf3 listens.
pub const IPERF: u16 = 5201;
/// Where the benchmark's server listens.
pub const PING: u16 = 7000;
/// The port of every service.
pub const SERVICE: u16 = 80;

/// Everything that runs.
pub struct Town {
    pub agents: Vec<Agent>,
    applications: Vec<Process>,
    binary: PathBuf,
    pub mesh: Running,
}

impl Town {
    /// Makes the namespaces and starts applications, waypoint and agents.
    pub fn build(steps: &Steps, binary: &Path, keep: bool) -> Result<Self> {
        steps.heading("Two nodes on this machine");
        let mut built = None;
        steps.step("nodes, pods and the wires between them", || {
            let mesh = describe().attach(if keep { Attach::Machine } else { Attach::Process });
            let mesh = mesh.start()?;
            let authority = Authority::create(&mesh.ca(), TRUST_DOMAIN)?;
            built = Some((mesh, authority));
            Ok("node a: client, near, intruder; node b: server, gate".to_owned())
        })?;
        let (mesh, authority) = built.context("no mesh")?;
        let (agents, applications) = (Vec::new(), Vec::new());
        let mut town = Self { agents, applications, binary: binary.to_owned(), mesh };
        steps.step("applications", || town.start_applications())?;
        steps.step("a waypoint", || town.start_waypoint(&authority))?;
        for node in ["a", "b"] {
            steps.step(&format!("the agent of node {node}"), || town.start_agent(node))?;
        }
        Ok(town)
    }

    fn start_applications(&mut self) -> Result<String> {
        let own = std::env::current_exe().context("finding this program")?;
        for pod in ["near", "server", "plain-near", "plain-server"] {
            let place = self.mesh.pod(pod).place().clone();
            let config = self.nginx(pod)?;
            let mut nginx = place.command(program("nginx")?)?;
            nginx.arg("-c").arg(&config).arg("-p").arg(config.parent().unwrap_or(&config));
            self.applications.push(place.start(&format!("nginx-{pod}"), &mut nginx)?);
            let mut iperf = place.command(program("iperf3")?)?;
            iperf.args(["-s", "-p", &IPERF.to_string()]);
            self.applications.push(place.start(&format!("iperf3-{pod}"), &mut iperf)?);
            let mut ping = place.command(&own)?;
            ping.args(["bench-server", "--port", &PING.to_string()]);
            self.applications.push(place.start(&format!("ping-{pod}"), &mut ping)?);
        }
        // The wait is of the pods' own loopback, which nothing captures.
        for pod in ["near", "server", "plain-near", "plain-server"] {
            for port in [WEB, IPERF, PING] {
                let place = self.mesh.pod(pod).place();
                let open = || place.run(|| std::net::TcpStream::connect(("127.0.0.1", port)));
                let what = format!("port {port} of {pod}");
                wait::until_some(what, Duration::from_secs(10), open)?;
            }
        }
        Ok("nginx and iperf3 in near and server".to_owned())
    }

    /// Writes a configuration that says hello to every request, from any address.
    fn nginx(&self, pod: &str) -> Result<PathBuf> {
        let home = self.mesh.lab().state().join(format!("nginx-{pod}"));
        fs::create_dir_all(&home).context("making a folder for nginx")?;
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let temporary = temporary.map(|kind| format!("{kind}_temp_path {kind};")).join(" ");
        let text = format!(
            "daemon off; user root; worker_processes 1; pid nginx.pid; error_log stderr;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log access.log; {temporary} keepalive_timeout 600;\n\
             server {{ listen {WEB}; listen [::]:{WEB} ipv6only=on; default_type text/plain;\n\
             location / {{ return 200 \"hello from {pod} to $remote_addr\\n\"; }} }} }}\n"
        );
        let config = home.join("nginx.conf");
        fs::write(&config, text).context("writing nginx's configuration")?;
        Ok(config)
    }

    fn start_waypoint(&mut self, authority: &Authority) -> Result<String> {
        let envoy = waypoint::find_envoy(&shell::target())?;
        let passage = Passage {
            service: "site".to_owned(),
            port: SERVICE,
            pod: "server".to_owned(),
            target: WEB,
        };
        self.applications.push(waypoint::start(&self.mesh, authority, "gate", &envoy, &[passage])?);
        Ok(format!("Envoy {} in gate, with a certificate of the mesh", waypoint::ENVOY_VERSION))
    }

    /// Starts the agent of a node, in the place of one that ended.
    pub fn start_agent(&mut self, node: &str) -> Result<String> {
        let agent = self.mesh.agent(node, &self.binary)?;
        let pid = agent.pid();
        let index = usize::from(node == "b");
        match self.agents.get_mut(index) {
            Some(old) => *old = agent,
            None => self.agents.push(agent),
        }
        Ok(format!("ready, process {pid}"))
    }

    /// The agent of a node.
    pub fn agent(&mut self, node: &str) -> Result<&mut Agent> {
        let index = usize::from(node == "b");
        self.agents.get_mut(index).with_context(|| format!("no agent on node {node}"))
    }

    /// How the logs of the agents and the waypoint end.
    pub fn log_excerpt(&self) -> String {
        let logs = self.mesh.lab().logs();
        let names = ["agent-a", "agent-b", "waypoint-gate"];
        let tails = names.map(|name| {
            let text = fs::read_to_string(logs.join(format!("{name}.log"))).unwrap_or_default();
            format!("{}\n{}", shell::bold(name), shell::last_lines(&text, 15))
        });
        tails.join("\n")
    }

    /// Leaves everything running.
    pub fn keep(&mut self) -> Result<()> {
        for agent in &mut self.agents {
            agent.process().leave_running();
        }
        for process in &mut self.applications {
            process.leave_running();
        }
        self.mesh.lab_mut().keep()
    }

    /// Commands for those who want to see more.
    pub fn tell_how_to_look_further(&self) {
        let name = |what: &str| format!("ip netns exec {}-{what}", self.mesh.lab().name());
        let (node_a, node_b, client) = (name("a"), name("b"), name("client"));
        let culvert = self.binary.display();
        let server = self.mesh.pod("server").v4();
        let site = self.mesh.service("site")[0];
        let config = self.mesh.config();
        let logs = self.mesh.lab().logs();
        println!("\n{}", shell::bold("How to look further"));
        println!(
            "  the agents      {node_a} {culvert} status   (also: pods, workloads, connections)"
        );
        println!("  a question      {node_a} {culvert} explain web/intruder {server}:{WEB}");
        println!("  a call          {client} curl -i http://{server}:{WEB}/");
        println!("  by the waypoint {client} curl -i http://{site}/");
        println!("  metrics         {node_b} curl http://127.0.0.1:15020/metrics");
        println!("  logs            tail -f {}/agent-b.log", logs.display());
        println!("  policies        edit {}", config.display());
        println!("  programs        bpftool prog show; bpftool map show; bpftool cgroup tree");
        println!("  one map         bpftool map dump name cv_pods");
        println!("  the end         cargo xtask demo --stop");
    }
}

/// The policy that shuts one client out.
pub const DENIED: &str = "no-intruder";

fn describe() -> Mesh {
    let waypoint = ServiceSpec::new("waypoint", "shop").port(15008, 15008).endpoint("gate");
    let behind = waypoint.key();
    Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("intruder", "web", "intruder")
        .pod("near", "shop", "near")
        .pod_with(PodSpec::unknown("plain-client"))
        .pod_with(PodSpec::unknown("plain-near"))
        .node("b")
        .pod("server", "shop", "server")
        .pod_with(PodSpec::waypoint("gate", "shop", "waypoint"))
        .pod_with(PodSpec::unknown("plain-server"))
        .service(ServiceSpec::new("corner", "shop").port(SERVICE, WEB).endpoint("near"))
        .service(ServiceSpec::new("api", "shop").port(SERVICE, WEB).endpoint("server"))
        .service(
            ServiceSpec::new("site", "shop").port(SERVICE, WEB).endpoint("server").behind(&behind),
        )
        .service(waypoint)
        .policy(deny(DENIED, "intruder"))
}

/// A policy that denies one service account of `web` everything in `shop`.
pub fn deny(name: &str, account: &str) -> PolicySpec {
    let principal = format!("{TRUST_DOMAIN}/ns/web/sa/{account}");
    PolicySpec::deny(name, "shop", vec![vec![vec![Match::any().principal(&principal)]]])
}

fn program(name: &str) -> Result<PathBuf> {
    shell::find(name).with_context(|| format!("{name} is not installed"))
}
