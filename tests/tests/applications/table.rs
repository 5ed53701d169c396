//! The table of the documentation, and the cases that show its rows.

use super::stage::{Ground, Path, Stage};
use super::{agents, data, ending, names, opening, time};
use anyhow::Result;

/// The page that lists what applications can notice.
const PAGE: &str = include_str!("../../../docs/applications.md");

/// How a case runs.
pub enum Case {
    /// Beside others, once for each family.
    Beside(fn(&Stage) -> Result<()>),
    /// By itself, once for each family: it loads the machine, or has to come last.
    Alone(fn(&Stage) -> Result<()>),
    /// By itself, after all others: it changes the mesh or its agents.
    Changing(fn(&mut Ground) -> Result<()>),
}

macro_rules! cases {
    ($($way:ident $room:ident::$name:ident,)*) => {
        &[$((stringify!($name), Case::$way($room::$name))),*]
    };
}

/// In the order of the page.
pub const CASES: &[(&str, Case)] = cases![
    Beside opening::connect_succeeds,
    Beside opening::closed_port_resets,
    Beside opening::unreachable_destination_resets,
    Beside opening::full_accept_queue_delays_data,
    Beside opening::connect_time,
    Beside opening::first_connection_delay,
    Beside opening::nonblocking_connect,
    Beside opening::nonblocking_closed_port_resets,
    Beside opening::af_unspec_reconnects,
    Beside opening::bound_address_connects,
    Beside opening::bound_port_connects,
    Beside opening::one_port_to_two_destinations,
    Beside opening::bound_device_connects,
    Beside opening::v4_mapped_connects,
    Beside opening::mptcp_client_connects,
    Beside opening::fast_open_client_connects,
    Alone opening::many_connections_in_a_row,
    Beside opening::own_address_is_untouched,
    Beside names::getpeername_is_the_destination,
    Beside names::getsockname_is_the_own_address,
    Beside names::server_sees_the_client_address,
    Beside names::server_sees_another_port,
    Beside names::server_getsockname,
    Beside names::original_dst_is_absent,
    Alone data::large_transfer_both_ways,
    Beside data::many_small_writes,
    Beside data::server_speaks_first,
    Beside data::sendfile_and_splice,
    Beside data::peek_leaves_data,
    Beside data::waiting_options,
    Alone data::nodelay_is_prompt,
    Beside data::cork_keeps_bytes,
    Beside data::urgent_byte_becomes_ordinary,
    Beside data::stalled_reader_blocks_its_writer,
    Alone data::stalled_readers_hold_up_nobody,
    Beside ending::clean_close,
    Beside ending::client_half_close,
    Beside ending::server_half_close,
    Beside ending::shutdown_order,
    Beside ending::server_reset_arrives,
    Beside ending::client_reset_arrives,
    Beside ending::server_unread_close_arrives,
    Beside ending::client_unread_close_arrives,
    Beside ending::write_after_close_fails,
    Beside ending::linger_waits_for_the_agent,
    Beside ending::vanished_peer_resets,
    Alone time::idle_connection_stays,
    Beside time::keepalive_is_answered,
    Beside time::tcp_info_is_of_the_first_leg,
    Beside time::packet_marks_end_at_the_agent,
    Beside agents::policy_refusal_resets,
    Changing agents::policy_change_resets,
    Beside agents::missing_waypoint_resets,
    Changing agents::enrolment_keeps_connections,
    Changing agents::withdrawal_keeps_connections,
    Changing agents::stopped_agent_refuses,
    Changing agents::killed_agent_resets,
    Changing agents::draining_agent_lets_finish,
    Beside agents::exclusions_are_untouched,
    Beside agents::other_protocols_are_untouched,
];

/// A row of the page: its test and what it says of each path.
struct Row {
    test: &'static str,
    cells: [&'static str; 3],
}

/// All rows whose last cell is the name of a test.
fn rows() -> impl Iterator<Item = Row> {
    PAGE.lines().filter_map(|line| {
        let line = line.strip_prefix('|')?.strip_suffix('|')?;
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_case, plain, same, cross, test] = *cells.as_slice() else { return None };
        let test = test.strip_prefix('`')?.strip_suffix('`')?;
        Some(Row { test, cells: [plain, same, cross] })
    })
}

/// The names of the page's tests, in order.
pub fn documented() -> Vec<&'static str> {
    rows().map(|row| row.test).collect()
}

/// What holds only where the kernel programs lead connections to the agent: packet rules know of no
/// exclusions, translate what is under way as if it were new, do not follow a socket to its device, and
/// leave their own traces.
const BY_PROGRAMS: [&str; 6] = [
    "bound_device_connects",
    "one_port_to_two_destinations",
    "original_dst_is_absent",
    "enrolment_keeps_connections",
    "withdrawal_keeps_connections",
    "exclusions_are_untouched",
];

/// Whether the page says anything of this case on this path.
pub fn applies(test: &str, path: Path) -> bool {
    if path != Path::Plain && culvert_tests::is_by_rules() && BY_PROGRAMS.contains(&test) {
        return false;
    }
    let cell = match path {
        // What the kernel carries is as without Culvert, but for what is captured all the same.
        Path::Direct if CAPTURED.contains(&test) => return false,
        Path::Plain | Path::Direct => 0,
        Path::Same => 1,
        Path::Cross => 2,
    };
    rows().any(|row| row.test == test && row.cells[cell] != "–")
}

/// Cases whose connections the agent carries, wherever they go.
const CAPTURED: [&str; 2] = ["unreachable_destination_resets", "mptcp_client_connects"];
