//! Finds where the cgroup2 hierarchy is mounted.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The mount point of a cgroup2 file system's root, from the text of `/proc/self/mountinfo`
/// (proc_pid_mountinfo(5)). On pure hosts that is `/sys/fs/cgroup`, on hybrid ones
/// `/sys/fs/cgroup/unified`. A mount of a part of the hierarchy is taken only for want of better.
pub fn find_cgroup2(mountinfo: &str) -> Option<PathBuf> {
    let mounts: Vec<(&str, PathBuf)> = mountinfo.lines().filter_map(cgroup2_mount).collect();
    let whole = mounts.iter().find(|(root, _)| *root == "/");
    whole.or(mounts.first()).map(|(_, mount_point)| mount_point.clone())
}

/// Root and mount point of one line, if it is a cgroup2 mount. The fields before the `-` vary in
/// number.
fn cgroup2_mount(line: &str) -> Option<(&str, PathBuf)> {
    let (mount, file_system) = line.split_once(" - ")?;
    if file_system.split(' ').next() != Some("cgroup2") {
        return None;
    }
    let mut fields = mount.split(' ').skip(3);
    Some((fields.next()?, unescape(fields.next()?)))
}

/// Spaces and the like are written as a backslash and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            Some(_) | None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}
