//! Direct connections that are accelerated: what one application sends goes straight into the
//! receive queue of the other's socket.
//!
//! A receiver takes what lies in that queue before what arrived on the ordinary path, and one that
//! waits for the ordinary path does not see the queue. So the two never hold bytes of one direction
//! at once, unless the queue's are the older ones:
//!
//! - Bytes go the short way only when the receiver has read all that went the ordinary way, and
//!   nobody there is still inside a call that reads only that: the receiver is *settled*.
//! - Bytes may go the ordinary way at any time. From then on the receiver is not settled.
//!
//! That a receiver is settled is seen in three ways. It sends itself, so that its socket is locked by
//! the sender, and nobody sleeps there. Or nobody has its socket at all. Or whoever sleeps there, and
//! no sender is among them, is where both are waited for.

use core::arch::asm;
use core::ffi::c_void;
use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::sk_action::SK_PASS;
use aya_ebpf::bindings::{
    BPF_ANY, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_TCP_CLOSE_WAIT, BPF_TCP_ESTABLISHED,
    BPF_TCP_FIN_WAIT1, BPF_TCP_FIN_WAIT2, bpf_sock_ops, sk_msg_md,
};
use aya_ebpf::helpers::generated::{
    bpf_get_socket_cookie, bpf_map_update_elem, bpf_msg_redirect_hash, bpf_probe_read_kernel,
    bpf_sk_storage_delete, bpf_sk_storage_get, bpf_sock_hash_update,
};
use aya_ebpf::programs::SockOpsContext;
use culvert_abi::direct::{
    DirectFlow, DirectKey, FlowEvent, Joint, JointEnd, JointKey, Live, MAX_JOINED_PER_POD, Offsets,
};

use crate::context::{Ends, read};
use crate::counts::count_direct;
use crate::direct::direct_key;
use crate::maps::{ADDRESSES, JOINED, JOINT_ENDS, JOINTS, LIVE, NO_JOINT, OFFSETS, POD_DIRECT};
use crate::sockops::sock;

/// The redirection goes into the receive queue of the socket that is named.
const BPF_F_INGRESS: u64 = 1;
/// What the low bits of `sk_user_data` say about it (`SK_USER_DATA_PTRMASK`).
const USER_DATA_FLAGS: u64 = 7;
/// How many that wait for a socket are looked at: pollers, mostly.
const WAITERS: usize = 4;

/// The client's end is established. Its socket joins first, the server's only if it has.
#[inline(always)]
pub fn join_client(ctx: &SockOpsContext, netns: u64, ends: &Ends) {
    // SAFETY: the inner map is only used while this program runs.
    let Some(flows) = (unsafe { POD_DIRECT.get(&netns) }) else { return };
    // SAFETY: the value is read at once.
    let Some(flow) = (unsafe { flows.get(direct_key(ends)) }) else { return };
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if flow.socket != cookie || flow.arrived != DirectFlow::ADMITTED {
        return;
    }
    let Some(live) = LIVE.get_ptr_mut(netns) else { return };
    // SAFETY: the entry stays readable while the program runs. Signed: where the agent counted anew,
    // it may have missed some.
    if unsafe { read!((*live).joined) } as i64 >= MAX_JOINED_PER_POD as i64 {
        return count_direct(|counts| &mut counts.joint_full);
    }
    let key: *const u64 = &cookie;
    let (joints, none) = (ptr::from_ref(&JOINTS).cast_mut(), ptr::from_ref(&NO_JOINT).cast_mut());
    // SAFETY: the helper reads a key from this stack, and a value from where the constants are.
    let made = unsafe {
        bpf_map_update_elem(joints.cast(), key.cast_mut().cast(), none.cast(), BPF_NOEXIST.into())
    };
    if made != 0 {
        return count_direct(|counts| &mut counts.joint_full);
    }
    let Some(joint) = JOINTS.get_ptr_mut(cookie) else { return };
    // SAFETY: the entry stays valid while the program runs; only this end writes its part now.
    if join(ctx.ops, cookie, JointKey::CLIENT, unsafe { &mut (*joint).client }) {
        add(live, 1);
    } else {
        let _ = JOINTS.remove(cookie);
    }
}

