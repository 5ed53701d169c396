//! What is kept on a socket, in its own storage.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::BPF_SK_STORAGE_GET_F_CREATE;
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use culvert_abi::{Address, SocketRole, SocketState};

use crate::context::{self, write};
use crate::maps::SOCKETS;

/// The library's own accessor takes only the context of a socket address program.
#[inline(always)]
fn map() -> *mut c_void {
    ptr::from_ref(&SOCKETS).cast_mut().cast()
}

/// What is known of a socket, if anything.
///
/// # Safety
/// `sk` comes from a context or a helper, and is not null.
#[inline(always)]
pub unsafe fn state(sk: *mut c_void) -> Option<*mut SocketState> {
    // SAFETY: by this function's contract; a null value asks for a look-up only.
    let state = unsafe { bpf_sk_storage_get(map(), sk, ptr::null_mut(), 0) };
    (!state.is_null()).then_some(state.cast())
}

/// Notes what is known of a socket, over what was noted before; `false` when there is no memory.
///
/// # Safety
/// As for [`state`].
#[inline(always)]
pub unsafe fn note(sk: *mut c_void, state: &SocketState) -> bool {
    let create = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: by this function's contract; a null value makes one of zeroes, which says nothing.
    let stored = unsafe { bpf_sk_storage_get(map(), sk, ptr::null_mut(), create) };
    let stored: *mut SocketState = stored.cast();
    if stored.is_null() {
        return false;
    }
    // Word by word, and what the others mean last: as a whole it would be copied by a loop over its
    // bytes, through which the verifier goes once more for each way that leads here.
    // SAFETY: not null, so it is this socket's value.
    unsafe {
        write!((*stored).port, state.port);
        write_address(&raw mut (*stored).original, state.original);
        write_address(&raw mut (*stored).own, state.own);
        write!((*stored).verdict, state.verdict);
        write!((*stored).netns, state.netns);
        write_address(&raw mut (*stored).backend, state.backend);
        write!((*stored).backend_port, state.backend_port);
        write!((*stored).flags, state.flags);
        write!((*stored).role, state.role);
    }
    true
}

/// # Safety
/// `to` may be written to.
#[inline(always)]
unsafe fn write_address(to: *mut Address, address: Address) {
    let [a, b, c, d] = address.words();
    let to: *mut [u32; 4] = to.cast();
    // SAFETY: by this function's contract; an address is four words.
    unsafe {
        write!((*to)[0], a);
        write!((*to)[1], b);
        write!((*to)[2], c);
        write!((*to)[3], d);
    }
}

/// Whether a socket's state has this role.
///
/// # Safety
/// `state` was returned by [`state`].
#[inline(always)]
pub unsafe fn is(state: *const SocketState, role: SocketRole) -> bool {
    // SAFETY: by this function's contract.
    unsafe { (*state).role == role as u32 }
}

/// Whether what a socket is connected to is not what its application connected to.
///
/// # Safety
/// `state` was returned by [`state`].
#[inline(always)]
pub unsafe fn leads_elsewhere(state: *const SocketState, peer: Address, port: u32) -> bool {
    // SAFETY: by this function's contract.
    unsafe {
        let captured = is(state, SocketRole::Captured) && context::is_agents(port);
        let direct = is(state, SocketRole::Direct)
            && (*state).backend_port == port
            && (*state).backend == peer;
        captured || direct
    }
}

/// Whether a datagram from this address answers what the socket asked a DNS server. Only this host
/// can send from these addresses: the kernel drops what arrives from elsewhere with one of its own.
///
/// # Safety
/// `state` was returned by [`state`].
#[inline(always)]
pub unsafe fn has_asked(state: *const SocketState, from: Address) -> bool {
    // SAFETY: by this function's contract.
    unsafe {
        (is(state, SocketRole::Asking) || is(state, SocketRole::Captured))
            && (from.is_loopback() || from == (*state).own)
    }
}
