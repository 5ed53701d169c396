//! What the programs count.

/// What the programs did, since their maps were made; one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Outbound connections taken to the agent.
    pub captured: u64,
    /// Outbound connections left alone: to loopback or to the pod itself.
    pub passed_own: u64,
    /// Outbound connections left alone: excluded port or range.
    pub passed_excluded: u64,
    /// Outbound connections of the agent itself.
    pub passed_agent: u64,
    /// Outbound connections refused: the pod has no address of the destination's family.
    pub refused_family: u64,
    /// Captured connections that the agent will refuse: the pod's flow table is full.
    pub refused_full: u64,
    /// Captured connections refused for want of the agent's outbound listener.
    pub refused_outbound: u64,
    /// Connections that reached the agent's outbound listener without a flow.
    pub missing: u64,
    /// Inbound connections handed to the agent's plaintext listener.
    pub inbound_plaintext: u64,
    /// Inbound connections handed to the agent's HBONE listener.
    pub inbound_hbone: u64,
    /// Inbound connections left alone: excluded port.
    pub inbound_excluded: u64,
    /// Inbound connections left alone: opened by the node itself.
    pub inbound_node: u64,
    /// Inbound connections refused for want of a listener, or because they named a port of the agent.
    pub inbound_refused: u64,
    /// Connections of the node that go by the agent because the table of probes is full.
    pub probes_full: u64,
    /// Taken to the agent's DNS listeners: connections and connected UDP sockets to a DNS server,
    /// and datagrams that unconnected ones sent to one.
    pub captured_dns: u64,
}

const _: () = assert!(size_of::<Counts>() == 15 * 8);
