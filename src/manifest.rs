//! Checkpoint directories: what they hold, whether that is what the model needs, and its digest.
//!
//! The rules (which files count, in which order, how the digest is made) are a contract with the shim:
//! `protocol/docs/weight-update.md`.

mod compare;
mod digest;
mod fit;
mod rename;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use dp_sidecar_protocol::machine::weight_update::{Checkpoint, Renames};
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use thiserror::Error;

use crate::files;

pub use digest::Progress;
pub use rename::Hint;

/// Tensor to file.
type Index = BTreeMap<String, String>;

const INDEX: &str = "model.safetensors.index.json";
/// As the `safetensors` crate and Python module have it.
const MAX_HEADER: u64 = 100_000_000;
/// An index names each tensor once; 100 MB is far beyond any model.
const MAX_INDEX: u64 = 100_000_000;
/// How many faults an error text lists.
const LISTED: usize = 8;

/// A directory cannot be used as a checkpoint.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// The path is not there, or not a directory, or the system refuses it.
    #[error("checkpoint {path}: {reason}")]
    NotADirectory { path: PathBuf, reason: String },
    /// No file in it counts.
    #[error("checkpoint {path}: no *.safetensors file")]
    Empty { path: PathBuf },
    /// A file cannot be opened or read.
    #[error("checkpoint file {path}: cannot be read: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    /// The index file is not what it should be.
    #[error("checkpoint index {path}: {reason}")]
    Index { path: PathBuf, reason: String },
    /// The header of a file is not what it should be.
    #[error("checkpoint file {path}: bad safetensors header: {reason}")]
    Header { path: PathBuf, reason: String },
    /// The file ends before the data its header announces, or goes on after it. Bytes.
    #[error("checkpoint file {path}: {actual} bytes long, its header announces {expected}")]
    Length { path: PathBuf, expected: u64, actual: u64 },
    /// The file changed while it was read.
    #[error("checkpoint file {path}: changed while it was read")]
    Changed { path: PathBuf },
    /// The tensors are not those of the model. All faults; the text lists the first few.
    #[error("checkpoint {path}: {}{}", Faults(faults), hint.as_ref().map(Hint::to_string).unwrap_or_default())]
    Tensors { path: PathBuf, faults: Vec<Fault>, hint: Option<Hint> },
    /// The work was called off.
    #[error("checkpoint {path}: reading was cancelled")]
    Cancelled { path: PathBuf },
}

/// One thing wrong with the tensors of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Fault {
    /// The model has it, the checkpoint has not.
    #[error("missing {name}")]
    Missing { name: String },
    /// The checkpoint has it, the model has not.
    #[error("unexpected {name}")]
    Unexpected { name: String },
    /// What `--rename` says begins no name.
    #[error("no name begins with {from:?}")]
    NoSuchPrefix { from: String },
    /// The checkpoint has it twice, in two files or in one.
    #[error("duplicate {name} (in {first} and {second})")]
    Duplicate { name: String, first: String, second: String },
    /// Another shape than the model's.
    #[error("{name} has shape {actual:?}, expected {expected:?}")]
    Shape { name: String, expected: Vec<usize>, actual: Vec<usize> },
    /// Another element type than the model's.
    #[error("{name} has dtype {actual}, expected {expected}: {reason}")]
    Dtype { name: String, expected: String, actual: String, reason: &'static str },
    /// The model has the two as one tensor, the checkpoint as two.
    #[error(
        "{name} differs from {of}: the model has them as one tensor (tie_word_embeddings), and would get one of the two"
    )]
    Copy { name: String, of: String },
    /// The index says it is in this file, and it is not.
    #[error("{name} is not in {file}, where the index says it is")]
    NotWhereIndexed { name: String, file: String },
    /// The matrices of an adapter do not fit each other, or the module of this name in the model: both shapes, or what
    /// is missing.
    #[error("{module}: {reason}")]
    Misfit { module: String, reason: String },
}

struct Faults<'a>(&'a [Fault]);

