//! Connections that an agent cannot look after, because it does not keep the tables they are in.

use std::io;
use std::os::fd::AsFd;

use aya::maps::{HashOfMaps, Map, MapData, MapError};
use culvert_abi::direct::{DirectKey, POD_DIRECT_MAP};
use culvert_core::tables::NetnsCookie;

use super::layout;
use crate::capture::netns::Netns;
use crate::capture::pins::Pins;
use crate::capture::{detach, sys};

/// Ends the direct connections in maps that are about to be unpinned: they could not be revoked any
/// more. What cannot be found or ended is told in the log.
pub fn end_all(pins: &Pins) {
    let path = pins.map(POD_DIRECT_MAP);
    if !path.exists() {
        return;
    }
    let tables = MapData::from_pin(&path).and_then(|map| Map::HashOfMaps(map).try_into());
    let tables: HashOfMaps<MapData, u64, MapData> = match tables {
        Ok(tables) => tables,
        Err(error) => return tracing::warn!(%error, "direct connections go on unjudged"),
    };
    let (mut ended, mut left) = (0, 0);
    for cookie in tables.keys().flatten() {
        let Ok(keys) = tables.get(&cookie, 0).and_then(keys) else { continue };
        let netns = netns_of(pins, NetnsCookie(cookie));
        for key in keys {
            match netns.as_ref().map(|netns| end(netns, &key)) {
                Some(Ok(true)) => ended += 1,
                Some(Ok(false)) => {}
                Some(Err(_)) | None => left += 1,
            }
        }
    }
    if ended + left > 0 {
        tracing::warn!(ended, left, "direct connections of a different agent were ended");
    }
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
