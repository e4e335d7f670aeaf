//! "Weights": the bytes of a checkpoint directory or of a segment, copied and hashed as the shim does it
//! (`protocol/docs/weight-update.md`). What a fake engine answers depends on them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

/// A checkpoint that cannot be loaded.
#[derive(Debug, Error)]
#[error("{kind}: {text}")]
pub struct LoadError {
    /// As `error_kind` of the worker RPC: `request`, `files` or `load`.
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
    /// Whole digest; of a large checkpoint, if it was not asked for, one over samples.
    pub digest: String,
    /// By name.
    pub contents: BTreeMap<String, Content>,
}

impl Loaded {
    /// Gives tensors the names that they are loaded under: the first prefix that matches is replaced.
    pub(crate) fn rename(&mut self, prefixes: &[(String, String)]) {
        let renamed = std::mem::take(&mut self.contents).into_iter().map(|(name, content)| {
            let new =
                prefixes.iter().find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?)));
            (new.unwrap_or(name), content)
        });
        self.contents = renamed.collect();
    }
}

/// One tensor that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Dimensions, joined by `,`.
    pub shape: String,
    /// Digest of its bytes, as the whole digest has it.
    pub digest: String,
}

/// One safetensors file: all of a file, or an extent of a segment.
#[derive(Clone, Debug)]
pub struct Part {
    /// Path of the file or segment.
    pub path: PathBuf,
    /// Name for messages.
    pub name: String,
    /// `(offset, length)` within a segment; `None`: the whole file.
    pub extent: Option<(u64, u64)>,
}

/// The given files of a directory; with `extents`, of a segment at `path`.
pub fn parts(path: &Path, files: &[String], extents: Option<&[(u64, u64)]>) -> Result<Vec<Part>, LoadError> {
    let Some(extents) = extents else {
        if (1..files.len()).any(|at| files[..at].contains(&files[at])) {
            return Err(LoadError { kind: "files", text: format!("listed twice: {files:?}") });
        }
        let part = |name: &String| Part { path: path.join(name), name: name.clone(), extent: None };
        return Ok(files.iter().map(part).collect());
    };
    if extents.len() != files.len() {
        let text = format!("{} files, {} extents", files.len(), extents.len());
        return Err(LoadError { kind: "request", text });
    }
    let mut sorted = extents.to_vec();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        return Err(LoadError { kind: "request", text: format!("extents overlap: {extents:?}") });
    }
    let part = |(name, extent): (&String, &(u64, u64))| Part {
        path: path.to_path_buf(),
        name: name.clone(),
        extent: Some(*extent),
    };
    Ok(files.iter().zip(extents).map(part).collect())
}

/// From here on, [`Hashing::Identity`] looks at samples only.
const SAMPLED_FROM: u64 = 64 << 20;
const SAMPLE: usize = 4096;

/// What is hashed while bytes are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hashing {
    /// Everything: the whole digest.
    Whole,
    /// Enough to tell checkpoints apart: everything of a small one, and of a large one the first bytes of
    /// each copied piece, so that hashing does not cost what copying does.
    Identity,
}

/// Copies the bytes of tensors, as a worker copies them to its device, into a buffer that is allocated once
/// and smaller than a checkpoint.
#[derive(Debug)]
pub struct Loader {
    buffer: Vec<u8>,
    size: usize,
    at: usize,
}

impl Default for Loader {
    fn default() -> Self {
        Self::new(16 << 20)
    }
}

impl Loader {
    /// A tensor is copied in pieces of at most this length; also the granularity of samples.
    const PIECE: usize = 1 << 20;

    /// With a buffer of this many bytes, at least a piece.
    pub fn new(size: usize) -> Self {
        Self { buffer: Vec::new(), size: size.max(Self::PIECE), at: 0 }
    }

