//! Writes msgpack as msgspec does: each value in its smallest form.

use std::fmt::Debug;

use bytes::Bytes;
use rmp::encode;
use serde::Serialize;

/// A `Vec` takes every byte: there is no error to hand on.
fn done<T>(written: Result<T, impl Debug>) {
    debug_assert!(written.is_ok());
}

pub(crate) fn nil(out: &mut Vec<u8>) {
    done(encode::write_nil(out));
}

pub(crate) fn bool(out: &mut Vec<u8>, value: bool) {
    done(encode::write_bool(out, value));
}

/// An unsigned integer.
pub(crate) fn uint(out: &mut Vec<u8>, value: u64) {
    done(encode::write_uint(out, value));
}

/// A signed integer.
pub(crate) fn int(out: &mut Vec<u8>, value: i64) {
    done(encode::write_sint(out, value));
}

/// A call id; values that no msgpack integer holds are clamped, which no call id of vLLM needs.
pub(crate) fn wide(out: &mut Vec<u8>, value: i128) {
    match u64::try_from(value) {
        Ok(value) => uint(out, value),
        Err(_) if value > 0 => uint(out, u64::MAX),
        Err(_) => int(out, i64::try_from(value).unwrap_or(i64::MIN)),
    }
}

/// A float of 64 bits.
pub(crate) fn float(out: &mut Vec<u8>, value: f64) {
    done(encode::write_f64(out, value));
}

/// A string, shorter than 4 GiB.
pub(crate) fn str(out: &mut Vec<u8>, value: &str) {
    done(encode::write_str(out, value));
}

/// What `write` makes of the value, or nil.
pub(crate) fn optional<T>(out: &mut Vec<u8>, value: Option<T>, write: impl FnOnce(&mut Vec<u8>, T)) {
    match value {
        Some(value) => write(out, value),
        None => nil(out),
    }
}

/// An array of strings.
pub(crate) fn strs<'a>(out: &mut Vec<u8>, values: impl ExactSizeIterator<Item = &'a str>) {
    array(out, values.len());
    values.for_each(|value| str(out, value));
}

/// Bytes, shorter than 4 GiB.
#[cfg(any(test, feature = "test-support"))]
pub(crate) fn bin(out: &mut Vec<u8>, value: &[u8]) {
    done(encode::write_bin(out, value));
}

/// Header of an array of fewer than 2^32 elements.
pub(crate) fn array(out: &mut Vec<u8>, length: usize) {
    done(encode::write_array_len(out, length as u32));
}

/// Header of a map of fewer than 2^32 entries.
pub(crate) fn map(out: &mut Vec<u8>, pairs: usize) {
    done(encode::write_map_len(out, pairs as u32));
}

/// A message of its own; structs become maps.
pub(crate) fn named(message: &impl Serialize) -> Bytes {
    let mut out = Vec::with_capacity(128);
    done(rmp_serde::encode::write_named(&mut out, message));
    out.into()
}

/// Any value.
pub(crate) fn value(out: &mut Vec<u8>, value: &rmpv::Value) {
    done(rmpv::encode::write_value(out, value));
}
