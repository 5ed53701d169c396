#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{
    Config, ConfigError, Flags, LogFormat, Redirect, Roots, SameNodePath, StatedMesh, Surroundings,
    Token, find_cgroup2,
};

mod plane;

const NEEDED: [(&str, &str); 2] = [("CULVERT_CONFIG", "/etc/mesh.yaml"), ("NODE_NAME", "node-a")];

fn read(flags: Flags, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let variables: HashMap<&str, &str> = variables.iter().copied().collect();
    let variable = |name: &str| variables.get(name).map(OsString::from);
    let names: Vec<OsString> = variables.keys().map(OsString::from).collect();
    Config::new(
        flags,
        &Surroundings {
            variable: &variable,
            variables: &names,
            processors: NonZeroUsize::new(8).unwrap(),
            cgroup2: Some("/sys/fs/cgroup".into()),
        },
    )
}

/// The settings with what is needed and these variables.
fn with(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    read(Flags::default(), &[&NEEDED, variables].concat())
}

/// Every one of `names` stands in the error.
fn refused(variables: &[(&str, &str)], names: &[&str]) {
    let error = with(variables).expect_err(&format!("{variables:?}")).to_string();
    for name in names {
        assert!(error.contains(name), "{variables:?}: {error}");
    }
}

#[test]
fn bare_minimum_has_ztunnels_defaults() {
    let config = with(&[]).unwrap();
    assert_eq!(config.file.as_deref(), Some(Path::new("/etc/mesh.yaml")));
    assert_eq!(&*config.node, "node-a");
    assert_eq!(config.state_dir, Path::new("/var/lib/culvert"));
    assert_eq!(config.pin_path, Path::new("/sys/fs/bpf/culvert"));
    assert_eq!(config.cgroup, Path::new("/sys/fs/cgroup"));
    assert_eq!(config.servers.admin.to_string(), "127.0.0.1:15000");
    assert_eq!(config.servers.stats.to_string(), "[::]:15020");
    assert_eq!(config.servers.readiness.to_string(), "[::]:15021");
    assert_eq!(config.log.directives, "info");
    assert_eq!(config.log.format, LogFormat::Plain);
    assert_eq!(config.worker_threads.get(), 8);
    assert_eq!(config.drain_deadline, Duration::from_secs(5));
    let keepalive = config.keepalive.unwrap();
    assert_eq!((keepalive.time.as_secs(), keepalive.interval.as_secs()), (180, 180));
    assert_eq!(keepalive.retries, 9);
    assert!(!config.user_timeout);
    assert_eq!(config.http2.stream_window, 512 << 10);
    assert_eq!(config.http2.connection_window, 64 << 20);
    assert_eq!(config.http2.frame_size, 1 << 20);
    assert_eq!(config.pool.streams_per_connection, 100);
    assert_eq!(config.pool.release_unused_after, Duration::from_secs(300));
    assert!(!config.log_policy_decisions);
    assert!(config.response_baggage);
    assert_eq!(&*config.istio_version, "unknown");
}

#[test]
fn flags_win_over_variables() {
    let flags = Flags {
        config: Some("/flag.yaml".into()),
        node: Some("node-b".into()),
        admin: Some("localhost:1".into()),
        log: Some("debug".into()),
        ..Flags::default()
    };
    let variables = [&NEEDED[..], &[("ADMIN_ADDR", "127.0.0.1:2"), ("RUST_LOG", "warn")]].concat();
    let config = read(flags, &variables).unwrap();
    assert_eq!(config.file.as_deref(), Some(Path::new("/flag.yaml")));
    assert_eq!(&*config.node, "node-b");
    assert_eq!(config.servers.admin.to_string(), "127.0.0.1:1");
    assert_eq!(config.log.directives, "debug");
}

