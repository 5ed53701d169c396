//! Holds connection tracking and translation in a namespace whose rules others may take away.
//!
//! The kernel tracks and translates in a namespace only as long as some rule there asks for it. When
//! istio-cni takes a pod out of the mesh it removes its rules, the last ones as a rule; connections
//! that were translated on their way to the agent would then arrive nowhere. One nftables table of
//! our own, which asks for both and decides nothing, keeps them whole until they have ended. It also
//! keeps what was opened meanwhile known as established, so that rules which come again do not take
//! it for new.

use std::io;

use super::Netns;
use super::nftables::{add_table, chain, expression, number, remove_table, rule};

/// Name of the table, in family `inet`.
const TABLE: &str = "culvert";
const CHAIN: &str = "hold";
/// Hook of netfilter.
const NF_INET_LOCAL_OUT: u32 = 3;
/// After everybody else's translation.
const PRIORITY: i32 = 200;

/// Adds the table, unless it is there.
pub fn hold(netns: &Netns) -> io::Result<()> {
    // `ct state` into a register: that is all.
    let ask = expression("ct", &[number(1, 8), number(2, 0)]);
    let steps =
        vec![chain(TABLE, CHAIN, "nat", NF_INET_LOCAL_OUT, PRIORITY), rule(TABLE, CHAIN, &[ask])];
    add_table(netns, TABLE, steps)
}

/// Removes the table, if it is there. Connections that need translation break, if nobody else asks
/// for it.
pub fn release(netns: &Netns) -> io::Result<()> {
    remove_table(netns, TABLE)
}
