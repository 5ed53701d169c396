//! The access log: one line per connection that ended, target `access`.
//!
//! Nothing here is formatted unless the line is wanted: the fields are evaluated only for events
//! that pass the filter.

use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use super::context::{ConnectionContext, Failure, Reporter};
use super::series::ByteCounters;

/// One event with the fields of every connection, in their order, then those given.
macro_rules! connection_event {
    ($level:ident, $context:ident, $message:literal $(, $($name:ident).+ = $value:expr)* $(,)?) => {
        tracing::event!(
            target: "access",
            parent: None,
            tracing::Level::$level,
            src.addr = %$context.src,
            src.workload = source_workload($context),
            src.namespace = source_namespace($context),
            src.identity = source_identity($context),
            src.cluster = source_cluster($context),
            dst.addr = %$context.dst,
            dst.hbone_addr = $context.hbone_addr.as_ref().map(tracing::field::display),
            dst.service = $context.service.as_ref().and_then(|s| told(&s.hostname)),
            dst.workload = destination_workload($context),
            dst.namespace = destination_namespace($context),
            dst.identity = destination_identity($context),
            dst.cluster = destination_cluster($context),
            direction = $context.reporter.direction(),
            $($($name).+ = $value,)*
            $message
        )
    };
}

/// The line at the start, at debug.
pub(super) fn opened(context: &ConnectionContext) {
    connection_event!(DEBUG, context, "connection opened");
}

/// The line at the end: info, or error with the failure as its last field.
///
/// A policy that decided stands right before the error, as `policy` and `rule` (its index).
pub(super) fn complete(
    context: &ConnectionContext,
    counters: &ByteCounters,
    elapsed: Duration,
    outcome: &Result<(), Failure>,
) {
    // The counters are told from the request's side at both ends; the log, from the reporter's.
    let (sent, received) = match context.reporter {
        Reporter::Source => (counters.received(), counters.sent()),
        Reporter::Destination => (counters.sent(), counters.received()),
    };
    let duration = || format!("{}ms", elapsed.as_millis());
    match outcome {
        Ok(()) => connection_event!(
            INFO,
            context,
            "connection complete",
            bytes_sent = sent,
            bytes_recv = received,
            duration = duration(),
        ),
        Err(failure) => {
            let denial = failure.denial.as_ref();
            connection_event!(
                ERROR,
                context,
                "connection complete",
                bytes_sent = sent,
                bytes_recv = received,
                duration = duration(),
                policy = denial.and_then(|denial| denial.policy.as_deref()),
                rule = denial.and_then(|denial| denial.rule).map(|rule| rule as u64),
                error = failure.error.as_str(),
            );
        }
    }
}

/// The line for a connection that failed before anything was known of it.
pub(super) fn failed(reporter: Reporter, src: SocketAddr, dst: SocketAddr, error: &dyn Display) {
    tracing::event!(
        target: "access",
        parent: None,
        tracing::Level::WARN,
        src.addr = %src,
        dst.addr = %dst,
        direction = reporter.direction(),
        error = error.to_string(),
        "connection failed"
    );
}

/// `None` for an empty text, which is left out like a missing one.
fn told(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

fn source_workload(context: &ConnectionContext) -> Option<&str> {
    match &context.source {
        Some(workload) => told(&workload.name).or(told(&workload.canonical_name)),
        None => source_baggage(context)?.workload_name.as_deref().and_then(told),
    }
}

fn source_namespace(context: &ConnectionContext) -> Option<&str> {
    match &context.source {
        Some(workload) => told(&workload.namespace),
        None => source_baggage(context)?.namespace.as_deref().and_then(told),
    }
}

fn source_cluster(context: &ConnectionContext) -> Option<&str> {
    match &context.source {
        Some(workload) => told(&workload.cluster_id),
        None => source_baggage(context)?.cluster_id.as_deref().and_then(told),
    }
}

fn source_identity(context: &ConnectionContext) -> Option<String> {
    let identity = context.source_identity.as_ref().filter(|_| context.mutual_tls)?;
    Some(identity.to_string())
}

fn destination_workload(context: &ConnectionContext) -> Option<&str> {
    match (destination_baggage(context), &context.destination) {
        (Some(baggage), _) => baggage.workload_name.as_deref().and_then(told),
        (None, Some(workload)) => told(&workload.name).or(told(&workload.canonical_name)),
        (None, None) => None,
    }
}

fn destination_namespace(context: &ConnectionContext) -> Option<&str> {
    match (destination_baggage(context), &context.destination) {
        (Some(baggage), _) => baggage.namespace.as_deref().and_then(told),
        (None, Some(workload)) => told(&workload.namespace),
        (None, None) => None,
    }
}

fn destination_cluster(context: &ConnectionContext) -> Option<&str> {
    match (destination_baggage(context), &context.destination) {
        (Some(baggage), _) => baggage.cluster_id.as_deref().and_then(told),
        (None, Some(workload)) => told(&workload.cluster_id),
        (None, None) => None,
    }
}

fn destination_identity(context: &ConnectionContext) -> Option<String> {
    context.told_destination_identity().map(|identity| identity.to_string())
}

fn source_baggage(context: &ConnectionContext) -> Option<&super::context::Baggage> {
    context.baggage.as_deref().filter(|_| context.reporter == Reporter::Destination)
}

fn destination_baggage(context: &ConnectionContext) -> Option<&super::context::Baggage> {
    context.baggage.as_deref().filter(|_| context.reporter == Reporter::Source)
}
