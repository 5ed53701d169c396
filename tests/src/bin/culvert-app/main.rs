//! The application that stands in for everybody's in `cargo xtask e2e`: a server with many ports,
//! a caller, and a load that keeps count of what it lost.
//!
//! A pod runs `culvert-app serve`. Everything else is started beside it with `kubectl exec`, takes
//! JSON as its argument and prints JSON.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "what it prints is its answer")]

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

mod kind;
mod place;

mod serve;

mod call;
mod control;
mod load;
mod names;
mod process;

#[derive(Debug, Parser)]
#[command(name = "culvert-app", version, about = "The application of Culvert's cluster scenarios")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve on all ports until told to stop
    Serve(serve::Arguments),
    /// Do nothing until told to stop
    Wait,
    /// Make the calls of a JSON list, and print what became of each
    Call { calls: String },
    /// Start, read or stop a load that the server of this pod runs
    Load { order: String },
    /// Send a signal to the processes of this name (with the host's processes in view)
    Kill { name: String, signal: i32 },
}

fn main() -> ExitCode {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done = runtime.context("starting").and_then(|runtime| runtime.block_on(run()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    match Arguments::parse().command {
        Command::Serve(arguments) => serve::run(arguments).await,
        Command::Wait => serve::told_to_stop().await,
        Command::Call { calls } => {
            println!("{}", call::all(&calls).await?);
            Ok(())
        }
        Command::Load { order } => {
            println!("{}", control::order(&order).await?);
            Ok(())
        }
        Command::Kill { name, signal } => {
            println!("{}", process::kill(&name, signal)?);
            Ok(())
        }
    }
}
