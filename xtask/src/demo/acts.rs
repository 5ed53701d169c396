//! What the demo shows, act by act.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_lab::agent::Agent;
use culvert_lab::wait;

use super::calls::{call, greet, refused};
use super::town::{DENIED, SERVICE, Town, WEB, deny};
use crate::shell::Steps;

/// An agent takes over a changed file within a second; a loaded machine may need more.
const PATIENCE: Duration = Duration::from_secs(10);

/// Calls on one node and across, and what the wire carried.
pub fn calls(steps: &Steps, town: &mut Town) -> Result<()> {
    steps.heading("Calls on one node");
    greet_every_way(steps, town, "near", "corner")?;
    steps.heading("Calls between the nodes");
    let wire = town.mesh.wire("a", "b")?;
    greet_every_way(steps, town, "server", "api")?;
    steps.step("the wire between the nodes carried only TLS on port 15008", || {
        let seen = wire.finish()?;
        ensure!(seen.only_tls() && seen.dropped == 0 && seen.unchecked_bytes == 0, "{seen}");
        Ok(seen.to_string())
    })?;
    steps.step("the server's side knows who called", || {
        let line = log_line(
            town.agent("b")?,
            &["src.identity=\"spiffe://cluster.local/ns/web/sa/client\"", "direction=\"inbound\""],
        )?;
        let word = line.split_whitespace().find(|word| word.starts_with("src.identity="));
        Ok(word.unwrap_or_default().to_owned())
    })
}

fn greet_every_way(steps: &Steps, town: &Town, pod: &str, service: &str) -> Result<()> {
    let pods = town.mesh.pod(pod).addresses().map(|ip| ("pod", SocketAddr::new(ip, WEB)));
    let services = town.mesh.service(service).map(|ip| ("service", SocketAddr::new(ip, SERVICE)));
    for (kind, to) in pods.into_iter().chain(services) {
        let family = if to.is_ipv4() { "IPv4" } else { "IPv6" };
        let name = format!("client calls {pod} by {kind} address, {family} {to}");
        steps.step(&name, || greet(town, "client", to, pod))?;
    }
    Ok(())
}

/// A denied client, and a policy that closes a connection in use.
pub fn policy(steps: &Steps, town: &mut Town) -> Result<()> {
    steps.heading("Policy");
    let server = SocketAddr::new(town.mesh.pod("server").v4().into(), WEB);
    steps.step("intruder is refused", || refused(town, "intruder", server))?;
    steps.step("the log names the policy", || {
        let reason = format!("explicitly denied by: shop/{DENIED}");
        let line = log_line(town.agent("b")?, &[&reason, "inbound"])?;
        let at = line.find("error=").unwrap_or_default();
        Ok(line.get(at..).unwrap_or_default().to_owned())
    })?;
    steps.step("culvert explain names it beforehand", || {
        let question = ["explain", "web/intruder", &server.to_string()];
        let said = town.agent("b")?.cli(&question)?;
        let line = said.lines().find(|line| line.contains(DENIED));
        let line = line.with_context(|| format!("it says nothing of {DENIED}:\n{said}"))?;
        Ok(line.split_whitespace().collect::<Vec<_>>().join(" "))
    })?;
    let mut open = None;
    steps.step("client holds a connection open", || {
        open = Some(hold(town, "client", server)?);
        Ok("one request answered on it".to_owned())
    })?;
    let mut open = open.context("no connection")?;
    steps.step("a new policy against client closes it", || {
        town.mesh.change(|mesh| mesh.policies.push(deny("no-client", "client")))?;
        let start = Instant::now();
        let how = ending(&mut open)?;
        Ok(format!("{how} after {:.0} ms", start.elapsed().as_secs_f64() * 1e3))
    })?;
    steps.step("client is refused from then on", || refused(town, "client", server))?;
    steps.step("without that policy it is served again", || {
        town.mesh.change(|mesh| mesh.policies.retain(|policy| policy.name != "no-client"))?;
        wait::until_some("client to be served", PATIENCE, || {
            greet(town, "client", server, "server")
        })
    })
}

