//! Where connections go: services and their endpoints, waypoints, other networks, and peers that are
//! not Culvert. Each with what must be refused beside it.

#![allow(clippy::unwrap_used)]

mod routing {
    pub mod networks;
    pub mod peers;
    pub mod services;
    pub mod stage;
    pub mod waypoints;
}