    /// Reads all parts.
    pub fn load(&mut self, parts: &[Part], hashing: Hashing) -> Result<Loaded, LoadError> {
        let mut opened = Vec::new();
        for part in parts {
            opened.push(Opened::new(part)?);
        }
        let (mut lines, mut contents) = (BTreeMap::new(), BTreeMap::new());
        let mut bytes = 0;
        let all: u64 = opened.iter().flat_map(|file| &file.tensors).map(|tensor| tensor.length).sum();
        let sampled = hashing == Hashing::Identity && all > SAMPLED_FROM;
        for file in &opened {
            for tensor in &file.tensors {
                let mut hasher = blake3::Hasher::new();
                self.copy(file, tensor, |piece| {
                    let piece = if sampled { &piece[..piece.len().min(SAMPLE)] } else { piece };
                    hasher.update(piece);
                })?;
                bytes += tensor.length;
                let hash = hasher.finalize().to_hex();
                let content = Content { shape: tensor.shape.clone(), digest: hash.to_string() };
                contents.insert(tensor.name.clone(), content);
                let line = format!("{}\0{}\0{}\0{hash}\n", tensor.name, tensor.dtype, tensor.shape);
                if lines.insert(tensor.name.clone(), line).is_some() {
                    return Err(file.broken(&format!("tensor {} occurs twice", tensor.name)));
                }
            }
        }
        let mut whole = blake3::Hasher::new();
        for line in lines.values() {
            whole.update(line.as_bytes());
        }
        let digest = whole.finalize().to_hex().to_string();
        Ok(Loaded { tensors: lines.len() as u64, bytes, digest, contents })
    }

