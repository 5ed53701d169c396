#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn samples_are_summed_by_name_and_labels() {
    let text =
        "# TYPE x counter\nx_total{a=\"1\",b=\"2\"} 3\nx_total{a=\"2\"} 4\nx_total_more 9\nx 7\n";
    assert_eq!(sum(text, "x_total", &[]), 7.0);
    assert_eq!(sum(text, "x_total", &["a=\"1\""]), 3.0);
    assert_eq!(sum(text, "x", &[]), 7.0);
    assert_eq!(sum(text, "y", &[]), 0.0);
}
