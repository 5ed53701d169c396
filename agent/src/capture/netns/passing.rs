//! Lets direct connections past the rules of istio-cni in the destination's pod.
//!
//! Those lead every new connection to the agent by translating its destination, unless it carries a
//! mark. One nftables table of our own gives that mark to a connection whose SYN carries the option of
//! direct connections, and takes it off again when the translation has been passed: accepted sockets
//! must not inherit it. The option opens no door, `sk_lookup` judges what it lets past. Without our
//! programs no SYN carries it, and istio-cni's rules lead everything as they did.

use std::io;

use culvert_abi::OUTBOUND_MARK;
use culvert_abi::direct::DIRECT_OPTION;

use super::Netns;
use super::nftables::{
    Step, add_table, attribute, chain, expression, nested, number, remove_table, rule,
};

/// Name of the table, in family `inet`.
const TABLE: &str = "culvert-direct";
/// Hook of netfilter.
const NF_INET_PRE_ROUTING: u32 = 0;
/// Between istio-cni's marks, at -150, and its translation, at -100.
const BEFORE: i32 = -120;
/// After the translation.
const AFTER: i32 = -90;

/// `NFT_REG_1`.
const REGISTER: u32 = 1;
/// `NFT_META_MARK`.
const META_MARK: u32 = 3;
/// `NFT_EXTHDR_OP_TCPOPT`.
const TCP_OPTION: u32 = 1;
/// `NFT_CMP_EQ`.
const EQUAL: u32 = 0;

/// Adds the table, unless it is there.
pub fn let_pass(netns: &Netns) -> io::Result<()> {
    let mut steps = direct_gets("before", BEFORE, OUTBOUND_MARK);
    steps.extend(direct_gets("after", AFTER, 0));
    add_table(netns, TABLE, steps)
}

/// Removes the table, if it is there.
pub fn stop(netns: &Netns) -> io::Result<()> {
    remove_table(netns, TABLE)
}

/// A chain in which the SYN of a direct connection gets a mark.
fn direct_gets(name: &str, priority: i32, mark: u32) -> Vec<Step> {
    let [kind, length, identifier @ ..] = DIRECT_OPTION;
    let head = 2u32;
    let load = expression(
        "exthdr",
        &[
            number(1, REGISTER),
            attribute(2, &[kind]),
            number(3, head),
            number(4, u32::from(length) - head),
            number(6, TCP_OPTION),
        ],
    );
    let compare = expression(
        "cmp",
        &[number(1, REGISTER), number(2, EQUAL), nested(3, &[attribute(1, &identifier)])],
    );
    let value = nested(2, &[attribute(1, &mark.to_ne_bytes())]);
    let immediate = expression("immediate", &[number(1, REGISTER), value]);
    let set = expression("meta", &[number(2, META_MARK), number(3, REGISTER)]);
    vec![
        chain(TABLE, name, "filter", NF_INET_PRE_ROUTING, priority),
        rule(TABLE, name, &[load, compare, immediate, set]),
    ]
}
