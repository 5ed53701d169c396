//! The corridor of connections that an enrolled pod opens: original destination, route, relay.

use std::sync::Arc;

use culvert_core::addr::{AppAddr, ClientAddr, OriginalDst};
use culvert_core::route::{self, Outbound, Route, Routed};
use culvert_core::workload::Workload;
use tokio::net::{TcpListener, TcpStream};

use crate::decide::decide;
use crate::node::{Node, Pod};

mod local;
mod plain;
mod tunnel;

/// Accepts captured connections of `pod` until it is withdrawn, then what is still queued.
pub async fn accept(node: Arc<Node>, pod: Arc<Pod>, listener: TcpListener) {}
