//! The command line: the only reader of arguments and environment.

mod answers;
mod arguments;
mod client;
mod connections;
mod detach;
mod doctor;
mod dump;
mod explain;
mod lists;
mod output;
mod status;
mod table;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Parser;

use crate::config::{Config, ConfigError, Surroundings, find_cgroup2};
use crate::doctor::DoctorError;
use crate::{app, capture};
use arguments::{Arguments, Command, DoctorFlags, Format};
use client::{ClientError, Server};
use dump::Dump;
use output::Output;

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the answer to {path} is not what this version of culvert understands: {source}")]
    Answer { path: &'static str, source: serde_json::Error },
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    #[error("{0:#}")]
    Agent(anyhow::Error),
    #[error("cannot detach: {0}")]
    Detach(capture::CaptureError),
    #[error(transparent)]
    Doctor(#[from] DoctorError),
}

/// A command with its settings, ready to be executed on a runtime.
pub struct Task(What);

enum What {
    Run(Box<Config>),
    Look(Box<Command>, Server),
    Detach(PathBuf),
    Examine { cgroup: PathBuf, pin_path: PathBuf, format: Format },
    Try(String),
}

/// The task that arguments and environment ask for. Wrong ones are told on standard error, and
/// help and version on standard output; the exit code then stands for all that is left to do.
pub fn task() -> Result<Task, ExitCode> {
    let arguments = Arguments::try_parse().map_err(|told| {
        // Nothing is left to tell when the terminal is gone.
        let _ = told.print();
        ExitCode::from(u8::try_from(told.exit_code()).unwrap_or(1))
    })?;
    let names: Vec<_> = std::env::vars_os().map(|(name, _)| name).collect();
    prepare(arguments.command, &|name| std::env::var_os(name), &names).map_err(|error| fail(&error))
}

fn prepare(
    command: Command,
    variable: &dyn Fn(&str) -> Option<OsString>,
    variables: &[OsString],
) -> Result<Task, CliError> {
    let what = match command {
        Command::Run(run) => {
            let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            let around = Surroundings {
                variable,
                variables,
                processors: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
                cgroup2: find_cgroup2(&mountinfo),
            };
            What::Run(Box::new(Config::new(run.flags(), &around)?))
        }
        Command::Detach(detach) => What::Detach(detach.pin_path(variable)),
        Command::Doctor(DoctorFlags { place: Some(place), .. }) => What::Try(place),
        Command::Doctor(flags) => {
            let cgroup = flags.cgroup(variable).or_else(capture::find_cgroup);
            let cgroup = cgroup.ok_or(ConfigError::Missing {
                setting: "CULVERT_CGROUP or --cgroup",
                what: "no cgroup2 file system is mounted; mount one, or name the directory",
            })?;
            What::Examine { cgroup, pin_path: flags.pin_path(variable), format: flags.output }
        }
        look => {
            let server = Server::new(look.admin().and_then(|admin| admin.admin.clone()), variable)?;
            What::Look(Box::new(look), server)
        }
    };
    Ok(Task(what))
}

/// Tells on standard error what went wrong.
pub fn fail(error: &dyn fmt::Display) -> ExitCode {
    output::tell_error(error);
    ExitCode::FAILURE
}

impl Task {
    pub async fn execute(self) -> ExitCode {
        let mut output = Output::standard();
        let done = match self.0 {
            What::Run(config) => app::run(*config).await.map_err(CliError::Agent),
            What::Look(command, server) => look(*command, &server, &mut output).await,
            What::Detach(pin_path) => match capture::detach(&pin_path) {
                Ok(report) => {
                    crate::doctor::sweep(None, &pin_path);
                    output.text(&detach::text(&pin_path, &report)).map_err(CliError::Output)
                }
                Err(error) => Err(CliError::Detach(error)),
            },
            What::Examine { cgroup, pin_path, format } => {
                examine(&cgroup, &pin_path, format, &mut output).await
            }
            What::Try(place) => answer(place, &mut output).await,
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            // A reader that has seen enough, as `head`.
            Err(CliError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                ExitCode::SUCCESS
            }
            Err(error) => fail(&error),
        }
    }
}

async fn examine(
    cgroup: &Path,
    pin_path: &Path,
    format: Format,
    output: &mut Output,
) -> Result<(), CliError> {
    let report = crate::doctor::examine(cgroup, pin_path).await?;
    match format {
        Format::Json => output.json(&doctor::json(&report)?)?,
        Format::Table => output.text(&doctor::text(&report))?,
    }
    Ok(())
}

/// The process that tries: what it found out goes to the one that started it.
async fn answer(place: String, output: &mut Output) -> Result<(), CliError> {
    let tried = tokio::task::spawn_blocking(move || crate::doctor::answer(&place)).await;
    let report = tried.map_err(|error| CliError::Agent(error.into()))??;
    Ok(output.json(&serde_json::to_value(&report).map_err(DoctorError::Answer)?)?)
}

async fn look(command: Command, server: &Server, output: &mut Output) -> Result<(), CliError> {
    match command {
        Command::Status(list) => {
            let answer = server.get_json("/culvert/status").await?;
            match list.format() {
                Format::Json => output.json(&answer)?,
                Format::Table => {
                    output.text(&status::text(&understood("/culvert/status", answer)?))?;
                }
            }
        }
        Command::Pods(list) => {
            let answer = server.get_json("/culvert/pods").await?;
            match list.format() {
                Format::Json => output.json(&answer)?,
                Format::Table => {
                    output.table(&lists::pods(&understood::<Vec<_>>("/culvert/pods", answer)?))?;
                }
            }
        }
        Command::Connections(list) => {
            let answer = server.get_json("/culvert/connections").await?;
            match list.list.format() {
                Format::Json => output.json(&answer)?,
                Format::Table => {
                    let names = match list.raw {
                        true => connections::Names::default(),
                        false => connections::Names::of(&dump(server).await?),
                    };
                    let connections = understood("/culvert/connections", answer)?;
                    output.table(&connections::table(connections, &names))?;
                }
            }
        }
        Command::Workloads(list) => {
            let dump = dump(server).await?.of_namespace(list.namespace.as_deref());
            match list.list.format() {
                Format::Json => output.json(&dump.raw_workloads())?,
                Format::Table => output.table(&lists::workloads(&dump))?,
            }
        }
        Command::Services(list) => {
            let dump = dump(server).await?.of_namespace(list.namespace.as_deref());
            match list.list.format() {
                Format::Json => output.json(&dump.raw_services())?,
                Format::Table => output.table(&lists::services(&dump))?,
            }
        }
        Command::Policies(list) => {
            let dump = dump(server).await?.of_namespace(list.namespace.as_deref());
            match list.list.format() {
                Format::Json => output.json(&dump.raw_policies())?,
                Format::Table => output.table(&lists::policies(&dump))?,
            }
        }
        Command::Certificates(list) => {
            let dump = dump(server).await?;
            match list.format() {
                Format::Json => output.json(&dump.raw_certificates())?,
                Format::Table => output.table(&lists::certificates(&dump, SystemTime::now()))?,
            }
        }
        Command::Explain(ask) => {
            let answer = server.get_json(&ask.path_and_query()).await?;
            match ask.list.format() {
                Format::Json => output.json(&answer)?,
                Format::Table => {
                    output.text(&explain::text(&understood("/culvert/explain", answer)?))?;
                }
            }
        }
        Command::Logging(ask) => {
            output.text(&server.post("/logging", &ask.query()).await?)?;
        }
        // `prepare` makes other tasks of these.
        Command::Run(_) | Command::Detach(_) | Command::Doctor(_) => {}
    }
    Ok(())
}

async fn dump(server: &Server) -> Result<Dump, CliError> {
    let answer = server.get_json("/config_dump").await?;
    Dump::read(answer).map_err(|source| CliError::Answer { path: "/config_dump", source })
}

fn understood<T: serde::de::DeserializeOwned>(
    path: &'static str,
    answer: serde_json::Value,
) -> Result<T, CliError> {
    serde_json::from_value(answer).map_err(|source| CliError::Answer { path, source })
}

#[cfg(test)]
mod tests;