/// The server's end is established.
#[inline(always)]
pub fn join_server(ctx: &SockOpsContext, netns: u64, ends: &Ends) {
    // SAFETY: the value is read at once.
    let Some(source) = (unsafe { ADDRESSES.get(ends.remote) }).copied() else { return };
    // SAFETY: the inner map is only used while this program runs.
    let Some(flows) = (unsafe { POD_DIRECT.get(&source) }) else { return };
    let key = DirectKey {
        source: ends.remote,
        destination: ends.local,
        source_port: ends.remote_port,
        destination_port: ends.local_port,
    };
    // SAFETY: the value is read at once.
    let Some(flow) = (unsafe { flows.get(key) }) else { return };
    let cookie = flow.socket;
    if flow.destination != netns {
        return;
    }
    let Some(joint) = JOINTS.get_ptr_mut(cookie) else { return };
    // SAFETY: the entry stays valid while the program runs; only this end writes its part now.
    let (client, server) = unsafe { (&(*joint).client, &mut (*joint).server) };
    // SAFETY: `ctx.ops` is the context.
    let (sends, receives) = unsafe { (read!((*ctx.ops).snd_nxt), read!((*ctx.ops).rcv_nxt)) };
    if receives != client.sends || sends != client.receives {
        return count_direct(|counts| &mut counts.joint_unequal);
    }
    // Nobody can have read from it yet.
    server.settled = JointEnd::SETTLED | receives as u64;
    if join(ctx.ops, cookie, JointKey::SERVER, server) {
        count_direct(|counts| &mut counts.joined);
    }
}

/// Puts a socket into the map, from where it leaves when it is closed.
#[inline(always)]
fn join(ops: *mut bpf_sock_ops, cookie: u64, end: u32, own: &mut JointEnd) -> bool {
    let sk = sock(ops);
    if sk.is_null() {
        return false;
    }
    let mut key = JointKey { socket: cookie, end, reserved: 0 };
    let key = ptr::from_mut(&mut key);
    let create = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: `sk` is the context's, and not null; the value lives on this stack.
    if unsafe { bpf_sk_storage_get(ends(), sk.cast(), key.cast(), create) }.is_null() {
        count_direct(|counts| &mut counts.joint_full);
        return false;
    }
    let joined = ptr::from_ref(&JOINED).cast_mut().cast();
    // SAFETY: the helper takes this context in this callback (Linux 4.18), and reads the key.
    if unsafe { bpf_sock_hash_update(ops, joined, key.cast(), BPF_ANY.into()) } != 0 {
        count_direct(|counts| &mut counts.joint_full);
        // SAFETY: as above.
        unsafe { bpf_sk_storage_delete(ends(), sk.cast()) };
        return false;
    }
    // SAFETY: `ops` is the context.
    (own.sends, own.receives) = unsafe { (read!((*ops).snd_nxt), read!((*ops).rcv_nxt)) };
    own.socket = sk as u64;
    true
}

/// The client's socket has closed. Whether it was joined.
#[inline(always)]
pub fn forget(cookie: u64) -> bool {
    JOINTS.remove(cookie).is_ok()
}

/// Adds to what TCP counts what went past it.
///
/// # Safety
/// The event can be written.
#[inline(always)]
pub unsafe fn tell(event: *mut FlowEvent, cookie: u64) {
    // SAFETY: the values are read at once.
    if let Some(joint) = unsafe { JOINTS.get(cookie) } {
        // SAFETY: by this function's contract.
        unsafe {
            (*event).sent += joint.client.redirected;
            (*event).received += joint.server.redirected;
        }
    }
}

/// Changes how many of a pod's connections are accelerated, atomically.
#[inline(always)]
pub fn add(live: *mut Live, number: u64) {
    // SAFETY: the entry stays valid while the program runs; the field is at this place.
    unsafe { asm!("lock *(u64 *)({0} + 16) += {1}", in(reg) live, in(reg) number) };
}
const _: () = assert!(core::mem::offset_of!(Live, joined) == 16);

