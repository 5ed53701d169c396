//! The log: which lines are written, in which form, and the thread that writes them.
//!
//! Nothing is installed here. The caller makes [`Logging::dispatch`] the subscriber of the process
//! (or of a thread, in tests) and keeps [`Logging::flush`] until the end.

mod directives;
mod format;

use std::fmt;
use std::io::{self, BufWriter, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tracing::Dispatch;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Registry, reload};

pub use directives::{Directives, InvalidDirective};
pub use format::LogFormat;

/// How many lines may wait to be written; more are dropped and counted.
const WAITING_LINES: usize = 16_384;
/// How many bytes of lines may be written with one system call.
const WRITTEN_TOGETHER: usize = 64 << 10;
/// How long a line waits for others to be written with.
const GATHER: Duration = Duration::from_millis(2);

/// A log that is ready to be installed.
pub struct Logging {
    pub dispatch: Dispatch,
    pub control: LogControl,
    /// Writes what still waits when it is dropped, for at most about a second.
    pub flush: LogFlush,
}

/// The writer's thread flushes when no more lines wait. It is faster than those who make them: without
/// a pause it would write each by itself, and have to be woken for the next.
struct Gathering<W: Write>(BufWriter<W>);

impl<W: Write> Write for Gathering<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    #[expect(clippy::disallowed_methods, reason = "the thread has nothing else to do")]
    fn flush(&mut self) -> io::Result<()> {
        thread::sleep(GATHER);
        self.0.flush()
    }
}

/// Keeps the writer's thread; dropped last.
#[derive(Debug)]
pub struct LogFlush {
    _worker: WorkerGuard,
}

impl Logging {
    /// A log of the lines that `directives` want, written to `writer` by a thread of its own, so
    /// that a slow reader never holds up a connection.
    pub fn new(
        directives: Directives,
        format: LogFormat,
        writer: impl Write + Send + 'static,
    ) -> Logging {
        let (lines, worker) = NonBlockingBuilder::default()
            .buffered_lines_limit(WAITING_LINES)
            .thread_name("culvert-log")
            .finish(Gathering(BufWriter::with_capacity(WRITTEN_TOGETHER, writer)));
        let dropped = lines.error_counter();
        let (filter, handle) = reload::Layer::new(directives.targets());
        let layer = Layer::new().event_format(format).with_ansi(false).with_writer(lines);
        let dispatch = Dispatch::new(Registry::default().with(filter).with(layer));
        let control = LogControl(Arc::new(Control {
            current: Mutex::new(directives.clone()),
            start: directives,
            filter: handle,
            dropped,
        }));
        Logging { dispatch, control, flush: LogFlush { _worker: worker } }
    }
}

/// Reads and changes which lines are written while the agent runs.
#[derive(Clone)]
pub struct LogControl(Arc<Control>);

struct Control {
    start: Directives,
    current: Mutex<Directives>,
    filter: reload::Handle<Targets, Registry>,
    dropped: ErrorCounter,
}

/// The log is no longer there to be changed: its [`Logging::dispatch`] was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the log has ended")]
pub struct LogEnded;

impl LogControl {
    /// What is wanted now.
    pub fn current(&self) -> Directives {
        self.0.current.lock().clone()
    }

    /// Lays `changes` over what is wanted now; gives the new state.
    pub fn change(&self, changes: &Directives) -> Result<Directives, LogEnded> {
        self.apply(|current| current.lay_over(changes))
    }

    /// Goes back to what was wanted at the start.
    pub fn reset(&self) -> Result<Directives, LogEnded> {
        self.apply(|current| current.clone_from(&self.0.start))
    }

    /// Lines dropped because the writer was too slow.
    pub fn dropped_lines(&self) -> u64 {
        self.0.dropped.dropped_lines() as u64
    }

    fn apply(&self, change: impl FnOnce(&mut Directives)) -> Result<Directives, LogEnded> {
        let mut current = self.0.current.lock();
        let mut next = current.clone();
        change(&mut next);
        self.0.filter.reload(next.targets()).map_err(|_| LogEnded)?;
        current.clone_from(&next);
        Ok(next)
    }
}

impl fmt::Debug for LogControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LogControl").field(&self.current()).finish()
    }
}

#[cfg(test)]
mod tests;
