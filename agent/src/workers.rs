//! The threads that carry connections, each with a runtime of its own.
//!
//! A pod's connections and its tunnels live on one thread. What one of them has for another, such as
//! bytes of a tunnel for an application, wakes a task of the same thread, which costs no system call
//! and no other core; and all that is ready leaves together. Pods are dealt out to the threads in
//! turn.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// The threads of one agent. Cloning copies pointers.
#[derive(Clone, Debug)]
pub struct Workers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    handles: Vec<Handle>,
    next: AtomicUsize,
}

/// Ends the threads when dropped, and all that runs on them.
#[derive(Debug)]
pub struct WorkersGuard {
    stop: CancellationToken,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads.
    pub fn start(count: NonZeroUsize) -> io::Result<(Self, WorkersGuard)> {
        let mut handles = Vec::new();
        let mut guard = WorkersGuard { stop: CancellationToken::new(), threads: Vec::new() };
        for number in 0..count.get() {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            handles.push(runtime.handle().clone());
            let stop = guard.stop.clone();
            let carry = move || runtime.block_on(stop.cancelled());
            let thread = thread::Builder::new().name(format!("culvert-{number}"));
            guard.threads.push(thread.spawn(carry)?);
        }
        Ok((Self(Arc::new(Shared { handles, next: AtomicUsize::new(0) })), guard))
    }

    /// All of them.
    pub fn handles(&self) -> &[Handle] {
        &self.0.handles
    }

    /// The thread for one more pod.
    pub fn next(&self) -> Handle {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed) % self.0.handles.len().max(1);
        self.0.handles.get(number).cloned().unwrap_or_else(Handle::current)
    }
}

impl Drop for WorkersGuard {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            // A panic of a task stays with its task.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
