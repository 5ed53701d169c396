#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn pure_and_hybrid_mounts_are_found() {
    let pure = "29 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(mount_point(pure), Some(PathBuf::from("/sys/fs/cgroup")));
    let hybrid = "30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                  40 29 0:35 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
    assert_eq!(mount_point(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
}

#[test]
fn a_machine_without_version_2_has_no_mount() {
    assert_eq!(mount_point("30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
}
