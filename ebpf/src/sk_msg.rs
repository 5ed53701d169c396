//! Leads what the application of an accelerated connection sends past TCP, when it may.

use aya_ebpf::macros::sk_msg;
use aya_ebpf::programs::SkMsgContext;

use crate::joint;

/// `BPF_SK_MSG_VERDICT`, with storage of the sender's socket (Linux 5.8). Nothing is refused here.
#[sk_msg]
pub fn cv_sk_msg(ctx: SkMsgContext) -> u32 {
    joint::send(ctx.msg)
}