#[inline(always)]
fn ends() -> *mut c_void {
    ptr::from_ref(&JOINT_ENDS).cast_mut().cast()
}

/// Which way a message goes.
enum Way {
    Short,
    /// The ordinary one; so it was before, too.
    Ordinary,
    /// The ordinary one from now on.
    Leaves(Why),
}

enum Why {
    Full,
    LowWater,
    Layered,
    Closing,
}

/// An application sends. It holds the lock of its socket.
#[inline(always)]
pub fn send(msg: *mut sk_msg_md) -> u32 {
    // SAFETY: `msg` is the context.
    let sk = unsafe { (*msg).__bindgen_anon_3.sk };
    if sk.is_null() {
        return SK_PASS;
    }
    // SAFETY: `sk` is the context's, and not null; a null value asks for a look-up only.
    let own = unsafe { bpf_sk_storage_get(ends(), sk.cast(), ptr::null_mut(), 0) };
    let own: *const JointKey = own.cast();
    if own.is_null() {
        return SK_PASS;
    }
    // SAFETY: the value is this socket's, and not written any more.
    let own = unsafe { *own };
    // Once the client's socket has closed it may become another connection's while the program runs;
    // this one's bytes then find no receiver in the map.
    let Some(joint) = JOINTS.get_ptr_mut(own.socket) else { return SK_PASS };
    // SAFETY: the entry stays valid while the program runs. The other end may write it, too, in whole
    // fields.
    let Joint { client, server } = unsafe { &mut *joint };
    if client.socket == 0 || server.socket == 0 {
        return SK_PASS;
    }
    let (from, to, other) = match own.end {
        JointKey::CLIENT => (client, server, JointKey::SERVER),
        _ => (server, client, JointKey::CLIENT),
    };
    let gate = Gate { offsets: OFFSETS.load() };
    gate.note_sender(from);
    let mut way = gate.way(from, to);
    if let Way::Short = way {
        let mut key = JointKey { socket: own.socket, end: other, reserved: 0 };
        let key = ptr::from_mut(&mut key);
        let joined = ptr::from_ref(&JOINED).cast_mut().cast();
        // SAFETY: the helper takes this context (Linux 4.18), and reads the key.
        if unsafe { bpf_msg_redirect_hash(msg, joined, key.cast(), BPF_F_INGRESS) } as u32
            == SK_PASS
        {
            // SAFETY: `msg` is the context.
            from.redirected += unsafe { read!((*msg).size) } as u64;
            return SK_PASS;
        }
        way = Way::Leaves(Why::Closing);
    }
    to.settled = 0;
    match way {
        Way::Leaves(Why::Full) => count_direct(|counts| &mut counts.left_full),
        Way::Leaves(Why::LowWater) => count_direct(|counts| &mut counts.left_low_water),
        Way::Leaves(Why::Layered) => count_direct(|counts| &mut counts.left_layered),
        Way::Leaves(Why::Closing) => count_direct(|counts| &mut counts.left_closing),
        Way::Short | Way::Ordinary => {}
    }
    SK_PASS
}

struct Gate {
    offsets: Offsets,
}

impl Gate {
    /// The sender's own socket is locked, so whoever reads from it is asleep or elsewhere.
    #[inline(always)]
    fn note_sender(&self, from: &mut JointEnd) {
        if from.has_sent == 0 {
            from.has_sent = 1;
        }
        let Some(read) = look::<u32>(from.socket, self.offsets.copied_seq) else { return };
        let settled = JointEnd::SETTLED | read as u64;
        if from.settled != settled && !self.has_sleepers(from.socket) {
            from.settled = settled;
        }
    }

    #[inline(always)]
    fn way(&self, from: &JointEnd, to: &mut JointEnd) -> Way {
        let offsets = &self.offsets;
        let Some(written) = look::<u32>(from.socket, offsets.write_seq) else {
            return Way::Ordinary;
        };
        let settled = JointEnd::SETTLED | written as u64;
        if to.settled != settled {
            if look::<u32>(to.socket, offsets.copied_seq) != Some(written) || !self.is_settled(to) {
                return Way::Ordinary;
            }
        }
        match self.why_not(from, to) {
            Some(_) if to.settled == 0 => Way::Ordinary,
            Some(why) => Way::Leaves(why),
            None => {
                to.settled = settled;
                Way::Short
            }
        }
    }