#[test]
fn missing_settings_are_named() {
    let missing = |variables: &[(&str, &str)]| read(Flags::default(), variables).unwrap_err();
    assert!(missing(&NEEDED[..1]).to_string().starts_with("NODE_NAME or --node is missing"));
    assert!(
        missing(&NEEDED[1..])
            .to_string()
            .starts_with("CULVERT_CONFIG, --config or XDS_ADDRESS is missing")
    );
    let none = |_: &str| None;
    let flags = Flags { config: Some("/a".into()), node: Some("n".into()), ..Flags::default() };
    let around = Surroundings {
        variable: &none,
        variables: &[],
        processors: NonZeroUsize::MIN,
        cgroup2: None,
    };
    let error = Config::new(flags, &around).unwrap_err().to_string();
    assert!(error.starts_with("CULVERT_CGROUP or --cgroup is missing"), "{error}");
}

#[test]
fn ztunnels_file_variable_is_taken_and_must_agree() {
    let node = NEEDED[1];
    let config = read(Flags::default(), &[node, ("LOCAL_XDS_PATH", "/l.yaml")]).unwrap();
    assert_eq!(config.file.as_deref(), Some(Path::new("/l.yaml")));
    with(&[("LOCAL_XDS_PATH", "/etc/mesh.yaml")]).unwrap();
    refused(&[("LOCAL_XDS_PATH", "/l.yaml")], &["CULVERT_CONFIG", "LOCAL_XDS_PATH"]);
}

#[test]
fn what_would_silently_not_hold_is_refused() {
    for name in ["LOCAL_XDS", "FAKE_CA", "UNSTABLE_ENABLE_SOCKS5", "PROXY_MODE"] {
        refused(&[(name, "x")], &[name, "is not supported"]);
        with(&[(name, "")]).unwrap();
    }
    with(&[("PROXY_MODE", "shared")]).unwrap();
}

