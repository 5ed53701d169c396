//! The `culvert` command: one binary for the agent and for looking at it.

use std::process::ExitCode;

use culvert_agent::{cli, memory};

fn main() -> ExitCode {
    memory::give_back();
    let task = match cli::task() {
        Ok(task) => task,
        Err(code) => return code,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Connections have threads of their own. Here are two, so that a task that computes for long
        // does not hold up names and probes.
        .worker_threads(2)
        .thread_name("culvert")
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(task.execute()),
        Err(error) => cli::fail(&error),
    }
}
