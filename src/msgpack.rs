//! Messages that the sidecar's own processes send each other: one msgpack value, not nested deeper than any of
//! them is.

use serde::de::DeserializeOwned;

/// Values may be nested so deep. vLLM's arguments and results are nested a few levels. (The default of `rmp_serde`,
/// 1024, takes more stack than a thread has.)
const MAX_DEPTH: usize = 128;

/// Decodes a value; what follows it is left alone.
///
/// # Errors
/// It is no such value, or nested too deep.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, rmp_serde::decode::Error> {
    let mut decoder = rmp_serde::Deserializer::from_read_ref(bytes);
    decoder.set_max_depth(MAX_DEPTH);
    T::deserialize(&mut decoder)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Message {
        id: u8,
    }

    #[test]
    fn a_value_that_is_nested_without_end_is_refused_before_the_stack_is_used_up() {
        // {"id": 3, "x": [[[[ ...
        let mut message = b"\x82\xa2id\x03\xa1x".to_vec();
        message.extend(std::iter::repeat_n(0x91, 100_000));
        decode::<Message>(&message).unwrap_err();
        // {"id": 3, "x": [[nil]]}
        assert_eq!(decode::<Message>(b"\x82\xa2id\x03\xa1x\x91\x91\xc0").unwrap().id, 3);
    }
}