    /// What a settled receiver may have against it.
    #[inline(always)]
    fn why_not(&self, from: &JointEnd, to: &JointEnd) -> Option<Why> {
        let offsets = &self.offsets;
        // One that has shut down its sending gets the error of the ordinary path, and one whose
        // connection was ended gets nothing through; neither does it receive anything.
        let sends = look::<u8>(from.socket, offsets.state).unwrap_or(0) as u32;
        let receives = look::<u8>(to.socket, offsets.state).unwrap_or(0) as u32;
        if sends != BPF_TCP_ESTABLISHED && sends != BPF_TCP_CLOSE_WAIT {
            return Some(Why::Closing);
        }
        if receives != BPF_TCP_ESTABLISHED
            && receives != BPF_TCP_FIN_WAIT1
            && receives != BPF_TCP_FIN_WAIT2
        {
            return Some(Why::Closing);
        }
        let taken = look::<i32>(to.socket, offsets.rmem_alloc).unwrap_or(i32::MAX);
        if taken > look::<i32>(to.socket, offsets.rcvbuf).unwrap_or(0) {
            return Some(Why::Full);
        }
        if look::<i32>(to.socket, offsets.rcvlowat) != Some(1) {
            return Some(Why::LowWater);
        }
        if look::<u64>(to.socket, offsets.ulp_ops) != Some(0)
            || look::<u64>(from.socket, offsets.ulp_ops) != Some(0)
        {
            return Some(Why::Layered);
        }
        None
    }

    /// Whether nobody is inside a call that reads from the ordinary path of a socket which has
    /// nothing there.
    #[inline(always)]
    fn is_settled(&self, to: &JointEnd) -> bool {
        if self.is_owned(to.socket) {
            return false;
        }
        let sleepers = self.has_sleepers(to.socket);
        if self.is_owned(to.socket) {
            return false;
        }
        !sleepers || (to.has_sent == 0 && self.users(to.socket) > 1)
    }

    /// Whether a call on the socket is under way, and not asleep (`sock_owned_by_user`).
    #[inline(always)]
    fn is_owned(&self, socket: u64) -> bool {
        look::<u32>(socket, self.offsets.owned) != Some(0)
    }

    /// Whether a task may sleep inside a call on the socket. What `epoll` leaves there has no task.
    #[inline(always)]
    fn has_sleepers(&self, socket: u64) -> bool {
        let offsets = &self.offsets;
        let Some(queue) = look::<u64>(socket, offsets.wq) else { return true };
        let head = queue.wrapping_add(offsets.waiting as u64);
        let mut entry = look::<u64>(head, 0).unwrap_or(0);
        let mut n = 0;
        while n < WAITERS {
            if entry == head {
                return false;
            }
            let waiter = entry.wrapping_sub(offsets.entry as u64);
            if look::<u64>(waiter, offsets.private) != Some(0) {
                return true;
            }
            entry = look::<u64>(entry, 0).unwrap_or(0);
            n += 1;
        }
        true
    }

    /// How many hold the socket's place in the map: itself, and each call that reads from both or
    /// sends.
    #[inline(always)]
    fn users(&self, socket: u64) -> u32 {
        let data = look::<u64>(socket, self.offsets.user_data).unwrap_or(0) & !USER_DATA_FLAGS;
        look::<u32>(data, self.offsets.users).unwrap_or(0)
    }
}

/// Reads a number out of the kernel (`bpf_probe_read_kernel`, Linux 5.5): none where there is none.
#[inline(always)]
fn look<T: Copy + Default>(address: u64, offset: u32) -> Option<T> {
    let mut value = T::default();
    let pointer = ptr::from_mut(&mut value);
    let from = address.wrapping_add(offset as u64) as *const c_void;
    // SAFETY: the helper writes as many bytes as there are, and takes any address.
    let read = unsafe { bpf_probe_read_kernel(pointer.cast(), size_of::<T>() as u32, from) };
    (read == 0).then_some(value)
}
