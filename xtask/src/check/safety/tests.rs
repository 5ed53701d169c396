#![allow(clippy::unwrap_used)]

use super::*;

fn lines_of(text: &str) -> Vec<usize> {
    let source = Source::parse("agent/src/capture.rs".as_ref(), text.to_owned());
    check(&source.unwrap().unwrap()).into_iter().map(|violation| violation.line).collect()
}

#[test]
fn a_block_without_a_comment_is_found() {
    assert_eq!(lines_of("fn f() {\n    let x = 1;\n    unsafe { g() };\n}\n"), [3]);
    assert_eq!(lines_of("struct S;\n\nunsafe impl Send for S {}\n"), [3]);
}

#[test]
fn the_comment_may_stand_before_the_statement() {
    let text = "fn f() {\n    // SAFETY: fine,\n    // and safe.\n    let x = call(\n        unsafe { g() },\n    );\n}\n";
    assert!(lines_of(text).is_empty());
}

#[test]
fn a_comment_of_another_statement_does_not_count() {
    let text = "fn f() {\n    // SAFETY: fine\n    unsafe { g() };\n    unsafe { h() };\n}\n";
    assert_eq!(lines_of(text), [4]);
}
