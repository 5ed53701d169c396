//! What operators bring: the mesh file, settings, log directives, revocation lists, resolv.conf.

use std::ffi::OsString;
use std::num::NonZeroUsize;

use culvert_agent::config::{Config, Flags, Surroundings};
use culvert_agent::dns::Upstreams;
use culvert_agent::file::{Mesh, diff};
use culvert_agent::telemetry::logging::Directives;
use culvert_agent::tls::RevocationList;
use culvert_core::snapshot::Snapshot;

pub(super) fn mesh_file(bytes: &[u8]) {
    let mesh = match Mesh::parse(bytes) {
        Ok(mesh) => mesh,
        Err(invalid) => {
            let place = invalid.place;
            assert!(place.is_none_or(|place| place.line > 0 && place.column > 0));
            assert!(!invalid.what.is_empty());
            return;
        }
    };
    assert!(diff(&mesh, &mesh).is_empty());
    let snapshot = Snapshot::default().with(diff(&Mesh::default(), &mesh));
    assert_eq!(snapshot.workload_count(), mesh.workloads.len());
    assert_eq!(snapshot.service_count(), mesh.services.len());
    assert_eq!(snapshot.policies().count(), mesh.policies.len());
    let emptied = snapshot.with(diff(&mesh, &Mesh::default()));
    assert_eq!((emptied.workload_count(), emptied.service_count()), (0, 0));
}

/// Lines of `NAME=value`, as an environment.
pub(super) fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let lines: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let variable = |name: &str| {
        // `\n` stands for the end of a line within a value.
        let line = lines.iter().find(|(key, _)| *key == name);
        line.map(|(_, value)| OsString::from(value.replace("\\n", "\n")))
    };
    let variables: Vec<OsString> = lines.iter().map(|(name, _)| OsString::from(name)).collect();
    let around = Surroundings {
        variable: &variable,
        variables: &variables,
        processors: NonZeroUsize::MIN,
        cgroup2: Some("/sys/fs/cgroup".into()),
    };
    match Config::new(Flags::default(), &around) {
        Ok(config) => {
            assert!(!config.node.is_empty());
            assert!(config.file.is_some() || config.xds.is_some());
            for plane in config.xds.iter().map(|xds| &xds.control) {
                assert!(!plane.addresses.is_empty());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

pub(super) fn log_directives(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(directives) = text.parse::<Directives>() else { return };
    let printed = directives.to_string();
    let read = printed.parse::<Directives>().expect("what is printed can be read");
    assert_eq!(read.to_string(), printed);
    assert_eq!(read.want_debug("access"), directives.want_debug("access"));
}

/// PEM or DER.
pub(super) fn revocation_list(bytes: &[u8]) {
    match RevocationList::parse(bytes) {
        Ok(list) => assert!(list.len() <= bytes.len()),
        Err(invalid) => assert!(!invalid.to_string().is_empty()),
    }
}

pub(super) fn resolv_conf(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Err(invalid) = Upstreams::parse(text) {
        assert!(!invalid.to_string().is_empty());
    }
}
