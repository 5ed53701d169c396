//! Datagrams that an unconnected IPv6 socket sends to an IPv6 destination.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::connect::{Connect, send};
use crate::context;

/// `BPF_CGROUP_UDP6_SENDMSG` (Linux 4.18): 1 lets the call go on, 0 fails it.
#[cgroup_sock_addr(sendmsg6)]
pub fn cv_sendmsg6(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: `addr` is the context, and this program is for IPv6.
    match send(&ctx, unsafe { context::address6(addr) }) {
        Connect::Untouched => 1,
        Connect::Refused | Connect::Direct(..) => 0,
        Connect::Captured(target, port) => {
            // SAFETY: as above.
            unsafe {
                context::set_words6(addr, target.words());
                context::set_port(addr, port);
            }
            1
        }
    }
}
