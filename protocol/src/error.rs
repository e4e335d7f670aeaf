//! Errors of decoding.

use thiserror::Error;

/// Bytes that are not what they should be. Says which message, where, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The bytes are not msgpack, or end too early.
    #[error("{message}: malformed msgpack at {at}: {reason}")]
    Malformed {
        /// The message that was being read, e.g. `EngineCoreRequest`.
        message: &'static str,
        /// Field or position.
        at: String,
        /// What the decoder said.
        reason: String,
    },
    /// A value of another type than the field has.
    #[error("{message}: {at} is {actual}, expected {expected}")]
    Unexpected {
        /// The message that was being read.
        message: &'static str,
        /// Field or position.
        at: String,
        /// What should be there.
        expected: &'static str,
        actual: String,
    },
    /// Too few fields, or frames.
    #[error("{message}: {actual} {unit}, at least {expected} needed")]
    TooShort {
        /// The message that was being read.
        message: &'static str,
        /// What is counted: `fields` or `frames`.
        unit: &'static str,
        /// How many are needed.
        expected: usize,
        /// How many there are.
        actual: usize,
    },
}
