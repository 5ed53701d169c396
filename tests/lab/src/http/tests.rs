#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn bodies_of_all_three_kinds_are_read() {
    let fixed = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
    let chunked =
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n";
    let until_end = "HTTP/1.0 200 OK\r\nServer: x\r\n\r\nhi";
    for text in [fixed, chunked, until_end] {
        let response = read(text.as_bytes()).unwrap();
        assert_eq!((response.status, response.body.as_str()), (200, "hi"));
    }
}

#[test]
fn a_cut_off_answer_is_an_error() {
    for text in ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi"] {
        assert!(read(text.as_bytes()).is_err(), "{text:?}");
    }
}
