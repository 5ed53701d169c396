//! The labels of the `istio_tcp_*` metrics, in the order that dashboards know.

use std::fmt;
use std::sync::Arc;

use culvert_core::identity::Identity;
use culvert_core::workload::Workload;
use prometheus_client::encoding::{
    EncodeLabel, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder,
};

use super::context::{Baggage, ConnectionContext, Reporter, ResponseFlag};

/// Everything that tells one series from another, except `response_flags`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct TcpLabels {
    reporter: Reporter,
    source: Party,
    service: ServiceLabels,
    destination: Party,
    mutual_tls: bool,
}

impl TcpLabels {
    pub(super) fn of(context: &ConnectionContext) -> Self {
        let service = context.service.as_deref();
        Self {
            reporter: context.reporter,
            source: source_of(context),
            service: ServiceLabels {
                hostname: service.map(|s| &s.hostname).into(),
                namespace: service.map(|s| &s.namespace).into(),
                name: service.map(|s| &s.name).into(),
            },
            destination: destination_of(context),
            mutual_tls: context.mutual_tls,
        }
    }

    /// What stands in for all further label sets when too many are in use.
    pub(super) fn overflow(reporter: Reporter) -> Self {
        Self {
            reporter,
            source: Party::default(),
            service: ServiceLabels::default(),
            destination: Party::default(),
            mutual_tls: false,
        }
    }

    pub(super) fn reporter(&self) -> Reporter {
        self.reporter
    }

    pub(super) fn with_flag(&self, flag: ResponseFlag) -> FlaggedLabels<'_> {
        FlaggedLabels { labels: self, flag }
    }
}

/// One complete label set, as written.
#[derive(Debug)]
pub(super) struct FlaggedLabels<'a> {
    labels: &'a TcpLabels,
    flag: ResponseFlag,
}

impl EncodeLabelSet for FlaggedLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        let Self { labels, flag } = self;
        let TcpLabels { reporter, source, service, destination, mutual_tls } = labels;
        ("reporter", reporter.label()).encode(encoder.encode_label())?;
        for (name, value) in [
            ("source_workload", &source.workload),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.revision),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", &source.principal),
            ("source_app", &source.app),
            ("source_version", &source.revision),
            ("source_cluster", &source.cluster),
            ("destination_service", &service.hostname),
            ("destination_service_namespace", &service.namespace),
            ("destination_service_name", &service.name),
            ("destination_workload", &destination.workload),
            ("destination_canonical_service", &destination.canonical_service),
            ("destination_canonical_revision", &destination.revision),
            ("destination_workload_namespace", &destination.namespace),
            ("destination_principal", &destination.principal),
            ("destination_app", &destination.app),
            ("destination_version", &destination.revision),
            ("destination_cluster", &destination.cluster),
        ] {
            (name, value).encode(encoder.encode_label())?;
        }
        let security = if *mutual_tls { "mutual_tls" } else { UNKNOWN };
        ("request_protocol", "tcp").encode(encoder.encode_label())?;
        ("response_flags", flag.label()).encode(encoder.encode_label())?;
        ("connection_security_policy", security).encode(encoder.encode_label())?;
        for (name, value) in [
            ("source_region", &source.region),
            ("source_zone", &source.zone),
            ("destination_region", &destination.region),
            ("destination_zone", &destination.zone),
        ] {
            (name, value).encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

/// The workload known by address wins over baggage; the principal is always the one of TLS.
fn source_of(context: &ConnectionContext) -> Party {
    let principal = match context.mutual_tls {
        true => Label::identity(context.source_identity.as_ref()),
        false => Label::default(),
    };
    let mut party = match (&context.source, context.reporter, &context.baggage) {
        (Some(workload), _, _) => Party::of(workload),
        (None, Reporter::Destination, Some(baggage)) => Party::from_baggage(baggage),
        (None, _, _) => Party::default(),
    };
    party.principal = principal;
    party
}

/// The principal is the configured one unless a handshake told another, for plain TCP too.
fn destination_of(context: &ConnectionContext) -> Party {
    let configured = context.destination.as_ref().map(|workload| workload.identity());
    let principal = context.destination_identity.as_ref().or(configured.as_ref());
    let mut party = match (context.reporter, &context.baggage, &context.destination) {
        (Reporter::Source, Some(baggage), _) => Party::from_baggage(baggage),
        (_, _, Some(workload)) => Party::of(workload),
        (_, _, None) => Party::default(),
    };
    party.principal = Label::identity(principal);
    party
}

/// The labels of one end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Party {
    workload: Label,
    canonical_service: Label,
    /// Both `…_canonical_revision` and `…_version`.
    revision: Label,
    namespace: Label,
    principal: Label,
    app: Label,
    cluster: Label,
    region: Label,
    zone: Label,
}

impl Party {
    fn of(workload: &Workload) -> Self {
        Self {
            workload: Some(&workload.workload_name).into(),
            canonical_service: Some(&workload.canonical_name).into(),
            revision: Some(&workload.canonical_revision).into(),
            namespace: Some(&workload.namespace).into(),
            principal: Label::default(),
            app: Some(&workload.canonical_name).into(),
            cluster: Some(&workload.cluster_id).into(),
            region: Some(&workload.locality.region).into(),
            zone: Some(&workload.locality.zone).into(),
        }
    }

    fn from_baggage(baggage: &Baggage) -> Self {
        Self {
            workload: baggage.workload_name.as_ref().into(),
            canonical_service: baggage.canonical_name.as_ref().into(),
            revision: baggage.canonical_revision.as_ref().into(),
            namespace: baggage.namespace.as_ref().into(),
            principal: Label::default(),
            // Unlike for a configured workload, where it is the canonical name.
            app: baggage.workload_name.as_ref().into(),
            cluster: baggage.cluster_id.as_ref().into(),
            region: baggage.region.as_ref().into(),
            zone: baggage.zone.as_ref().into(),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct ServiceLabels {
    hostname: Label,
    namespace: Label,
    name: Label,
}

const UNKNOWN: &str = "unknown";

/// A label value; missing and empty are the same and read `unknown`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Label(Option<Arc<str>>);

impl Label {
    fn identity(identity: Option<&Identity>) -> Self {
        Self(identity.map(|identity| identity.to_string().into()))
    }
}

impl From<Option<&Arc<str>>> for Label {
    fn from(value: Option<&Arc<str>>) -> Self {
        Self(value.filter(|text| !text.is_empty()).cloned())
    }
}

impl EncodeLabelValue for &Label {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), fmt::Error> {
        EncodeLabelValue::encode(&self.0.as_deref().unwrap_or(UNKNOWN), encoder)
    }
}

/// The labels of `istio_on_demand_dns_total`: the client that caused a look-up, and the name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct OnDemandDnsLabels {
    source: Party,
    hostname: Label,
}

impl OnDemandDnsLabels {
    pub(super) fn of(source: &Workload, hostname: &Arc<str>) -> Self {
        let principal = Label::identity(Some(&source.identity()));
        let source = Party { principal, ..Party::of(source) };
        Self { source, hostname: Some(hostname).into() }
    }

    pub(super) fn overflow() -> Self {
        Self { source: Party::default(), hostname: Label::default() }
    }
}

impl EncodeLabelSet for OnDemandDnsLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        let Self { source, hostname } = self;
        for (name, value) in [
            ("source_workload", &source.workload),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.revision),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", &source.principal),
            ("source_app", &source.app),
            ("source_version", &source.revision),
            ("source_cluster", &source.cluster),
            ("hostname", hostname),
        ] {
            (name, value).encode(encoder.encode_label())?;
        }
        Ok(())
    }
}