impl fmt::Display for Faults<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        let listed: Vec<String> = self.0.iter().take(LISTED).map(ToString::to_string).collect();
        write!(f, "{count} tensor fault{}: {}", if count == 1 { "" } else { "s" }, listed.join("; "))?;
        if count > LISTED {
            write!(f, "; and {} more", count - LISTED)?;
        }
        Ok(())
    }
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Position of its file in [`Manifest::files`].
    pub file: usize,
    pub name: String,
    /// Element type in the header's spelling.
    pub dtype: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestFile {
    /// Name in the directory.
    pub name: String,
    /// Bytes.
    pub len: u64,
    /// When it was last written, if the file system knows.
    pub modified: Option<SystemTime>,
}

/// What a checkpoint directory holds: all tensors, in loading order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub path: PathBuf,
    /// Files that count, sorted by name.
    pub files: Vec<ManifestFile>,
    /// Tensors by file and offset. No name occurs twice.
    pub tensors: Vec<Tensor>,
}

impl Manifest {
    /// Reads the headers of a directory: of these files, which vLLM's loader has named, or of those that it would name
    /// as a rule. Blocks; reads no tensor data.
    pub fn read(path: &Path, files: Option<&[String]>) -> Result<Self, ManifestError> {
        let problem = match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => None,
            Ok(_) => Some("not a directory".to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => Some("no such directory".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = problem {
            return Err(ManifestError::NotADirectory { path: path.to_owned(), reason });
        }
        let (names, index) = match files {
            Some(files) => (named(path, files)?, None),
            None => resolve(path)?,
        };
        if names.is_empty() {
            return Err(ManifestError::Empty { path: path.to_owned() });
        }
        let headers = names.iter().map(|name| read_header(path, name));
        Self::assemble(path, index.as_ref(), headers)
    }

    /// Takes headers that are in memory already: name of the file, its length, and the bytes at its start, at
    /// least up to the end of the header (see [`header_end`]). `path` names the whole in errors.
    pub fn from_headers<'a>(
        path: &Path,
        files: impl IntoIterator<Item = (&'a str, u64, &'a [u8])>,
    ) -> Result<Self, ManifestError> {
        let headers = files.into_iter().map(|(name, len, start)| {
            let full = path.join(name);
            let fail = |reason: &str| ManifestError::Header { path: full.clone(), reason: reason.to_owned() };
            let end = header_end(start, len).map_err(|reason| fail(&reason))?;
            let text = end.and_then(|end| start.get(8..usize::try_from(end).ok()?));
            let text = text.ok_or_else(|| fail("cut off"))?;
            parse_header(&full, ManifestFile { name: name.to_owned(), len, modified: None }, text)
        });
        Self::assemble(path, None, headers)
    }

    fn assemble(
        path: &Path,
        index: Option<&Index>,
        headers: impl Iterator<Item = Result<(ManifestFile, Vec<Tensor>), ManifestError>>,
    ) -> Result<Self, ManifestError> {
        let mut manifest = Self { path: path.to_owned(), files: Vec::new(), tensors: Vec::new() };
        let mut faults = Vec::new();
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for header in headers {
            let (file, tensors) = header?;
            let (position, second) = (manifest.files.len(), file.name.clone());
            manifest.files.push(file);
            for mut tensor in tensors {
                tensor.file = position;
                if let Some(first) = seen.insert(tensor.name.clone(), position) {
                    faults.push(Fault::Duplicate {
                        name: tensor.name.clone(),
                        first: manifest.files[first].name.clone(),
                        second: second.clone(),
                    });
                } else {
                    manifest.tensors.push(tensor);
                }
            }
        }
        for (name, file) in index.into_iter().flatten() {
            let found = seen.get(name).map(|at| &manifest.files[*at].name);
            if found != Some(file) {
                faults.push(Fault::NotWhereIndexed { name: name.clone(), file: file.clone() });
            }
        }
        manifest.fail_on(faults)?;
        Ok(manifest)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.len).sum()
    }

    /// What a worker is told to load.
    pub fn checkpoint(&self, digest: Option<String>) -> Checkpoint {
        Checkpoint {
            extents: Vec::new(),
            path: self.path.to_string_lossy().into_owned(),
            files: self.files.iter().map(|file| file.name.clone()).collect(),
            tensors: self.tensors.len() as u64,
            bytes: self.bytes(),
            digest,
            odd: Vec::new(),
            rename: Renames::default(),
        }
    }

