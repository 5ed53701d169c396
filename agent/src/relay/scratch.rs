//! One read buffer per thread, for reads whose bytes are passed on before the next await.

use std::cell::RefCell;

/// A read that fills it is the start of bulk data.
pub(super) const SCRATCH: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
}

/// Lends this thread's buffer of [`SCRATCH`] bytes; its contents are left-overs. Must not be
/// nested.
pub(super) fn with<R>(use_it: impl FnOnce(&mut [u8]) -> R) -> R {
    BUFFER.with_borrow_mut(|buffer| use_it(buffer))
}