    fn copy(
        &mut self,
        file: &Opened<'_>,
        tensor: &Tensor,
        mut took: impl FnMut(&[u8]),
    ) -> Result<(), LoadError> {
        if self.buffer.is_empty() {
            self.buffer = vec![0; self.size];
        }
        let mut done = 0;
        while done < tensor.length {
            let length = usize::try_from(tensor.length - done).unwrap_or(usize::MAX).min(Self::PIECE);
            if self.at + length > self.buffer.len() {
                self.at = 0;
            }
            let piece = &mut self.buffer[self.at..self.at + length];
            file.file
                .read_exact_at(piece, tensor.offset + done)
                .map_err(|error| file.broken(&format!("tensor {}: {error}", tensor.name)))?;
            took(piece);
            self.at += length;
            done += length as u64;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Tensor {
    name: String,
    dtype: String,
    shape: String,
    offset: u64,
    length: u64,
}

/// A part with its header read.
#[derive(Debug)]
struct Opened<'a> {
    part: &'a Part,
    file: File,
    tensors: Vec<Tensor>,
}

impl<'a> Opened<'a> {
    fn new(part: &'a Part) -> Result<Self, LoadError> {
        let error = |error: std::io::Error| LoadError {
            kind: "files",
            text: format!("{}: {error}", part.path.display()),
        };
        let file = File::open(&part.path).map_err(error)?;
        let size = file.metadata().map_err(error)?.len();
        let (start, length) = part.extent.unwrap_or((0, size));
        let mut opened = Self { part, file, tensors: Vec::new() };
        let end = start.checked_add(length).filter(|end| *end <= size);
        let end = end.ok_or_else(|| opened.broken("the extent ends outside the segment"))?;
        if length < 8 {
            return Err(opened.broken("shorter than a safetensors header"));
        }
        let mut prefix = [0; 8];
        opened.file.read_exact_at(&mut prefix, start).map_err(error)?;
        let header = u64::from_le_bytes(prefix);
        if header > length - 8 {
            return Err(opened.broken("the header is longer than the file"));
        }
        let data = start + 8 + header;
        let mut text = vec![0; usize::try_from(header).unwrap_or_default()];
        opened.file.read_exact_at(&mut text, start + 8).map_err(error)?;
        let map: BTreeMap<String, Value> =
            serde_json::from_slice(&text).map_err(|error| opened.broken(&error.to_string()))?;
        for (name, tensor) in map.into_iter().filter(|(name, _)| name != "__metadata__") {
            let range = || {
                let offsets = tensor["data_offsets"].as_array()?;
                let (from, to) = (offsets.first()?.as_u64()?, offsets.get(1)?.as_u64()?);
                (from <= to && data.checked_add(to)? <= end).then_some((data + from, to - from))
            };
            let (offset, length) =
                range().ok_or_else(|| opened.broken(&format!("tensor {name} is cut off")))?;
            let shape: Vec<String> = tensor["shape"]
                .as_array()
                .ok_or_else(|| opened.broken(&format!("tensor {name} has no shape")))?
                .iter()
                .map(Value::to_string)
                .collect();
            let (dtype, shape) = (tensor["dtype"].as_str().unwrap_or_default().to_owned(), shape.join(","));
            opened.tensors.push(Tensor { name, dtype, shape, offset, length });
        }
        opened.tensors.sort_by_key(|tensor| tensor.offset);
        Ok(opened)
    }

    fn broken(&self, text: &str) -> LoadError {
        let text = format!("{} in {}: {text}", self.part.name, self.part.path.display());
        LoadError { kind: "load", text }
    }
}

/// Reads the given files of a directory and computes the whole digest.
pub fn read(directory: &Path, files: &[String]) -> Result<Loaded, LoadError> {
    Loader::new(0).load(&parts(directory, files, None)?, Hashing::Whole)
}

/// What an engine that loaded this directory answers depends on this text.
pub fn identity(directory: &Path) -> Result<String, LoadError> {
    Ok(served(directory)?.digest)
}

/// What an engine holds that loaded this directory.
pub(crate) fn served(directory: &Path) -> Result<Loaded, LoadError> {
    let files = files(directory)?;
    Loader::new(0).load(&parts(directory, &files, None)?, Hashing::Identity)
}

/// Identity of an engine that has some tensors of one checkpoint and some of another.
pub(crate) fn mixed(one: &str, other: &str) -> String {
    blake3::hash(format!("{one} {other}").as_bytes()).to_hex().to_string()
}

/// The files of a directory in loading order, as vLLM 0.32.0 finds them for `--load-format auto`: `consolidated*` alone,
/// those of the index, or every `*.safetensors`.
pub fn files(directory: &Path) -> Result<Vec<String>, LoadError> {
    let failed = |text: String| LoadError { kind: "files", text: format!("{}: {text}", directory.display()) };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| failed(error.to_string()))? {
        let name =
            entry.map_err(|error| failed(error.to_string()))?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            names.push(name);
        }
    }
    names.sort();
    let consolidated = |name: &String| name.starts_with("consolidated");
    let index = directory.join("model.safetensors.index.json");
    if names.iter().any(consolidated) {
        names.retain(consolidated);
    } else if index.exists() {
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
    if names.is_empty() {
        return Err(failed("RuntimeError: Cannot find any model weights".to_owned()));
    }
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

/// The same to a request that names an adapter whose tensors have this digest.
pub fn adapter_tokens(digest: &str, adapter: &str, prompt: &[u64], count: u32) -> Vec<u32> {
    let (weights, prompt) = (digest_key(digest) ^ digest_key(adapter), prompt_key(prompt));
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

    #[test]
    fn a_segment_gives_what_its_directory_gives_and_every_byte_counts() {
        let directory = std::env::temp_dir().join(format!("testkit-segment-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        write_checkpoint(&directory.join("1.safetensors"), &[("a", &[3, 5], 7), ("b", &[2], 9)]).unwrap();
        // More than a piece, so that copying in pieces and wrapping around show.
        write_checkpoint(&directory.join("2.safetensors"), &[("c", &[1 << 20, 3], 1)]).unwrap();
        let names = files(&directory).unwrap();
        let of_directory = read(&directory, &names).unwrap();
        let mut content = vec![0xff; 4096];
        let mut extents = Vec::new();
        for name in &names {
            let file = std::fs::read(directory.join(name)).unwrap();
            content.resize(content.len().next_multiple_of(4096), 0xff);
            extents.push((content.len() as u64, file.len() as u64));
            content.extend(file);
        }
        let segment = directory.join("segment");
        std::fs::write(&segment, &content).unwrap();
        let mut loader = Loader::new(0);
        let wanted = parts(&segment, &names, Some(&extents)).unwrap();
        assert_eq!(loader.load(&wanted, Hashing::Whole).unwrap(), of_directory);
        assert_eq!(identity(&directory).unwrap(), of_directory.digest);
        *content.last_mut().unwrap() ^= 1;
        std::fs::write(&segment, &content).unwrap();
        assert_ne!(loader.load(&wanted, Hashing::Identity).unwrap().digest, of_directory.digest);
        std::fs::write(&segment, &content[..content.len() - 1]).unwrap();
        assert!(loader.load(&wanted, Hashing::Identity).is_err());
        std::fs::remove_dir_all(&directory).unwrap();
        let overlapping = [extents[0], (extents[0].0 + 1, 8)];
        assert_eq!(parts(&segment, &names, Some(&overlapping)).unwrap_err().kind, "request");
        assert_eq!(parts(&segment, &names, Some(&extents[..1])).unwrap_err().kind, "request");
    }
}
