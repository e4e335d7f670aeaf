//! Writes msgpack as msgspec does: each value in its smallest form.

pub(crate) fn nil(out: &mut Vec<u8>) {
    out.push(0xc0);
}

pub(crate) fn bool(out: &mut Vec<u8>, value: bool) {
    out.push(if value { 0xc3 } else { 0xc2 });
}

/// An unsigned integer.
pub(crate) fn uint(out: &mut Vec<u8>, value: u64) {
    if let Ok(value) = u8::try_from(value) {
        if value > 0x7f {
            out.push(0xcc);
        }
        out.push(value);
    } else if let Ok(value) = u16::try_from(value) {
        out.push(0xcd);
        out.extend_from_slice(&value.to_be_bytes());
    } else if let Ok(value) = u32::try_from(value) {
        out.push(0xce);
        out.extend_from_slice(&value.to_be_bytes());
    } else {
        out.push(0xcf);
        out.extend_from_slice(&value.to_be_bytes());
    }
}

/// A signed integer.
pub(crate) fn int(out: &mut Vec<u8>, value: i64) {
    if let Ok(value) = u64::try_from(value) {
        uint(out, value);
    } else if let Ok(value) = i8::try_from(value) {
        if value < -32 {
            out.push(0xd0);
        }
        out.push(value.cast_unsigned());
    } else if let Ok(value) = i16::try_from(value) {
        out.push(0xd1);
        out.extend_from_slice(&value.to_be_bytes());
    } else if let Ok(value) = i32::try_from(value) {
        out.push(0xd2);
        out.extend_from_slice(&value.to_be_bytes());
    } else {
        out.push(0xd3);
        out.extend_from_slice(&value.to_be_bytes());
    }
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
    out.push(0xcb);
    out.extend_from_slice(&value.to_be_bytes());
}

/// A string. Longer than 4 GiB does not occur; it would be cut.
pub(crate) fn str(out: &mut Vec<u8>, value: &str) {
    let length = value.len();
    if length < 32 {
        out.push(0xa0 | length as u8);
    } else if let Ok(length) = u8::try_from(length) {
        out.extend_from_slice(&[0xd9, length]);
    } else if let Ok(length) = u16::try_from(length) {
        out.push(0xda);
        out.extend_from_slice(&length.to_be_bytes());
    } else {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        out.push(0xdb);
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&value.as_bytes()[..length as usize]);
        return;
    }
    out.extend_from_slice(value.as_bytes());
}

/// A string or nil.
pub(crate) fn opt_str(out: &mut Vec<u8>, value: Option<&str>) {
    match value {
        Some(value) => str(out, value),
        None => nil(out),
    }
}

/// Bytes, shorter than 256.
pub(crate) fn short_bin(out: &mut Vec<u8>, value: &[u8]) {
    debug_assert!(value.len() < 256);
    out.extend_from_slice(&[0xc4, value.len() as u8]);
    out.extend_from_slice(value);
}

fn count(out: &mut Vec<u8>, length: usize, fix: u8, marker: u8) {
    if length < 16 {
        out.push(fix | length as u8);
    } else if let Ok(length) = u16::try_from(length) {
        out.push(marker);
        out.extend_from_slice(&length.to_be_bytes());
    } else {
        out.push(marker + 1);
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        out.extend_from_slice(&length.to_be_bytes());
    }
}

/// Header of an array.
pub(crate) fn array(out: &mut Vec<u8>, length: usize) {
    count(out, length, 0x90, 0xdc);
}

/// Header of a map.
pub(crate) fn map(out: &mut Vec<u8>, pairs: usize) {
    count(out, pairs, 0x80, 0xde);
}

/// Any value.
pub(crate) fn value(out: &mut Vec<u8>, value: &rmpv::Value) {
    // Writing to a Vec cannot fail.
    let _ = rmpv::encode::write_value(out, value);
}
