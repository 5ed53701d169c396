//! Connections to an IPv4 destination, from an IPv4 socket.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::connect::{Connect, connect};
use crate::context;

/// `BPF_CGROUP_INET4_CONNECT`: 1 lets the call go on, 0 fails it.
#[cgroup_sock_addr(connect4)]
pub fn cv_connect4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: `addr` is the context, and this program is for IPv4.
    match connect(&ctx, unsafe { context::address4(addr) }) {
        Connect::Untouched => 1,
        Connect::Refused => 0,
        Connect::Captured(target, port) => {
            // SAFETY: as above.
            unsafe {
                context::set_words4(addr, target.words());
                context::set_port(addr, port);
            }
            1
        }
        Connect::Direct(backend, port) => {
            // SAFETY: as above.
            unsafe {
                context::set_words4(addr, backend.words());
                context::set_port(addr, port);
            }
            1
        }
    }
}
