//! Tells an application with an IPv4 socket the destination it connected to, not the agent
//! or the backend of a service.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::{context, socket};

/// `BPF_CGROUP_INET4_GETPEERNAME` (Linux 5.8); always 1.
#[cgroup_sock_addr(getpeername4)]
pub fn cv_getpeername4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: `addr` is the context, this program is for IPv4, and the state is the socket's own.
    unsafe {
        let sk = (*addr).__bindgen_anon_1.sk;
        if sk.is_null() {
            return 1;
        }
        if let Some(state) = socket::state(sk.cast())
            && socket::leads_elsewhere(state, context::address4(addr), context::port(addr))
        {
            context::set_words4(addr, (*state).original.words());
            context::set_port(addr, (*state).port as u16);
        }
    }
    1
}
