#![allow(clippy::unwrap_used)]

use super::*;

/// The start of an ELF file with one segment of the given type.
fn elf(machine: u16, segment: u32) -> Vec<u8> {
    let mut file = vec![0; 64 + 56];
    file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    file[18..20].copy_from_slice(&machine.to_le_bytes());
    // Offset, size and number of program headers.
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[52..54].copy_from_slice(&64u16.to_le_bytes());
    file[54..56].copy_from_slice(&56u16.to_le_bytes());
    file[56..58].copy_from_slice(&1u16.to_le_bytes());
    file[64..68].copy_from_slice(&segment.to_le_bytes());
    file
}

#[test]
fn a_static_program_of_the_right_machine_is_taken() {
    Architecture::Amd64.check(&elf(EM_X86_64, object::elf::PT_LOAD)).unwrap();
    Architecture::Arm64.check(&elf(EM_AARCH64, object::elf::PT_LOAD)).unwrap();
}

#[test]
fn a_program_of_another_machine_is_refused() {
    let error = Architecture::Arm64.check(&elf(EM_X86_64, object::elf::PT_LOAD)).unwrap_err();
    assert_eq!(error.to_string(), "made for machine 62 of the ELF list, not for arm64");
}

#[test]
fn a_program_that_wants_shared_libraries_is_refused() {
    let error = Architecture::Amd64.check(&elf(EM_X86_64, PT_INTERP)).unwrap_err();
    assert!(error.to_string().starts_with("not linked statically"), "{error}");
}

#[test]
fn what_is_no_program_is_refused() {
    for bytes in [&b""[..], b"#!/bin/sh\n", &elf(EM_X86_64, 1)[..40]] {
        Architecture::Amd64.check(bytes).unwrap_err();
    }
}