/// Opens a connection and has one request answered on it.
fn hold(town: &Town, from: &str, to: SocketAddr) -> Result<TcpStream> {
    let stream = town.mesh.pod(from).place().run(|| TcpStream::connect(to));
    let mut stream = stream.with_context(|| format!("connecting to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: demo\r\n\r\n")?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") || !answer.windows(5).any(|part| part == b"hello") {
        let mut buffer = [0; 4096];
        let got = stream.read(&mut buffer).context("reading the answer")?;
        ensure!(got > 0, "closed before the answer was whole");
        answer.extend_from_slice(buffer.get(..got).unwrap_or_default());
    }
    Ok(stream)
}

/// Waits for the end of a connection and tells how it came.
fn ending(stream: &mut TcpStream) -> Result<&'static str> {
    let mut buffer = [0; 16];
    match stream.read(&mut buffer) {
        Ok(0) => Ok("closed"),
        Ok(_) => bail!("more was said on it"),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok("reset"),
        Err(error) => Err(error).context("it stayed open"),
    }
}

/// A service whose requests pass a waypoint.
pub fn waypoint(steps: &Steps, town: &mut Town) -> Result<()> {
    steps.heading("A waypoint");
    for address in town.mesh.service("site") {
        let to = SocketAddr::new(address, SERVICE);
        steps.step(&format!("client calls site at {to}"), || {
            let response = call(town, "client", to)?;
            ensure!(response.status == 200, "status {}", response.status);
            let header =
                response.header("x-waypoint").context("the waypoint's header is missing")?;
            Ok(format!("200, x-waypoint: {header}, {}", response.body.trim()))
        })?;
    }
    // Envoy keeps its connection for later requests, so that it is in no log yet.
    steps.step("the server's side knows that the waypoint called", || {
        let identity = "spiffe://cluster.local/ns/shop/sa/waypoint";
        let agent = town.agent("b")?;
        wait::until_some("the waypoint among the open connections", PATIENCE, || {
            let open = agent.cli(&["connections", "-o", "json"])?;
            ensure!(open.contains(identity), "only these: {open}");
            Ok(identity.to_owned())
        })
    })
}

/// An agent that dies.
pub fn outage(steps: &Steps, town: &mut Town) -> Result<()> {
    steps.heading("A killed agent");
    let addresses: [IpAddr; 2] = town.mesh.pod("server").addresses();
    let wire = town.mesh.wire("a", "b")?;
    steps.step("kill -9 of the agent of node a", || {
        let agent = town.agent("a")?.process();
        agent.kill().map(|status| status.to_string())
    })?;
    for address in addresses {
        let to = SocketAddr::new(address, WEB);
        let name = format!("client's call to {to} is refused, not sent in clear");
        steps.step(&name, || refused(town, "client", to))?;
    }
    steps.step("nothing readable was on the wire meanwhile", || {
        let seen = wire.finish()?;
        let attempts = seen.attempts.get(&WEB).copied().unwrap_or_default();
        ensure!(seen.clear.is_empty() && attempts == 0 && seen.dropped == 0, "{seen}");
        Ok(format!("{} packets, none to port {WEB}", seen.packets))
    })?;
    steps.step("a new agent takes over", || town.start_agent("a"))?;
    for address in addresses {
        let to = SocketAddr::new(address, WEB);
        steps.step(&format!("client calls {to} again"), || {
            wait::until_some("an answer", PATIENCE, || greet(town, "client", to, "server"))
        })?;
    }
    Ok(())
}

/// Waits for a log line that contains every one of `parts`.
fn log_line(agent: &Agent, parts: &[&str]) -> Result<String> {
    let what = format!("a log line with {}", parts.join(" and "));
    wait::until_some(what, PATIENCE, || {
        let log = agent.log();
        let found = log.lines().rev().find(|line| parts.iter().all(|part| line.contains(part)));
        found.map(str::to_owned).ok_or("there is none")
    })
}
