//! How values become bytes. The only module that names bincode: its format is fixed here, and everything that
//! reaches a disk is framed and checksummed by [`frame`] before it is ever decoded.
//!
//! A frame is `version: u8, length: u32, crc32c: u32, payload`, little-endian; the checksum covers all but itself.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Larger values are refused when read: a length that is wrong must not exhaust memory.
pub const VALUE_BYTES_MAX: usize = 64 << 20;
/// Bytes of a frame before its payload.
pub const FRAME_HEAD: usize = 9;
/// Changes with the frame or with bincode's configuration. Not zero, so that a run of zeroes is no frame.
const FRAME_VERSION: u8 = 1;

#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("encoded value is unreadable: {0}")]
    Value(#[from] bincode::error::DecodeError),
    #[error("{0} bytes follow the encoded value; it was written by another version")]
    Trailing(usize),
    #[error("frame has version {0}, not {FRAME_VERSION}: it is damaged or was written by another version")]
    Version(u8),
    #[error("frame is cut short")]
    Short,
    #[error("frame checksum differs: the bytes are damaged")]
    Checksum,
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<VALUE_BYTES_MAX>()
}

/// Encodes a value. Types of ours always encode.
pub fn encode<T: bincode::Encode>(value: &T) -> Vec<u8> {
    bincode::encode_to_vec(value, bincode::config::standard()).expect("own types encode into memory")
}

/// Decodes a value that takes up all of `bytes`.
pub fn decode<T: bincode::Decode<()>>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) = bincode::decode_from_slice(bytes, config())?;
    if used == bytes.len() { Ok(value) } else { Err(CodecError::Trailing(bytes.len() - used)) }
}

/// [`encode`] for types of other crates that know serde only.
pub fn encode_serde<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, bincode::config::standard()).expect("plain data encodes into memory")
}

/// [`decode`] for types of other crates that know serde only.
pub fn decode_serde<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, config())?;
    if used == bytes.len() { Ok(value) } else { Err(CodecError::Trailing(bytes.len() - used)) }
}

/// Appends `payload` as a frame.
pub fn frame(out: &mut Vec<u8>, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("payloads are far below 4 GiB").to_le_bytes();
    let [a, b, c, d] = length;
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&[FRAME_VERSION, a, b, c, d]), payload);
    out.push(FRAME_VERSION);
    out.extend_from_slice(&length);
    out.extend_from_slice(&checksum.to_le_bytes());
    out.extend_from_slice(payload);
}

/// Takes the first frame off `bytes`: its payload and the rest.
pub fn unframe(bytes: &[u8]) -> Result<(&[u8], &[u8]), CodecError> {
    let (head, rest) = bytes.split_first_chunk::<FRAME_HEAD>().ok_or(CodecError::Short)?;
    let &[version, a, b, c, d, ref checksum @ ..] = head;
    if version != FRAME_VERSION {
        return Err(CodecError::Version(version));
    }
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    let (payload, rest) = rest.split_at_checked(length).ok_or(CodecError::Short)?;
    if crc32c::crc32c_append(crc32c::crc32c(&head[..5]), payload) != u32::from_le_bytes(*checksum) {
        return Err(CodecError::Checksum);
    }
    Ok((payload, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_come_back(payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..8)) {
            let mut bytes = vec![];
            payloads.iter().for_each(|p| frame(&mut bytes, p));
            let mut rest = &bytes[..];
            for payload in &payloads {
                let (found, then) = unframe(rest).map_err(|e| TestCaseError::fail(e.to_string()))?;
                prop_assert_eq!(found, &payload[..]);
                rest = then;
            }
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn a_flipped_bit_never_passes(payload in proptest::collection::vec(any::<u8>(), 1..100), at in any::<usize>()) {
            let mut bytes = vec![];
            frame(&mut bytes, &payload);
            let bit = at % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(unframe(&bytes).is_err());
        }
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = encode(&7u64);
        bytes.push(0);
        assert!(matches!(decode::<u64>(&bytes), Err(CodecError::Trailing(1))));
    }
}
