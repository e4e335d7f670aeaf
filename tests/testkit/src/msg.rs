//! msgpack as vLLM reads and writes it: the whole buffer is one value, arrays are positional.

use rmpv::Value;
use thiserror::Error;

/// A payload that vLLM would not have been able to read.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct BadMessage(pub String);

/// Decodes a payload that must hold exactly one value, as msgspec demands.
pub fn decode(mut bytes: &[u8]) -> Result<Value, BadMessage> {
    let value = rmpv::decode::read_value(&mut bytes)
        .map_err(|error| BadMessage(format!("malformed msgpack: {error}")))?;
    if bytes.is_empty() {
        Ok(value)
    } else {
        Err(BadMessage(format!("{} bytes after the msgpack value", bytes.len())))
    }
}

/// Encodes a value.
pub fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).expect("writing to memory does not fail");
    bytes
}

/// A msgpack map with text keys.
pub fn map<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Map(entries.into_iter().map(|(key, value)| (Value::from(key), value)).collect())
}

/// Value of a text key of a map.
pub fn get<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    value.as_map()?.iter().find(|(name, _)| name.as_str() == Some(key)).map(|(_, value)| value)
}

/// Text behind a key of a map; `None` when it is absent or nil.
pub fn text(value: &Value, key: &str) -> Option<String> {
    get(value, key)?.as_str().map(str::to_owned)
}

/// Texts of an array behind a key of a map.
pub fn texts(value: &Value, key: &str) -> Option<Vec<String>> {
    get(value, key)?.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

/// msgpack to JSON, for reports. Binary becomes hexadecimal text.
pub fn to_json(value: &Value) -> serde_json::Value {
    use serde_json::Value as Json;
    match value {
        Value::Nil => Json::Null,
        Value::Boolean(flag) => Json::from(*flag),
        Value::Integer(number) => {
            number.as_i64().map(Json::from).or_else(|| number.as_u64().map(Json::from)).unwrap_or(Json::Null)
        }
        Value::F32(number) => Json::from(*number),
        Value::F64(number) => Json::from(*number),
        Value::String(text) => Json::from(text.as_str().unwrap_or("<not utf-8>")),
        Value::Binary(bytes) => Json::from(hex(bytes)),
        Value::Array(items) => items.iter().map(to_json).collect(),
        Value::Map(entries) => entries
            .iter()
            .map(|(key, value)| {
                let key = key.as_str().map_or_else(|| key.to_string(), str::to_owned);
                (key, to_json(value))
            })
            .collect::<serde_json::Map<_, _>>()
            .into(),
        Value::Ext(kind, bytes) => Json::from(format!("ext {kind}: {}", hex(bytes))),
    }
}

/// Lower case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_after_the_value_are_refused() {
        assert!(decode(&[0x90]).is_ok());
        assert!(decode(&[0x90, 0xc0]).is_err());
        assert!(decode(&[0x92, 0xc0]).is_err());
    }
}
