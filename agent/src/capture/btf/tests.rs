#![allow(clippy::unwrap_used)]

use super::{Btf, BtfError};

/// A description with these strings and types.
fn description(strings: &[u8], types: &[u32]) -> Vec<u8> {
    let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let (type_length, string_length) = (types.len() as u32, strings.len() as u32);
    let mut bytes = vec![];
    bytes.extend(0xeb9f_u16.to_ne_bytes());
    bytes.extend([1, 0]);
    for word in [24, 0, type_length, type_length, string_length] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(types);
    bytes.extend(strings);
    bytes
}

fn small() -> Vec<u8> {
    // "\0sock\0a\0b\0c\0"
    let strings = b"\0sock\0a\0b\0c\0";
    let head = |kind: u32, count: u32| kind << 24 | count;
    description(
        strings,
        &[
            // 1: an integer
            [0, head(1, 0), 4].as_slice(),
            &[32],
            // 2: a union without a name, with `c`
            &[0, head(5, 1), 4, 10, 1, 0],
            // 3: a name for it
            &[8, head(8, 0), 2],
            // 4: struct sock { a; union { c; }; b: the union }
            &[1, head(4, 3), 12, 6, 1, 0, 0, 2, 32, 8, 3, 64],
        ]
        .concat(),
    )
}

#[test]
fn fields_are_found_also_in_what_has_no_name() {
    let btf = Btf::parse(&small()).unwrap();
    assert_eq!(btf.offset("sock", "a").unwrap(), 0);
    assert_eq!(btf.offset("sock", "c").unwrap(), 4);
    assert_eq!(btf.offset("sock", "b").unwrap(), 8);
    assert_eq!(btf.offset("sock", "b.c").unwrap(), 8);
}

#[test]
fn what_is_not_there_is_named() {
    let btf = Btf::parse(&small()).unwrap();
    let error = btf.offset("sock", "b.a").unwrap_err();
    assert!(matches!(error, BtfError::Absent { structure: "sock", field: "b.a" }));
    assert!(btf.offset("socket", "a").is_err());
}

#[test]
fn half_a_description_is_malformed_and_not_a_panic() {
    let whole = small();
    for length in 0..whole.len() {
        assert!(Btf::parse(&whole[..length]).is_none(), "{length}");
    }
}

#[test]
fn running_kernel_describes_a_tcp_socket() {
    let btf = match Btf::of_kernel() {
        Ok(btf) => btf,
        Err(BtfError::Unreadable(_)) => return,
        Err(error) => panic!("{error}"),
    };
    assert!(
        btf.offset("tcp_sock", "write_seq").unwrap() > btf.offset("sock", "sk_rcvbuf").unwrap()
    );
}
