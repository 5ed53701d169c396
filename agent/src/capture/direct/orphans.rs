//! Connections that an agent cannot look after, because it does not keep the tables they are in.

use std::io;
use std::os::fd::AsFd;

use aya::maps::{HashMap, HashOfMaps, Map, MapData, MapError};
use culvert_abi::direct::{DirectFlow, DirectKey, JOINTS_MAP, Joint, POD_DIRECT_MAP};
use culvert_core::tables::NetnsCookie;

use super::layout;
use crate::capture::netns::Netns;
use crate::capture::pins::Pins;
use crate::capture::{detach, sys};

/// Ends the direct connections in maps that are about to be unpinned: they could not be revoked any
/// more. What cannot be found or ended is told in the log.
pub fn end_all(pins: &Pins) {
    let (ended, left) = end_those(pins, keys);
    if ended + left > 0 {
        tracing::warn!(ended, left, "direct connections of a different agent were ended");
    }
}

/// Ends the accelerated connections in maps that are about to be unpinned: with the maps would go
/// what they hold on its way. Answers how many there were, and how many could not be ended.
pub fn end_accelerated(pins: &Pins) -> (usize, usize) {
    let path = pins.map(JOINTS_MAP);
    let joints = MapData::from_pin(&path).and_then(|map| Map::HashMap(map).try_into());
    // An earlier version's pins know of none.
    let Ok(joints) = joints else { return (0, 0) };
    let joints: HashMap<MapData, u64, Joint> = joints;
    end_those(pins, |flows| {
        let mut found = Vec::new();
        let info = flows.info()?;
        let sizes = (info.key_size() as usize, info.value_size() as usize);
        // Another version's know of none.
        if sizes == (size_of::<DirectKey>(), size_of::<DirectFlow>()) {
            // SAFETY: the map's keys and values have these sizes, and are plain.
            unsafe {
                sys::map_entries(flows.fd().as_fd(), |key: &DirectKey, flow: &DirectFlow| {
                    if joints.get(&flow.socket, 0).is_ok() {
                        found.push(*key);
                    }
                })
            }
            .map_err(MapError::IoError)?;
        }
        Ok(found)
    })
}

fn end_those(
    pins: &Pins,
    those: impl Fn(MapData) -> Result<Vec<DirectKey>, MapError>,
) -> (usize, usize) {
    let (mut ended, mut left) = (0, 0);
    let path = pins.map(POD_DIRECT_MAP);
    if !path.exists() {
        return (ended, left);
    }
    let tables = MapData::from_pin(&path).and_then(|map| Map::HashOfMaps(map).try_into());
    let tables: HashOfMaps<MapData, u64, MapData> = match tables {
        Ok(tables) => tables,
        Err(error) => {
            tracing::warn!(%error, "direct connections go on unjudged");
            return (ended, left);
        }
    };
    for cookie in tables.keys().flatten() {
        let Ok(keys) = tables.get(&cookie, 0).and_then(&those) else { continue };
        let netns = netns_of(pins, NetnsCookie(cookie));
        for key in keys {
            match netns.as_ref().map(|netns| end(netns, &key)) {
                Some(Ok(true)) => ended += 1,
                Some(Ok(false)) => {}
                Some(Err(_)) | None => left += 1,
            }
        }
    }
    (ended, left)
}

fn keys(flows: MapData) -> Result<Vec<DirectKey>, MapError> {
    let size = flows.info()?.key_size() as usize;
    if size != size_of::<DirectKey>() {
        return Err(MapError::InvalidKeySize { size, expected: size_of::<DirectKey>() });
    }
    // SAFETY: the map's keys have this size, and no padding.
    unsafe { sys::map_keys(flows.fd().as_fd()) }.map_err(MapError::IoError)
}

fn netns_of(pins: &Pins, cookie: NetnsCookie) -> Option<Netns> {
    let link = pins.open_pod(cookie).ok()?;
    let inode = sys::link_netns(link.as_fd()).ok()??;
    detach::find_netns(inode, cookie)
}

fn end(netns: &Netns, key: &DirectKey) -> io::Result<bool> {
    let (client, server) = layout::ends_of(key);
    match netns.find_connection(client, server)? {
        Some(cookie) => netns.destroy(client, server, cookie),
        None => Ok(false),
    }
}
