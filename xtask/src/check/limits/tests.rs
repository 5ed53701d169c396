#![allow(clippy::unwrap_used)]

use super::*;

fn rules_of(path: &str, text: &str) -> Vec<String> {
    let source = Source::parse(path.as_ref(), text.to_owned()).unwrap().unwrap();
    check(&source).into_iter().map(|violation| violation.rule).collect()
}

fn long_function(lines: usize) -> String {
    format!("//! Doc.\nfn long() {{\n{}}}\n", "    step();\n".repeat(lines - 2))
}

#[test]
fn a_function_may_have_eighty_lines() {
    assert!(rules_of("agent/src/a.rs", &long_function(80)).is_empty());
    let rules = rules_of("agent/src/a.rs", &long_function(81));
    assert_eq!(rules, ["`long` has 81 lines, more than 80"]);
}

#[test]
fn a_file_is_measured_without_its_tests() {
    let code = format!("//! Doc.\n{}", "const A: u8 = 1;\n".repeat(499));
    let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "const B: u8 = 1;\n".repeat(100));
    assert!(rules_of("agent/src/a.rs", &format!("{code}{tests}")).is_empty());
    let rules = rules_of("agent/src/a.rs", &format!("{code}const C: u8 = 1;\n{tests}"));
    assert_eq!(rules, ["the file has 501 lines without its tests, more than 500"]);
}

#[test]
fn tests_may_be_long_but_not_ignored() {
    let text = format!("{}#[ignore]\n#[test]\nfn t() {{}}\n", "const A: u8 = 1;\n".repeat(600));
    assert_eq!(rules_of("agent/src/a/tests.rs", &text), ["tests are not ignored"]);
}

#[test]
fn a_module_is_documented_and_not_called_mod() {
    assert_eq!(rules_of("agent/src/a/mod.rs", "fn f() {}\n").len(), 2);
}
