//! Datagrams that an unconnected socket sends to an IPv4 destination, also an IPv4-mapped one.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::connect::{Connect, send};
use crate::context;

/// `BPF_CGROUP_UDP4_SENDMSG` (Linux 4.18): 1 lets the call go on, 0 fails it.
#[cgroup_sock_addr(sendmsg4)]
pub fn cv_sendmsg4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: `addr` is the context, and this program is for IPv4.
    match send(&ctx, unsafe { context::address4(addr) }) {
        Connect::Untouched => 1,
        Connect::Refused | Connect::Direct(..) => 0,
        Connect::Captured(target, port) => {
            // SAFETY: as above.
            unsafe {
                context::set_words4(addr, target.words());
                context::set_port(addr, port);
            }
            1
        }
    }
}
