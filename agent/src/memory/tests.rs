#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn the_program_goes_on_when_its_pages_were_let_go() {
    give_back();
    let kept = vec![7_u8; 3 << 20];
    for _ in 0..3 {
        settle();
        let error = "a constant".parse::<f64>().unwrap_err();
        assert_eq!(error.to_string(), "invalid float literal");
        assert!(!std::fs::read("/proc/self/maps").unwrap().is_empty());
    }
    assert!(kept.iter().all(|byte| *byte == 7));
}
