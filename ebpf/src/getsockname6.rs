//! Tells an application with an IPv6 socket its pod's address, not loopback.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use culvert_abi::SocketRole;

use crate::{context, socket};

/// `BPF_CGROUP_INET6_GETSOCKNAME` (Linux 5.8); always 1.
#[cgroup_sock_addr(getsockname6)]
pub fn cv_getsockname6(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: `addr` is the context, this program is for IPv6, and the state is the socket's own.
    unsafe {
        let sk = (*addr).__bindgen_anon_1.sk;
        if sk.is_null() || !context::address6(addr).is_loopback() {
            return 1;
        }
        if let Some(state) = socket::state(sk.cast())
            && socket::is(state, SocketRole::Captured)
        {
            context::set_words6(addr, (*state).own.words());
        }
    }
    1
}
