#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn missing_feature_is_told_with_the_version_that_has_it() {
    let missing = Feature { name: "sk_lookup", needs: "5.9", required: true, supported: false };
    let error = require(&missing).unwrap_err().to_string();
    assert!(error.starts_with("sk_lookup needs Linux 5.9, this is "), "{error}");
    require(&Feature { supported: true, ..missing }).unwrap();
    require(&Feature { required: false, ..missing }).unwrap();
}

#[test]
fn levels_are_those_of_the_kernel_side() {
    assert_eq!(log_level(LevelFilter::OFF), 0);
    assert_eq!(log_level(LevelFilter::DEBUG), aya_log::Level::Debug as u8);
    assert_eq!(log_level(LevelFilter::TRACE), aya_log::Level::Trace as u8);
}
