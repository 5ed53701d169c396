#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rustls::crypto::cipher::{AeadKey, Iv};

use super::*;

fn keys() -> (RecordKey, RecordKey) {
    let secrets = || ConnectionTrafficSecrets::Aes256Gcm {
        key: AeadKey::from([7; 32]),
        iv: Iv::from([9; 12]),
    };
    (RecordKey::new(0, &secrets()).unwrap(), RecordKey::new(0, &secrets()).unwrap())
}

#[test]
fn records_open_in_order_only() {
    let (mut sealing, mut opening) = keys();
    let mut first = [0; 64];
    let mut second = [0; 64];
    let length = sealing.seal(content::DATA, b"one", &mut first).unwrap();
    sealing.seal(content::HANDSHAKE, b"two", &mut second).unwrap();
    assert_eq!(length, HEADER + 3 + TRAILER);
    assert_eq!(first[..5], [23, 3, 3, 0, 20]);
    let mut plain = [0; 64];
    let sealed = Sealed::first(&first).unwrap().unwrap();
    assert_eq!(sealed.len(), length);
    assert_eq!(opening.open(&sealed, &mut plain).unwrap(), (content::DATA, 3));
    assert_eq!(&plain[..3], b"one");
    // The first again.
    assert_eq!(opening.open(&sealed, &mut plain), Err(RecordError::Decrypt));
}

#[test]
fn a_changed_bit_is_noticed_wherever_it_is() {
    for bit in 0..(HEADER + 3 + TRAILER) * 8 {
        let (mut sealing, mut opening) = keys();
        let mut record = [0; HEADER + 3 + TRAILER];
        sealing.seal(content::DATA, b"one", &mut record).unwrap();
        record[bit / 8] ^= 1 << (bit % 8);
        let Ok(Some(sealed)) = Sealed::first(&record) else { continue };
        assert_eq!(opening.open(&sealed, &mut [0; 64]), Err(RecordError::Decrypt), "bit {bit}");
    }
}

#[test]
fn padding_is_no_content() {
    let (mut sealing, mut opening) = keys();
    let mut record = [0; 64];
    // The type of the record is the last that is not zero.
    sealing.seal(0, &[b'o', b'n', b'e', content::DATA, 0, 0], &mut record).unwrap();
    let sealed = Sealed::first(&record).unwrap().unwrap();
    assert_eq!(opening.open(&sealed, &mut [0; 64]), Ok((content::DATA, 3)));
}

#[test]
fn records_of_unlawful_length_or_type_are_refused() {
    let first = |bytes: &[u8]| Sealed::first(bytes).err();
    assert_eq!(first(&[20, 3, 3, 0, 1, 1]), Some(RecordError::Type(20)));
    assert_eq!(first(&[23, 3, 3, 0, 16]), Some(RecordError::Length(16)));
    assert_eq!(first(&[23, 3, 3, 0x41, 1]), Some(RecordError::Length(16_641)));
    assert_eq!(first(&[23, 3, 3, 0x41, 0]), None);
}

proptest! {
    #[test]
    fn any_bytes_are_a_record_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let (_, mut opening) = keys();
        if let Ok(Some(sealed)) = Sealed::first(&bytes) {
            prop_assert!(sealed.len() <= bytes.len());
            prop_assert!(opening.open(&sealed, &mut [0; 100]).is_err());
        }
    }
}