    fn by_name(&self) -> BTreeMap<&str, &Tensor> {
        self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect()
    }

    /// Opens all files, in their order.
    pub(crate) fn open(&self) -> Result<Vec<File>, ManifestError> {
        let open = |(at, file): (usize, &ManifestFile)| {
            files::open_regular(&self.path.join(&file.name)).map_err(|error| self.unreadable(at, &error))
        };
        self.files.iter().enumerate().map(open).collect()
    }

    /// The file at this position cannot be opened or read.
    pub(crate) fn unreadable(&self, file: usize, error: &io::Error) -> ManifestError {
        unreadable(&self.path.join(&self.files[file].name), error)
    }

    fn fail_on(&self, faults: Vec<Fault>) -> Result<(), ManifestError> {
        if faults.is_empty() {
            return Ok(());
        }
        Err(ManifestError::Tensors { path: self.path.clone(), faults, hint: None })
    }
}

fn unreadable(path: &Path, error: &io::Error) -> ManifestError {
    ManifestError::Unreadable {
        path: path.to_owned(),
        reason: match error.kind() {
            ErrorKind::NotFound => "no such file".to_owned(),
            _ => error.to_string(),
        },
    }
}

/// Files that vLLM's loader has named.
fn named(dir: &Path, files: &[String]) -> Result<BTreeSet<String>, ManifestError> {
    for file in files {
        if file.contains('/') || !file.ends_with(".safetensors") {
            let reason =
                "vLLM loads this file; only *.safetensors in the directory itself can be read".to_owned();
            return Err(ManifestError::Unreadable { path: dir.join(file), reason });
        }
    }
    Ok(files.iter().cloned().collect())
}

/// Files that count where nobody has asked vLLM, by the rule of `--load-format auto` (`_prepare_weights` in
/// `vllm/model_executor/model_loader/default_loader.py`, 0.32.0), and the index that names them.
fn resolve(dir: &Path) -> Result<(BTreeSet<String>, Option<Index>), ManifestError> {
    let mut names = list_files(dir)?;
    if names.iter().any(|name| name.starts_with("consolidated")) {
        names.retain(|name| name.starts_with("consolidated"));
        return Ok((names, None));
    }
    let index = read_index(dir)?;
    let names = index.as_ref().map_or(names, |index| index.values().cloned().collect());
    Ok((names, index))
}

fn list_files(dir: &Path) -> Result<BTreeSet<String>, ManifestError> {
    let entries = std::fs::read_dir(dir).map_err(|error| unreadable(dir, &error))?;
    let mut names = BTreeSet::new();
    for entry in entries {
        let entry = entry.map_err(|error| unreadable(dir, &error))?;
        let is_dir = entry.path().is_dir();
        if let Ok(name) = entry.file_name().into_string()
            && name.ends_with(".safetensors")
            && !is_dir
        {
            names.insert(name);
        }
    }
    Ok(names)
}

/// `weight_map` of the index file, tensor to file; `None` without an index.
fn read_index(dir: &Path) -> Result<Option<Index>, ManifestError> {
    let path = dir.join(INDEX);
    let file = match files::open_regular(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(&path, &error)),
    };
    let mut text = Vec::new();
    file.take(MAX_INDEX).read_to_end(&mut text).map_err(|error| unreadable(&path, &error))?;
    parse_index(&path, &text).map(Some)
}

/// `weight_map` of an index file's text. No file in it is outside of the directory.
pub(crate) fn parse_index(path: &Path, text: &[u8]) -> Result<Index, ManifestError> {
    #[derive(Deserialize)]
    struct Text {
        weight_map: Index,
    }
    let fail = |reason: String| ManifestError::Index { path: path.to_owned(), reason };
    let index: Text = serde_json::from_slice(text).map_err(|error| fail(error.to_string()))?;
    if index.weight_map.is_empty() {
        return Err(fail("weight_map is empty".to_owned()));
    }
    for file in index.weight_map.values() {
        if file.contains('/') || !file.ends_with(".safetensors") {
            return Err(fail(format!("names {file:?}, expected a *.safetensors file in the same directory")));
        }
    }
    Ok(index.weight_map)
}

