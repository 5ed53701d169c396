//! Culvert's kernel programs: they recognise the connections of enrolled pods and lead them to the
//! agent.
//!
//! They judge nothing. What may be reached, by whom and how, is decided by the agent; the tables in
//! [`maps`] hold what it decided. A connection whose namespace is not in `cv_pods` passes every
//! program untouched, so that several agents can share one kernel.
//!
//! | program | attached to | from Linux |
//! |---|---|---|
//! | `cv_connect4`, `cv_connect6` | cgroup | 4.17 |
//! | `cv_sendmsg4`, `cv_sendmsg6` | cgroup | 4.18 |
//! | `cv_recvmsg4`, `cv_recvmsg6` | cgroup | 5.2 |
//! | `cv_getpeername4`, `…6`, `cv_getsockname4`, `…6` | cgroup | 5.8 |
//! | `cv_sockops` | cgroup | 5.15, for the namespace's cookie |
//! | `cv_sk_lookup` | each pod's network namespace | 5.9 |
//! | `cv_sk_msg` | `cv_joined`, while the agent accelerates | 5.8, for storage of the sender's socket |

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod context;
mod counts;
mod maps;
mod socket;

mod connect;
mod direct;
mod joint;

mod connect4;
mod connect6;
mod getpeername4;
mod getpeername6;
mod getsockname4;
mod getsockname6;
mod recvmsg4;
mod recvmsg6;
mod sendmsg4;
mod sendmsg6;
mod sk_lookup;
mod sk_msg;
mod sockops;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// `bpf_get_netns_cookie` is only for programs under a licence compatible with the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
