#![allow(clippy::unwrap_used)]

use super::*;

/// As the runtime of containers leaves it: `/proc/sys` read-only, here for this thread alone.
fn make_settings_read_only() {
    let sys = c"/proc/sys".as_ptr();
    let none = std::ptr::null();
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let read_only = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
    // SAFETY: all paths are terminated; the other pointers may be null for these calls. The
    // namespaces are this thread's own.
    unsafe {
        assert_eq!(libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET), 0);
        assert_eq!(libc::mount(none, c"/".as_ptr(), none, private, none.cast()), 0);
        assert_eq!(libc::mount(sys, sys, none, libc::MS_BIND, none.cast()), 0);
        assert_eq!(libc::mount(none, sys, none, read_only, none.cast()), 0);
    }
}

fn written() -> Vec<String> {
    SETTINGS
        .iter()
        .filter_map(|setting| std::fs::read_to_string(format!("/proc/sys/{setting}")).ok())
        .map(|value| value.trim().to_owned())
        .collect()
}

#[test]
fn settings_are_written_also_where_they_are_read_only() {
    // SAFETY: takes nothing.
    if unsafe { libc::geteuid() } != 0 {
        return;
    }
    thread::spawn(|| {
        make_settings_read_only();
        let refused = std::fs::write(format!("/proc/sys/{}", SETTINGS[0]), "1").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
        set("1").unwrap();
        assert!(written().iter().all(|value| value == "1"), "{:?}", written());
        set("0").unwrap();
        assert!(written().iter().all(|value| value == "0"), "{:?}", written());
    })
    .join()
    .unwrap();
}
