//! What the kernel programs log, brought into the agent's own log.

use std::io;

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};
use tokio::io::unix::AsyncFd;

/// The log's scope of what the kernel programs say.
pub const KERNEL_LOG: &str = "culvert::kernel";

/// Unread records of the kernel programs.
pub struct KernelLogs(EbpfLogger<ToTracing>);

impl std::fmt::Debug for KernelLogs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelLogs").finish_non_exhaustive()
    }
}

impl KernelLogs {
    pub(super) fn new(object: &mut Ebpf) -> Option<KernelLogs> {
        match EbpfLogger::init_with_logger(object, ToTracing) {
            Ok(logger) => Some(KernelLogs(logger)),
            Err(error) => {
                tracing::warn!(%error, "the kernel programs' log cannot be read");
                None
            }
        }
    }

    /// Writes records to the log as they come, until it is dropped.
    pub async fn forward(self) -> io::Result<()> {
        // SAFETY: the logger owns its descriptor, always names the same one, and is moved in here.
        let mut logger = unsafe { AsyncFd::register(self.0) }?;
        loop {
            let mut ready = logger.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}

/// The logging library that aya-log writes to is not the agent's.
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        let program = record.module_path().unwrap_or_default();
        let message = record.args();
        match record.level() {
            Level::Error => tracing::error!(target: KERNEL_LOG, program, "{message}"),
            Level::Warn => tracing::warn!(target: KERNEL_LOG, program, "{message}"),
            Level::Info => tracing::info!(target: KERNEL_LOG, program, "{message}"),
            Level::Debug => tracing::debug!(target: KERNEL_LOG, program, "{message}"),
            Level::Trace => tracing::trace!(target: KERNEL_LOG, program, "{message}"),
        }
    }

    fn flush(&self) {}
}
