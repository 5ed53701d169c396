#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert_tests::parsers::run("tls_hello", bytes));