#[test]
fn each_malformed_variable_is_named_with_its_value() {
    for (name, value) in [
        ("ADMIN_ADDR", "15000"),
        ("STATS_ADDR", "host:15020"),
        ("READINESS_ADDR", "[::]:70000"),
        ("RUST_LOG", "info=loud"),
        ("LOG_FORMAT", "xml"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30s"),
        ("CONNECTION_TERMINATION_DEADLINE", "soon"),
        ("KEEPALIVE_TIME", "1500ms"),
        ("KEEPALIVE_INTERVAL", "0"),
        ("KEEPALIVE_RETRIES", "128"),
        ("KEEPALIVE_ENABLED", "yes"),
        ("USER_TIMEOUT_ENABLED", "1"),
        ("HTTP2_STREAM_WINDOW_SIZE", "1000"),
        ("HTTP2_CONNECTION_WINDOW_SIZE", "2147483648"),
        ("HTTP2_FRAME_SIZE", "16383"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "0"),
        ("POOL_UNUSED_RELEASE_TIMEOUT", "-1"),
        ("TRUST_DOMAIN", "a/b"),
        ("AUTHZ_POLICY_INFO_LOGGING", "on"),
        ("ENABLE_RESPONSE_BAGGAGE", "off"),
        ("ZTUNNEL_WORKER_THREADS", "101%"),
        ("CULVERT_WORKER_THREADS", "many"),
        ("CULVERT_WORKER_THREADS", "100000"),
    ] {
        refused(&[(name, value)], &[name, &format!("{value:?}")]);
    }
}

#[test]
fn contradictions_name_both_settings() {
    for variables in [
        [("CULVERT_WORKER_THREADS", "2"), ("ZTUNNEL_WORKER_THREADS", "4")],
        [("CONNECTION_TERMINATION_DEADLINE", "31s"), ("TERMINATION_GRACE_PERIOD_SECONDS", "30")],
        [("KEEPALIVE_TIME", "60s"), ("KEEPALIVE_ENABLED", "false")],
        [("HTTP2_STREAM_WINDOW_SIZE", "131072"), ("HTTP2_CONNECTION_WINDOW_SIZE", "65535")],
        [("CLUSTER_ID", "a"), ("ISTIO_META_CLUSTER_ID", "b")],
        [("STATS_ADDR", "[::]:15000"), ("ADMIN_ADDR", "127.0.0.1:15000")],
        [("READINESS_ADDR", "10.0.0.1:9"), ("STATS_ADDR", "10.0.0.1:9")],
    ] {
        refused(&variables, &[variables[0].0, "contradicts", variables[1].0]);
    }
    with(&[("ADMIN_ADDR", "127.0.0.1:0"), ("STATS_ADDR", "127.0.0.1:0")]).unwrap();
    with(&[("KEEPALIVE_ENABLED", "false")]).unwrap();
}

#[test]
fn drain_deadline_is_the_longer_one_once_another_agent_takes_new_connections() {
    let deadlines = |variables: &[(&str, &str)]| {
        let config = with(variables).unwrap();
        (config.drain_deadline.as_secs(), config.handed_over_deadline.as_secs())
    };
    let (grace, stated) = ("TERMINATION_GRACE_PERIOD_SECONDS", "CONNECTION_TERMINATION_DEADLINE");
    assert_eq!(deadlines(&[]), (5, 5));
    assert_eq!(deadlines(&[(grace, "30")]), (25, 25));
    assert_eq!(deadlines(&[(grace, "30"), (stated, "5s")]), (5, 25));
    assert_eq!(deadlines(&[(grace, "30"), (stated, "28s")]), (28, 28));
}

#[test]
fn hand_over_is_where_the_state_is_unless_said_otherwise() {
    let path = |variables: &[(&str, &str)]| with(variables).unwrap().handover;
    assert_eq!(path(&[]), Some("/var/lib/culvert/handover.sock".into()));
    assert_eq!(path(&[("CULVERT_STATE_DIR", "/s")]), Some("/s/handover.sock".into()));
    assert_eq!(path(&[("CULVERT_HANDOVER", "/run/x")]), Some("/run/x".into()));
    assert_eq!(path(&[("CULVERT_HANDOVER", "")]), None);
    let rules = [("CULVERT_REDIRECT", "cni"), ("INPOD_UDS", "/run/cni.sock")];
    assert_eq!(path(&rules), None);
}

#[test]
fn drain_deadline_leaves_room_before_the_kill() {
    let deadline = |variables: &[(&str, &str)]| with(variables).unwrap().drain_deadline.as_secs();
    for (grace, seconds) in [("30", 25), ("11", 6), ("10", 9), ("2", 1), ("1", 1), ("0", 1)] {
        assert_eq!(deadline(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]), seconds, "{grace}");
    }
    let both =
        [("TERMINATION_GRACE_PERIOD_SECONDS", "30"), ("CONNECTION_TERMINATION_DEADLINE", "1m")];
    assert_eq!(deadline(&both[1..]), 60);
    assert_eq!(deadline(&[both[0], ("CONNECTION_TERMINATION_DEADLINE", "7")]), 7);
}

#[test]
fn worker_threads_may_be_a_share_of_the_processors() {
    for (value, count) in [("3", 3), ("0", 8), ("50%", 4), ("1%", 1), ("100%", 8)] {
        let config = with(&[("ZTUNNEL_WORKER_THREADS", value)]).unwrap();
        assert_eq!(config.worker_threads.get(), count, "{value}");
    }
    let both = [("CULVERT_WORKER_THREADS", "4"), ("ZTUNNEL_WORKER_THREADS", "50%")];
    assert_eq!(with(&both).unwrap().worker_threads.get(), 4);
}

#[test]
fn mesh_settings_may_come_from_either_side_and_must_agree() {
    let file = StatedMesh { network: Some("n1".into()), ..StatedMesh::default() };
    let mesh = with(&[("CLUSTER_ID", "c1")]).unwrap().mesh(&file).unwrap();
    assert_eq!(&*mesh.network, "n1");
    assert_eq!(&*mesh.cluster_id, "c1");
    assert_eq!(&*mesh.trust_domain, "cluster.local");

    let error = with(&[("NETWORK", "n2")]).unwrap().mesh(&file).unwrap_err();
    assert_eq!(
        error.to_string(),
        "NETWORK contradicts culvert.network of /etc/mesh.yaml: \"n2\" is not \"n1\""
    );
}

