//! Arguments, help, and what becomes of them.

use std::ffi::OsString;
use std::path::Path;

use clap::{CommandFactory, Parser};

use crate::cli::arguments::{Arguments, Command, Format};
use crate::cli::{What, prepare};

fn parse(line: &str) -> Result<Command, clap::Error> {
    let words = std::iter::once("culvert").chain(line.split(' ').filter(|word| !word.is_empty()));
    Arguments::try_parse_from(words).map(|arguments| arguments.command)
}

fn environment(variables: &[(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
    let variables: Vec<(String, OsString)> =
        variables.iter().map(|(name, value)| ((*name).to_owned(), value.into())).collect();
    move |wanted| variables.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone())
}

#[test]
fn definition_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn every_subcommand_is_there_with_help_and_examples() {
    let mut root = Arguments::command();
    root.build();
    let names: Vec<&str> = root.get_subcommands().map(|it| it.get_name()).collect();
    assert_eq!(
        names,
        [
            "run",
            "status",
            "pods",
            "workloads",
            "services",
            "policies",
            "certificates",
            "connections",
            "explain",
            "detach",
            "doctor",
            "logging",
            "help"
        ]
    );
    for command in root.get_subcommands_mut().filter(|it| it.get_name() != "help") {
        assert!(command.get_about().is_some());
        for help in [command.render_help().to_string(), command.render_long_help().to_string()] {
            assert!(help.contains("Examples:\n  culvert "), "{help}");
            assert!(help.contains("Usage: culvert "), "{help}");
        }
    }
}

#[test]
fn run_names_flags_variables_and_defaults() {
    let mut root = Arguments::command();
    let run = root.find_subcommand_mut("run").unwrap();
    let help = run.render_long_help().to_string();
    for expected in [
        "--config <FILE>",
        "LOCAL_XDS_PATH",
        "--node <NAME>",
        "NODE_NAME",
        "--state-dir <DIR>",
        "/var/lib/culvert",
        "--pin-path <DIR>",
        "--cgroup <DIR>",
        "--admin <ADDR>",
        "--stats <ADDR>",
        "--readiness <ADDR>",
        "--log <DIRECTIVES>",
        "--log-format <FORMAT>",
        "CULVERT_WORKER_THREADS",
    ] {
        assert!(help.contains(expected), "no {expected} in {help}");
    }
}

#[test]
fn run_reads_flags_and_environment() {
    let command = parse("run --config /m.yaml --cgroup /cg --admin 127.0.0.1:0").unwrap();
    let task =
        prepare(command, &environment(&[("NODE_NAME", "a"), ("CULVERT_WORKER_THREADS", "3")]), &[]);
    let task = task.unwrap();
    let What::Run(config) = task.0 else { panic!("another task") };
    assert_eq!(config.worker_threads.get(), 3);
    assert_eq!(&*config.node, "a");
    assert_eq!(config.servers.admin.port(), 0);

    let Err(error) = prepare(parse("run --node a").unwrap(), &environment(&[]), &[]) else {
        panic!("a task without a file")
    };
    assert!(
        error.to_string().starts_with("CULVERT_CONFIG, --config or XDS_ADDRESS is missing"),
        "{error}"
    );
}

#[test]
fn istios_chart_starts_the_agent_too() {
    assert!(matches!(parse("proxy ztunnel"), Ok(Command::Run(_))));
    assert!(parse("proxy sidecar").is_err());
}

#[test]
fn detach_needs_nothing_but_pins() {
    let path = |line: &str, variables: &[(&str, &str)]| match prepare(
        parse(line).unwrap(),
        &environment(variables),
        &[],
    )
    .unwrap()
    .0
    {
        What::Detach(path) => path.display().to_string(),
        What::Run(_) | What::Look(..) | What::Examine { .. } | What::Try(_) => {
            panic!("another task")
        }
    };
    assert_eq!(path("detach", &[]), "/sys/fs/bpf/culvert");
    assert_eq!(path("detach", &[("CULVERT_PIN_PATH", "/sys/fs/bpf/b")]), "/sys/fs/bpf/b");
    assert_eq!(path("detach --pin-path /c", &[("CULVERT_PIN_PATH", "/sys/fs/bpf/b")]), "/c");
}

#[test]
fn doctor_tries_where_an_agent_would_attach() {
    let variables = [("CULVERT_CGROUP", "/host/cgroup"), ("CULVERT_PIN_PATH", "/sys/fs/bpf/b")];
    let task = |line: &str| prepare(parse(line).unwrap(), &environment(&variables), &[]).unwrap().0;
    let What::Examine { cgroup, pin_path, format } = task("doctor -o json") else {
        panic!("another task")
    };
    assert_eq!(
        (cgroup.as_path(), pin_path.as_path()),
        ("/host/cgroup".as_ref(), "/sys/fs/bpf/b".as_ref())
    );
    assert_eq!(format, Format::Json);
    let What::Examine { cgroup, .. } = task("doctor --cgroup /c") else { panic!("another task") };
    assert_eq!(cgroup.as_path(), Path::new("/c"));
}

#[test]
fn explain_asks_with_both_ends_encoded() {
    let Command::Explain(ask) = parse("explain demo//Pod/web/front-1 [fd00::1]:80").unwrap() else {
        panic!("another command")
    };
    assert_eq!(
        ask.path_and_query(),
        "/culvert/explain?src=demo%2F%2FPod%2Fweb%2Ffront-1&dst=%5Bfd00%3A%3A1%5D%3A80"
    );
    let error = parse("explain web/front-1 10.96.0.10").unwrap_err().to_string();
    assert!(error.contains("a port is needed"), "{error}");
}

#[test]
fn logging_asks_for_level_and_reset() {
    let query = |line: &str| match parse(line).unwrap() {
        Command::Logging(ask) => ask.query(),
        other => panic!("{other:?}"),
    };
    assert_eq!(query("logging"), "");
    assert_eq!(query("logging access=debug"), "level=access%3Ddebug");
    assert_eq!(query("logging --reset"), "reset");
    assert_eq!(query("logging info --reset"), "level=info&reset");
}

#[test]
fn every_list_takes_output_and_admin() {
    for name in
        ["status", "pods", "workloads", "services", "policies", "certificates", "connections"]
    {
        parse(&format!("{name} -o json --admin 127.0.0.1:1")).unwrap();
        parse(&format!("{name} --output table")).unwrap();
        assert!(parse(&format!("{name} -o yaml")).is_err());
    }
}

#[test]
fn admin_address_that_cannot_be_is_named() {
    let look = |line: &str, variables: &[(&str, &str)]| {
        prepare(parse(line).unwrap(), &environment(variables), &[]).map(|_| ())
    };
    let error = look("status --admin nowhere", &[]).unwrap_err().to_string();
    assert!(error.starts_with("--admin: \"nowhere\""), "{error}");
    let error = look("status", &[("ADMIN_ADDR", "15000")]).unwrap_err().to_string();
    assert!(error.starts_with("ADMIN_ADDR: \"15000\""), "{error}");
    look("status", &[("ADMIN_ADDR", "localhost:15000")]).unwrap();
}
