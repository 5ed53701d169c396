//! TLS 1.3 records with keys that the handshake has left (RFC 8446 section 5).
//!
//! The TLS library's own record layer copies each byte twice more. Here a record is encrypted from
//! where its bytes are to where the socket takes them, and decrypted to where they are wanted.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

/// Bytes of a record's header (RFC 8446 section 5.1).
pub(super) const HEADER: usize = 5;
/// The most content one record carries.
pub(super) const CONTENT: usize = 1 << 14;
/// What encryption adds behind the content: its type and the tag.
pub(super) const TRAILER: usize = 1 + TAG;
/// Bytes of the tag of AES-GCM.
const TAG: usize = 16;
/// The longest encrypted record (RFC 8446 section 5.2).
const LONGEST: usize = CONTENT + 256;
/// legacy_record_version (RFC 8446 section 5.1).
const VERSION: [u8; 2] = [3, 3];

/// ContentType of RFC 8446 section 5.1.
pub(super) mod content {
    pub(in crate::tls) const ALERT: u8 = 21;
    pub(in crate::tls) const HANDSHAKE: u8 = 22;
    pub(in crate::tls) const DATA: u8 = 23;
}

/// A record that the peer must not send, or keys that are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("record of type {0} after the handshake")]
    Type(u8),
    #[error("record of {0} bytes")]
    Length(usize),
    #[error("record does not decrypt")]
    Decrypt,
    #[error("record without content type")]
    NoContent,
    #[error("cipher suite without a key of ours")]
    Suite,
    #[error("record could not be encrypted")]
    Encrypt,
}

/// The key of one direction and the number of its next record.
pub(super) struct RecordKey {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl RecordKey {
    pub(super) fn new(
        sequence: u64,
        secrets: &ConnectionTrafficSecrets,
    ) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(RecordError::Suite),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Suite)?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Suite)?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// How many records the key has sealed or opened, those of the handshake not counted.
    pub(super) fn records(&self) -> u64 {
        self.sequence
    }

    /// Writes `data`, at most [`CONTENT`] bytes, as one record to the begin of `out`; gives the
    /// record's length.
    pub(super) fn seal(
        &mut self,
        kind: u8,
        data: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let length = data.len() + TRAILER;
        let header = header(length);
        let record = out.get_mut(..HEADER + length).ok_or(RecordError::Encrypt)?;
        let (head, body) = record.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        let (sealed, trailer) = body.split_at_mut(data.len());
        let nonce = self.nonce();
        self.key
            .seal_out_of_place_scatter(nonce, Aad::from(header), data, sealed, &[kind], trailer)
            .map_err(|_| RecordError::Encrypt)?;
        Ok(HEADER + length)
    }

    /// Decrypts the record with this header and body to the begin of `out`, which has room for
    /// [`Sealed::room`]; gives the content's type and length.
    pub(super) fn open(
        &mut self,
        sealed: &Sealed<'_>,
        out: &mut [u8],
    ) -> Result<(u8, usize), RecordError> {
        let plain = out.get_mut(..sealed.body.len()).ok_or(RecordError::Decrypt)?;
        let nonce = self.nonce();
        self.key
            .open_separate_gather(nonce, Aad::from(sealed.header), sealed.body, sealed.tag, plain)
            .map_err(|_| RecordError::Decrypt)?;
        // With its type and padding (RFC 8446 section 5.4).
        if plain.len() > CONTENT + 1 {
            return Err(RecordError::Length(plain.len()));
        }
        // Zeros behind the type are padding.
        let end = plain.iter().rposition(|byte| *byte != 0).ok_or(RecordError::NoContent)?;
        let kind = plain.get(end).copied().ok_or(RecordError::NoContent)?;
        Ok((kind, end))
    }

    /// A number is never used twice: it counts also when the record fails.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce.iter_mut().skip(4).zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

fn header(length: usize) -> [u8; HEADER] {
    let [.., high, low] = length.to_be_bytes();
    [content::DATA, VERSION[0], VERSION[1], high, low]
}

/// A whole record as it came.
pub(super) struct Sealed<'a> {
    header: [u8; HEADER],
    body: &'a [u8],
    tag: &'a [u8],
}

impl<'a> Sealed<'a> {
    /// The first record of `bytes`, or `None` as long as it is not whole.
    pub(super) fn first(bytes: &'a [u8]) -> Result<Option<Self>, RecordError> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [kind, _, _, high, low] = *header;
        if kind != content::DATA {
            return Err(RecordError::Type(kind));
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        if !(TRAILER..=LONGEST).contains(&length) {
            return Err(RecordError::Length(length));
        }
        let Some(record) = rest.get(..length) else { return Ok(None) };
        let (body, tag) = record.split_at(length - TAG);
        Ok(Some(Self { header: *header, body, tag }))
    }

    /// Bytes that decrypting needs.
    pub(super) fn room(&self) -> usize {
        self.body.len()
    }

    /// Bytes of the whole record.
    pub(super) fn len(&self) -> usize {
        HEADER + self.body.len() + self.tag.len()
    }
}

#[cfg(test)]
mod tests;