#[test]
fn cgroup2_is_found_on_pure_and_hybrid_hosts() {
    let pure = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(find_cgroup2(pure), Some(PathBuf::from("/sys/fs/cgroup")));
    let hybrid = "30 22 0:26 / /sys/fs/cgroup ro shared:4 - tmpfs tmpfs rw\n\
                  31 30 0:27 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw\n\
                  32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
    assert_eq!(find_cgroup2(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    let partial = "31 30 0:27 /pod /a\\040b rw - cgroup2 none rw\n\
                   33 30 0:27 / /whole rw - cgroup2 none rw\n";
    assert_eq!(find_cgroup2(partial), Some(PathBuf::from("/whole")));
    assert_eq!(find_cgroup2(partial.lines().next().unwrap()), Some(PathBuf::from("/a b")));
    assert_eq!(find_cgroup2("nonsense\n - cgroup2\n1 2 - cgroup2 x"), None);
}

#[test]
fn pods_of_one_node_meet_in_the_kernel_unless_said_otherwise() {
    let same_node = |variables: &[(&str, &str)]| with(variables).unwrap().same_node;
    let default = same_node(&[]);
    assert_eq!((default.path, default.irrevocable), (SameNodePath::Kernel, false));
    assert_eq!(default.verdicts_per_pod, 1024);
    assert_eq!(default.admit_time, Duration::from_secs(300));
    assert!(!default.tunnelled.everyone);
    assert!(same_node(&[("CULVERT_SAME_NODE", "tunnel")]).tunnelled.everyone);
    assert_eq!(same_node(&[("CULVERT_SAME_NODE", "agent")]).path, SameNodePath::Agent);
    let named = same_node(&[("CULVERT_SAME_NODE_TUNNELS", "pay, shop/front")]).tunnelled;
    assert!(named.namespaces.contains("pay"));
    assert!(named.workloads.contains(&("shop".into(), "front".into())));
    assert_eq!(default.accelerated, None);
    let named = same_node(&[("CULVERT_ACCELERATE", "pay,shop/front")]).accelerated.unwrap();
    assert!(named.namespaces.contains("pay") && !named.everyone);
    assert!(named.workloads.contains(&("shop".into(), "front".into())));
    refused(&[("CULVERT_ACCELERATE", "pay/")], &["CULVERT_ACCELERATE", "pay/"]);
    let agent = [("CULVERT_ACCELERATE", "pay"), ("CULVERT_SAME_NODE", "agent")];
    refused(&agent, &["CULVERT_ACCELERATE", "CULVERT_SAME_NODE"]);
    refused(&[("CULVERT_SAME_NODE", "never")], &["CULVERT_SAME_NODE", "never"]);
    refused(&[("CULVERT_SAME_NODE_TUNNELS", "pay,/x")], &["CULVERT_SAME_NODE_TUNNELS", "/x"]);
    refused(&[("CULVERT_SAME_NODE_VERDICTS", "0")], &["CULVERT_SAME_NODE_VERDICTS"]);
    refused(&[("CULVERT_SAME_NODE_ADMIT_TIME", "2d")], &["CULVERT_SAME_NODE_ADMIT_TIME"]);
}

#[test]
fn with_rules_of_istio_cni_the_agent_carries_what_stays_on_the_node() {
    let cni = [("CULVERT_REDIRECT", "cni"), ("INPOD_UDS", "/run/cni.sock")];
    assert_eq!(with(&cni).unwrap().same_node.path, SameNodePath::Agent);
    let kernel = [&cni[..], &[("CULVERT_SAME_NODE", "kernel")]].concat();
    refused(&kernel, &["CULVERT_SAME_NODE", "CULVERT_REDIRECT"]);
}
