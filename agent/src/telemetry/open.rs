//! One connection from its opening to its one outcome.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Telemetry;
use super::access;
use super::context::{ConnectionContext, Failure, ResponseFlag};
use super::series::{ByteCounters, Series};

/// A connection that has been counted as opened; closed exactly once, by [`OpenConnection::close`]
/// or when dropped.
#[derive(Debug)]
pub struct OpenConnection {
    telemetry: Telemetry,
    context: Arc<ConnectionContext>,
    series: Arc<Series>,
    counters: Arc<ByteCounters>,
    opened: Instant,
    /// How long it lasted, where that is known better than by its opening.
    lasted: Option<Duration>,
    settled: bool,
}

impl OpenConnection {
    pub(super) fn new(
        telemetry: Telemetry,
        context: ConnectionContext,
        series: Arc<Series>,
    ) -> OpenConnection {
        let counters = series.open();
        access::opened(&context);
        let opened = Instant::now();
        let context = Arc::new(context);
        Self { telemetry, context, series, counters, opened, lasted: None, settled: false }
    }

    /// Where the relay adds the bytes it carried; without a lock and shared with no other
    /// connection.
    pub fn counters(&self) -> Arc<ByteCounters> {
        self.counters.clone()
    }

    pub fn context(&self) -> &Arc<ConnectionContext> {
        &self.context
    }

    /// Records the outcome.
    pub fn close(mut self, outcome: Result<(), Failure>) {
        self.settle(outcome);
    }

    /// The same for a connection of which is heard later than it ended: it lasted this long.
    pub fn close_after(mut self, lasted: Duration, outcome: Result<(), Failure>) {
        self.lasted = Some(lasted);
        self.settle(outcome);
    }

    /// The connection goes on when this agent ends: of its end another one tells.
    pub fn hand_on(mut self) {
        self.settled = true;
    }

    fn settle(&mut self, outcome: Result<(), Failure>) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let flag = outcome.as_ref().err().map_or(ResponseFlag::None, |failure| failure.flag);
        self.series.close(&self.counters, flag);
        if let Some(denial) = outcome.as_ref().err().and_then(|failure| failure.denial.as_ref()) {
            self.telemetry.count_denial(denial);
        }
        let lasted = self.lasted.unwrap_or_else(|| self.opened.elapsed());
        access::complete(&self.context, &self.counters, lasted, &outcome);
    }
}

impl Drop for OpenConnection {
    /// The task was dropped, as at the end of a shutdown: no failure of the connection's own.
    fn drop(&mut self) {
        if !self.settled {
            self.settle(Err(Failure::new(ResponseFlag::None, "connection dropped")));
        }
    }
}
