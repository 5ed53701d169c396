use serde_json::json;

use super::*;

/// As in a pod of a DaemonSet; what comes later wins.
fn pod(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let pod = [
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
        ("NODE_NAME", "node-a"),
        ("POD_NAME", "culvert-x7k2p"),
        ("POD_NAMESPACE", "istio-system"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("INSTANCE_IP", "10.244.1.9"),
    ];
    read(Flags::default(), &[&pod, variables].concat())
}

#[test]
fn in_kubernetes_all_comes_from_istio() {
    let config = pod(&[]).unwrap();
    assert_eq!(config.file, None);
    let xds = config.xds.unwrap();
    assert_eq!(xds.control.addresses, ["https://istiod.istio-system.svc:15012"]);
    let roots = Roots::File("./var/run/secrets/istio/root-cert.pem".into());
    assert_eq!(xds.control.roots, roots);
    let token = Token::File("./var/run/secrets/tokens/istio-token".into());
    assert_eq!(xds.control.token, Some(token));
    assert_eq!(&*xds.control.cluster_id, "Kubernetes");
    assert!(!xds.on_demand && xds.kept.is_none());
    let ca = config.ca.unwrap();
    assert_eq!(ca.control, xds.control);
    assert_eq!(ca.ttl.as_secs(), 86_400);
    assert_eq!(config.cni.as_deref(), Some(Path::new("/var/run/ztunnel/ztunnel.sock")));
    assert_eq!(config.redirect, Redirect::Ebpf);
    let dns = config.dns.unwrap();
    assert_eq!(
        (dns.addr.to_string(), &*dns.cluster_domain),
        ("127.0.0.1:15053".into(), "cluster.local")
    );
    assert_eq!(dns.prefer_namespace, None);
    assert_eq!((config.packet_mark, config.port_reuse, config.ipv6), (1337, true, true));
    assert_eq!((&*config.pod.name, &*config.pod.namespace), ("culvert-x7k2p", "istio-system"));
    assert_eq!(config.pod.ip, Some("10.244.1.9".parse().unwrap()));
}

#[test]
fn mesh_file_stands_alone_unless_more_is_named() {
    let config = pod(&[("CULVERT_CONFIG", "/m.yaml")]).unwrap();
    assert!(config.xds.is_none() && config.ca.is_none());
    assert!(config.cni.is_none() && config.dns.is_none());
    let both = pod(&[("CULVERT_CONFIG", "/m.yaml"), ("XDS_ADDRESS", "istiod:15012")])
        .unwrap()
        .xds
        .unwrap();
    assert_eq!(both.control.addresses, ["https://istiod:15012"]);
}

#[test]
fn empty_addresses_switch_off() {
    let config = pod(&[("CULVERT_CONFIG", "/m.yaml"), ("XDS_ADDRESS", "")]).unwrap();
    assert!(config.xds.is_none());
    let config = pod(&[("CA_ADDRESS", "")]).unwrap();
    assert!(config.ca.is_none() && config.xds.is_some());
    let error = pod(&[("XDS_ADDRESS", "")]).unwrap_err().to_string();
    assert!(error.starts_with("CULVERT_CONFIG, --config or XDS_ADDRESS is missing"), "{error}");
}

#[test]
fn several_control_planes_keep_their_order() {
    let config = pod(&[("XDS_ADDRESS", "https://b:15012/, a.example:15012,[fd00::1]:15012")]);
    let addresses = config.unwrap().xds.unwrap().control.addresses;
    assert_eq!(
        addresses,
        ["https://b:15012", "https://a.example:15012", "https://[fd00::1]:15012"]
    );
    for wrong in ["http://a:15010", "a", "https://a", "a:b", ":1", "a:15012,"] {
        let error = pod(&[("XDS_ADDRESS", wrong)]).unwrap_err().to_string();
        assert!(error.starts_with("XDS_ADDRESS: "), "{wrong}: {error}");
    }
}

#[test]
fn roots_tokens_and_names_have_their_forms() {
    let config = pod(&[
        ("XDS_ROOT_CA", "SYSTEM"),
        ("CA_ROOT_CA", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"),
        ("AUTH_TOKEN", "eyJhbGciOi"),
        ("ALT_XDS_HOSTNAME", "istiod.example"),
        ("XDS_HEADER_X-Tenant", "blue"),
        ("CA_HEADER_X-Tenant", "red"),
        ("CLUSTER_ID", "c1"),
    ])
    .unwrap();
    let (xds, ca) = (config.xds.unwrap().control, config.ca.unwrap().control);
    assert_eq!(xds.roots, Roots::System);
    assert!(matches!(ca.roots, Roots::Pem(_)));
    assert_eq!(xds.token, Some(Token::Literal("eyJhbGciOi".into())));
    assert!(!format!("{xds:?}").contains("eyJ"), "the token is shown");
    assert_eq!((xds.alt_hostname.as_deref(), ca.alt_hostname), (Some("istiod.example"), None));
    assert_eq!(xds.headers, [("x-tenant".to_owned(), "blue".to_owned())]);
    assert_eq!(ca.headers, [("x-tenant".to_owned(), "red".to_owned())]);
    assert_eq!(&*xds.cluster_id, "c1");
    let fallback = pod(&[("CA_ROOT_CA", "/r.pem")]).unwrap().xds.unwrap();
    assert_eq!(fallback.control.roots, Roots::File("/r.pem".into()));
}

#[test]
fn metadata_is_text_or_json() {
    let xds = pod(&[
        ("ISTIO_META_ISTIO_VERSION", "1.30.0"),
        ("ISTIO_METAJSON_LABELS", r#"{"app":"ztunnel"}"#),
    ]);
    assert_eq!(
        xds.unwrap().xds.unwrap().metadata,
        [
            ("ISTIO_VERSION".to_owned(), json!("1.30.0")),
            ("LABELS".to_owned(), json!({"app": "ztunnel"})),
        ]
    );
    let error = pod(&[("ISTIO_METAJSON_LABELS", "{")]).unwrap_err().to_string();
    assert!(error.starts_with("ISTIO_METAJSON_LABELS: \"{\" is not JSON"), "{error}");
}

#[test]
fn what_cannot_be_is_named() {
    let refused = |variable: &str, value: &str| {
        let error = pod(&[(variable, value)]).unwrap_err().to_string();
        assert!(error.starts_with(variable), "{variable}={value}: {error}");
    };
    refused("SECRET_TTL", "0s");
    refused("SECRET_TTL", "91days");
    refused("XDS_ON_DEMAND", "maybe");
    refused("CULVERT_REDIRECT", "iptables");
    refused("ISTIO_META_DNS_PROXY_ADDR", "10.0.0.1:53");
    refused("INSTANCE_IP", "here");
    refused("PACKET_MARK", "4096");
    refused("CULVERT_XDS_CACHE_MAX_AGE", "1h");
    refused("TRUST_DOMAIN_ALIASES", "a,,b");
    let file = ("CULVERT_CONFIG", "/m.yaml");
    let error = pod(&[file, ("CULVERT_REDIRECT", "cni")]).unwrap_err().to_string();
    assert!(error.contains("INPOD_UDS"), "{error}");
    let on_demand = [("XDS_ON_DEMAND", "true")];
    let error = pod(&on_demand).unwrap_err().to_string();
    assert!(error.contains("ISTIO_META_DNS_CAPTURE"), "{error}");
    pod(&[on_demand[0], ("ISTIO_META_DNS_CAPTURE", "false")]).unwrap();
}

#[test]
fn choices_are_taken() {
    let config = pod(&[
        ("CULVERT_REDIRECT", "cni"),
        ("INPOD_UDS", "/z.sock"),
        ("TRUST_DOMAIN_ALIASES", "old.example, older.example"),
        ("CULVERT_XDS_CACHE", "/var/cache/culvert"),
        ("CULVERT_XDS_CACHE_MAX_AGE", "10m"),
        ("ISTIO_META_DNS_PROXY_ADDR", "localhost:15053"),
        ("CRL_PATH", "/crl.pem"),
        ("PREFERED_SERVICE_NAMESPACE", "shared"),
        ("SECRET_TTL", "2h"),
    ])
    .unwrap();
    assert_eq!(config.redirect, Redirect::Cni);
    assert_eq!(config.trust_domain_aliases, ["old.example".into(), "older.example".into()]);
    let kept = config.xds.unwrap().kept.unwrap();
    assert_eq!((kept.path.to_str(), kept.max_age.as_secs()), (Some("/var/cache/culvert"), 600));
    assert_eq!(config.crl.as_deref(), Some(Path::new("/crl.pem")));
    assert_eq!(config.dns.unwrap().prefer_namespace.as_deref(), Some("shared"));
    assert_eq!(config.ca.unwrap().ttl.as_secs(), 7200);
}

#[test]
fn proxy_config_stands_for_variables() {
    let text = "discoveryAddress: istiod.two:15012\nproxyAdminPort: 15999\nconcurrency: 3\n\
                proxyMetadata: {DNS_CAPTURE: 'false', ISTIO_META_A: b}\ntracing: {}\n";
    let config = pod(&[("PROXY_CONFIG", text)]).unwrap();
    assert_eq!(config.servers.admin.to_string(), "127.0.0.1:15999");
    assert_eq!(config.worker_threads.get(), 3);
    assert!(config.dns.is_none());
    let xds = config.xds.unwrap();
    assert_eq!(xds.control.addresses, ["https://istiod.two:15012"]);
    assert!(xds.metadata.contains(&("A".to_owned(), json!("b"))));
    let stated = pod(&[("PROXY_CONFIG", text), ("XDS_ADDRESS", "istiod:15012")]).unwrap();
    assert_eq!(stated.xds.unwrap().control.addresses, ["https://istiod:15012"]);
    let error = pod(&[("PROXY_CONFIG", "concurrency: many")]).unwrap_err().to_string();
    assert!(error.starts_with("PROXY_CONFIG: "), "{error}");
}

#[test]
fn threads_follow_the_containers_share() {
    let threads = |variables: &[(&str, &str)]| pod(variables).unwrap().worker_threads.get();
    assert_eq!(threads(&[("ZTUNNEL_CPU_LIMIT", "64")]), 64);
    assert_eq!(threads(&[("ZTUNNEL_CPU_LIMIT", "64"), ("ZTUNNEL_WORKER_THREADS", "25%")]), 16);
    assert_eq!(threads(&[("ZTUNNEL_RESOURCE_CPU_LIMIT", "2")]), 2);
    let request = ("ZTUNNEL_RESOURCE_CPU_REQUEST", "4");
    assert_eq!(threads(&[("ZTUNNEL_RESOURCE_CPU_LIMIT", "2"), request]), 4);
}

#[test]
fn without_programs_of_its_own_the_agent_needs_no_cgroup() {
    let with = |redirect: &'static str| {
        let variable = move |name: &str| match name {
            "XDS_ADDRESS" => Some("istiod:15012".into()),
            "NODE_NAME" => Some("node-a".into()),
            "CULVERT_REDIRECT" => Some(redirect.into()),
            _ => None,
        };
        let around = Surroundings {
            variable: &variable,
            variables: &[],
            processors: NonZeroUsize::MIN,
            cgroup2: None,
        };
        Config::new(Flags::default(), &around)
    };
    assert_eq!(with("cni").unwrap().redirect, Redirect::Cni);
    assert!(with("ebpf").unwrap_err().to_string().starts_with("CULVERT_CGROUP"));
}
