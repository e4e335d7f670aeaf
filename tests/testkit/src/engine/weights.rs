//! "Weights": the bytes of a checkpoint directory, read and hashed as the shim does it
//! (`protocol/docs/weight-update.md`). What a fake engine answers depends on them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use thiserror::Error;

/// A checkpoint that cannot be loaded.
#[derive(Debug, Error)]
#[error("{kind}: {text}")]
pub struct LoadError {
    /// As `error_kind` of the worker RPC: `files` or `load`.
    pub kind: &'static str,
    /// What is wrong, naming the file.
    pub text: String,
}

/// What was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Tensors consumed.
    pub tensors: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Whole digest.
    pub digest: String,
}

/// Reads the given files of a directory.
pub fn read(directory: &Path, files: &[String]) -> Result<Loaded, LoadError> {
    let mut lines = BTreeMap::new();
    let mut bytes = 0;
    for file in files {
        let path = directory.join(file);
        let failed = |kind: &'static str, text: String| LoadError {
            kind,
            text: format!("{}: {text}", path.display()),
        };
        let content = std::fs::read(&path).map_err(|error| failed("files", error.to_string()))?;
        let broken = |text: &str| failed("load", text.to_owned());
        let (length, rest) =
            content.split_first_chunk::<8>().ok_or_else(|| broken("shorter than a safetensors header"))?;
        let length = usize::try_from(u64::from_le_bytes(*length))
            .ok()
            .filter(|length| *length <= rest.len())
            .ok_or_else(|| broken("the header is longer than the file"))?;
        let (header, data) = rest.split_at(length);
        let header: BTreeMap<String, Value> =
            serde_json::from_slice(header).map_err(|error| failed("load", error.to_string()))?;
        for (name, tensor) in header {
            if name == "__metadata__" {
                continue;
            }
            let range = || {
                let offsets = tensor["data_offsets"].as_array()?;
                let from = usize::try_from(offsets.first()?.as_u64()?).ok()?;
                let to = usize::try_from(offsets.get(1)?.as_u64()?).ok()?;
                data.get(from..to)
            };
            let content = range().ok_or_else(|| broken(&format!("tensor {name} is cut off")))?;
            let shape: Vec<String> = tensor["shape"]
                .as_array()
                .ok_or_else(|| broken(&format!("tensor {name} has no shape")))?
                .iter()
                .map(Value::to_string)
                .collect();
            bytes += content.len() as u64;
            let line = format!(
                "{name}\0{}\0{}\0{}\n",
                tensor["dtype"].as_str().unwrap_or_default(),
                shape.join(","),
                blake3::hash(content).to_hex()
            );
            if lines.insert(name.clone(), line).is_some() {
                return Err(broken(&format!("tensor {name} occurs twice")));
            }
        }
    }
    let mut whole = blake3::Hasher::new();
    for line in lines.values() {
        whole.update(line.as_bytes());
    }
    Ok(Loaded { tensors: lines.len() as u64, bytes, digest: whole.finalize().to_hex().to_string() })
}

/// The files of a directory in loading order: those of the index, or every `*.safetensors`.
pub fn files(directory: &Path) -> Result<Vec<String>, LoadError> {
    let failed = |text: String| LoadError { kind: "files", text: format!("{}: {text}", directory.display()) };
    let index = directory.join("model.safetensors.index.json");
    if index.exists() {
        let text = std::fs::read(&index).map_err(|error| failed(error.to_string()))?;
        let index: Value = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
        let mut names: Vec<String> = index["weight_map"]
            .as_object()
            .ok_or_else(|| failed("the index has no weight_map".to_owned()))?
            .values()
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect();
        names.sort();
        names.dedup();
        return Ok(names);
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| failed(error.to_string()))? {
        let name =
            entry.map_err(|error| failed(error.to_string()))?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Writes a safetensors file with `BF16` tensors, for tests: name, shape, and one byte that fills it.
pub fn write_checkpoint(path: &Path, tensors: &[(&str, &[usize], u8)]) -> std::io::Result<()> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape, fill) in tensors {
        let from = data.len();
        data.resize(from + 2 * shape.iter().product::<usize>(), *fill);
        header.insert(
            (*name).to_owned(),
            serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [from, data.len()]}),
        );
    }
    let header = serde_json::to_vec(&header)?;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(path, file)
}

/// The tokens that an engine with weights of this digest answers to a prompt (greedy). Two digests
/// differ from the first token on, with the odds of a hash.
pub fn tokens(digest: &str, prompt: &[u64], count: u32) -> Vec<u32> {
    let (weights, prompt) = (key(digest.bytes().map(u64::from)), prompt_key(prompt));
    (0..count).map(|at| token(weights, prompt, at)).collect()
}

/// Condensed form of a digest for [`token`].
pub(crate) fn digest_key(digest: &str) -> u64 {
    key(digest.bytes().map(u64::from))
}

/// Condensed form of a prompt for [`token`].
pub(crate) fn prompt_key(prompt: &[u64]) -> u64 {
    key(prompt.iter().copied())
}

/// One token of a response.
pub(crate) fn token(weights: u64, prompt: u64, at: u32) -> u32 {
    let mixed = mix(weights ^ mix(prompt ^ mix(u64::from(at))));
    u32::try_from(mixed % 320).unwrap_or_default()
}

fn key(parts: impl Iterator<Item = u64>) -> u64 {
    parts.fold(0, |key, part| mix(key ^ part))
}

/// Steele and Vigna's splitmix64 step.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vector of `protocol/docs/weight-update.md`.
    #[test]
    fn the_digest_agrees_with_the_published_vector() {
        let header =
            br#"{"a.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend([0, 0, 0x80, 0x3f, 0, 0, 0, 0x40, 0x80, 0x3f]);
        let directory = std::env::temp_dir().join(format!("testkit-digest-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("m.safetensors"), file).unwrap();
        let names = files(&directory).unwrap();
        let loaded = read(&directory, &names).unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!((loaded.tensors, loaded.bytes), (2, 10));
        assert_eq!(loaded.digest, "1be5773b02fdc5720476d39d52ead12cd6337b2ec6c46c2fa30c1605fe645988");
    }
}