/// A header with its entries in file order, so that a name given twice is seen. (A map would silently
/// keep the last one.)
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// Where the data of a safetensors file begins, by the bytes at its start: `None` if there are fewer than 8 of
/// them. `len` is the length of the file.
///
/// # Errors
/// Why this cannot be the start of such a file.
pub fn header_end(start: &[u8], len: u64) -> Result<Option<u64>, String> {
    let Some(length) = start.first_chunk() else {
        return if len < 8 { Err(format!("{len} bytes long, expected at least 8")) } else { Ok(None) };
    };
    let length = header_length(*length)?;
    if 8 + length > len {
        return Err(format!("{length} bytes long, in a file of {len}"));
    }
    Ok(Some(8 + length))
}

fn header_length(first: [u8; 8]) -> Result<u64, String> {
    let length = u64::from_le_bytes(first);
    if length > MAX_HEADER {
        return Err(format!("{length} bytes long, at most {MAX_HEADER} are allowed"));
    }
    Ok(length)
}

fn read_header(dir: &Path, name: &str) -> Result<(ManifestFile, Vec<Tensor>), ManifestError> {
    let path = dir.join(name);
    let mut file = files::open_regular(&path).map_err(|error| unreadable(&path, &error))?;
    let meta = file.metadata().map_err(|error| unreadable(&path, &error))?;
    let actual = meta.len();
    let too_short = |expected: u64| ManifestError::Length { path: path.clone(), expected, actual };
    if actual < 8 {
        return Err(too_short(8));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| unreadable(&path, &error))?;
    let length =
        header_length(length).map_err(|reason| ManifestError::Header { path: path.clone(), reason })?;
    if actual < 8 + length {
        return Err(too_short(8 + length));
    }
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text).map_err(|error| unreadable(&path, &error))?;
    let file = ManifestFile { name: name.to_owned(), len: actual, modified: meta.modified().ok() };
    parse_header(&path, file, &text)
}

/// The tensors of a file, by the text of its header. Their `file` is still to be set.
fn parse_header(
    path: &Path,
    file: ManifestFile,
    text: &[u8],
) -> Result<(ManifestFile, Vec<Tensor>), ManifestError> {
    let data = 8 + text.len() as u64;
    let fail = |reason: String| ManifestError::Header { path: path.to_owned(), reason };
    let Header(mut entries) = serde_json::from_slice(text).map_err(|error| fail(error.to_string()))?;
    entries.sort_by(|(a_name, a), (b_name, b)| (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name)));
    let mut tensors = Vec::with_capacity(entries.len());
    let mut names = HashSet::with_capacity(entries.len());
    let mut next = 0u64;
    for (tensor, info) in entries {
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let size = size_of(&info);
        if end < start || Some(end - start) != size {
            return Err(fail(format!(
                "{tensor} has {:?} elements of {:?} at bytes {start} to {end}",
                info.shape, info.dtype
            )));
        }
        // The same name twice is reported as a duplicate by the caller, wherever its data lies.
        let twice = !names.insert(tensor.clone());
        if start != next && !twice {
            return Err(fail(format!(
                "{tensor} starts at byte {start}, expected {next}: tensors overlap or leave a hole"
            )));
        }
        next = next.max(end);
        tensors.push(Tensor {
            file: 0,
            name: tensor,
            dtype: format!("{:?}", info.dtype),
            shape: info.shape,
            start: data + start,
            len: end - start,
        });
    }
    let expected = data.saturating_add(next);
    if file.len != expected {
        return Err(ManifestError::Length { path: path.to_owned(), expected, actual: file.len });
    }
    Ok((file, tensors))
}

fn size_of(info: &TensorInfo) -> Option<u64> {
    let elements = info.shape.iter().try_fold(1usize, |all, dimension| all.checked_mul(*dimension))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some((bits / 8) as u64)
}
