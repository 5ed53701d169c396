//! One command back to before: removing programs, maps, pins and the pods' routing rules.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use culvert_core::tables::NetnsCookie;

use super::netns::Netns;
use super::pins::Pins;
use super::{CaptureError, sys};

/// What was taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DetachReport {
    /// Programs that were attached to the cgroup.
    pub programs: usize,
    /// Pods that were enrolled.
    pub pods: usize,
    /// Accelerated connections: they cannot go on as plain ones, and were ended.
    pub ended: usize,
    /// Pods whose routing rules stay, because no process and no mount leads to their namespace.
    /// The kernel removes them together with it.
    pub unreachable: Vec<NetnsCookie>,
}

/// Removes everything that agents on this folder left in the kernel. New connections of their pods
/// go their plain way from then on; connections that the kernel carries by itself go on as plain
/// ones, but those that it accelerates: what they hold on its way goes with the maps, so they are ended.
/// A running agent must be stopped first.
pub fn detach(pin_path: &Path) -> Result<DetachReport, CaptureError> {
    let Some(pins) = Pins::open_existing(pin_path)? else { return Ok(DetachReport::default()) };
    let mut unreachable = Vec::new();
    for cookie in pins.pods()? {
        let link = pins.open_pod(cookie)?;
        let inode =
            sys::link_netns(link.as_fd()).map_err(|error| CaptureError::Pod { cookie, error })?;
        // Without an inode the namespace is gone, and its rules are too.
        let Some(inode) = inode else { continue };
        match find_netns(inode, cookie) {
            Some(netns) => {
                let gone = netns
                    .stop_direct_passing()
                    .and_then(|()| netns.remove_return_route())
                    .and_then(|()| netns.release_translations());
                gone.map_err(|error| CaptureError::Pod { cookie, error })?;
            }
            None => unreachable.push(cookie),
        }
    }
    let removed = pins.remove()?;
    if removed.stuck > 0 {
        tracing::warn!(connections = removed.stuck, "accelerated connections could not be ended");
    }
    let (programs, pods, ended) = (removed.links, removed.pods, removed.ended);
    Ok(DetachReport { programs, pods, ended, unreachable })
}

/// Looks where a namespace can be entered: at the processes within, then at mounts.
pub fn find_netns(inode: u64, cookie: NetnsCookie) -> Option<Netns> {
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path().join("ns/net"));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // "… MOUNT-ID PARENT DEVICE ROOT MOUNT-POINT …", where the root reads "net:[INODE]".
    let root = format!("net:[{inode}]");
    let mounted = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        (fields.next()? == root).then(|| fields.next().map(PathBuf::from))?
    });
    processes
        .chain(mounted)
        .filter(|path| fs::metadata(path).is_ok_and(|found| found.ino() == inode))
        .filter_map(|path| Netns::open(path).ok())
        .find(|netns| netns.cookie() == cookie)
}
