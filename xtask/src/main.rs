//! Culvert's developer commands, run as `cargo xtask <command>`.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a command for a terminal")]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod shell;

mod binary;
mod setup;

mod bench;
mod check;
mod demo;
mod e2e;
mod image;
mod kind;
mod test;

/// Culvert's developer commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Setup(setup::Arguments),
    Check(check::Arguments),
    Test(test::Arguments),
    Demo(demo::Arguments),
    Bench(bench::Arguments),
    E2e(Box<e2e::Arguments>),
    Image(image::Arguments),
    Kind(kind::Arguments),
    #[command(hide = true)]
    BenchServer(bench::server::Arguments),
    #[command(hide = true)]
    BenchLoad(bench::load::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Setup(arguments) => setup::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::E2e(arguments) => e2e::run(&arguments),
        Command::Image(arguments) => image::run(&arguments),
        Command::Kind(arguments) => kind::run(&arguments),
        Command::BenchServer(arguments) => bench::server::run(&arguments),
        Command::BenchLoad(arguments) => bench::load::run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} {error:#}", shell::red("error:"));
            ExitCode::FAILURE
        }
    }
}
