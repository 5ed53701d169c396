//! A new agent takes the place of the one that runs.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::Running;
use culvert_lab::wait;

use crate::{binary, figures};

/// Long enough for an agent to take over on a loaded machine.
pub const TAKE_OVER: Duration = Duration::from_secs(60);

/// How an agent is started whose connections may go on for as long as a test takes.
pub fn patient(mesh: &Running) -> AgentOptions {
    let mut options = AgentOptions::new(&binary(), &mesh.config());
    let deadline = ("CONNECTION_TERMINATION_DEADLINE", "120s");
    options.environment.push((deadline.0.to_owned(), deadline.1.to_owned()));
    options
}

/// Starts the next agent of a node, and waits until it says that it has taken over.
pub fn upgrade(mesh: &Running, node: &str, old: &Agent, options: &AgentOptions) -> Result<Agent> {
    let mut new = mesh.start_agent(node, options)?;
    let taken = format!("taken over from pid {},", old.pid());
    wait::until_some("the take-over", TAKE_OVER, || {
        if let Some(status) = new.process().ended() {
            bail!("ended with {status}: {}", new.process().log_tail(10));
        }
        let told = figures::status(&new)?;
        match told["handover"].as_str() {
            Some(told) if told.starts_with(&taken) => Ok(()),
            told => bail!("{told:?}"),
        }
    })?;
    Ok(new)
}

/// Waits until an agent that has handed over has ended as it should.
pub fn wait_ended(agent: &mut Agent) -> Result<()> {
    let status = wait::until_some("the old agent's end", wait::SOON * 3, || {
        agent.process().ended().ok_or("it runs")
    })?;
    ensure!(status.success(), "{status}");
    Ok(())
}
