//! Whether staged bytes are a checkpoint that the model can take.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use dp_sidecar_protocol::machine::weight_update::{Checkpoint, OddTensor, Renames};

use super::fill::Fill;
use super::layout::Layout;
use super::mapping::Mapping;
use crate::driver::handles::{CheckpointDir, StageSpec};
use crate::manifest::{Manifest, ManifestError, header_end};

/// The manifest by the headers in the segment; none while some of them are not there yet.
pub(super) fn manifest(fill: &Fill, path: &Path) -> Result<Option<Manifest>, ManifestError> {
    let layout = fill.layout();
    let mut headers = Vec::with_capacity(layout.files().len());
    for (at, file) in layout.files().iter().enumerate() {
        let header = header(fill.mapping(), layout, at);
        let header =
            header.map_err(|reason| ManifestError::Header { path: path.join(&file.name), reason })?;
        let Some(header) = header else { return Ok(None) };
        headers.push(header);
    }
    let files = layout.files().iter().zip(&headers);
    let files = files.map(|(file, header)| (file.name.as_str(), file.size, header.as_slice()));
    Manifest::from_headers(path, files).map(Some)
}

/// The bytes at the start of a file, up to the end of its header.
fn header(mapping: &Mapping, layout: &Layout, file: usize) -> Result<Option<Vec<u8>>, String> {
    let mut chunk = layout.first_chunk(file);
    let Some(first) = mapping.bytes(chunk) else { return Ok(None) };
    let Some(end) = header_end(first, layout.files()[file].size)? else { return Ok(None) };
    let end = usize::try_from(end).map_err(|error| error.to_string())?;
    let mut header = first[..first.len().min(end)].to_vec();
    while header.len() < end {
        chunk += 1;
        let Some(bytes) = mapping.bytes(chunk) else { return Ok(None) };
        header.extend_from_slice(&bytes[..bytes.len().min(end - header.len())]);
    }
    Ok(Some(header))
}

/// A manifest that the model can take.
pub(super) struct Checked {
    manifest: Manifest,
    /// That of the start-up checkpoint. None: it is not compared here.
    model: Option<Manifest>,
    odd: Vec<OddTensor>,
    rename: Renames,
}

impl Checked {
    pub(super) fn new(manifest: Manifest, spec: &StageSpec) -> Result<Self, ManifestError> {
        let model = spec.model.as_ref().map(CheckpointDir::manifest).transpose()?;
        let manifest = manifest.renamed(&spec.fit.rename)?;
        let odd = model.as_ref().map(|model| manifest.check_against(model, &spec.fit)).transpose()?;
        Ok(Self { manifest, model, odd: odd.unwrap_or_default(), rename: spec.fit.rename.clone() })
    }

    /// Compares the bytes of what the model has as one tensor. All are in the segment.
    pub(super) fn copies(
        &self,
        spec: &StageSpec,
        layout: &Layout,
        segment: &Path,
    ) -> Result<(), ManifestError> {
        let Some(model) = self.model.as_ref().filter(|_| !spec.fit.tied.is_empty()) else { return Ok(()) };
        let unreadable = |error: std::io::Error| ManifestError::Unreadable {
            path: segment.to_owned(),
            reason: error.to_string(),
        };
        let (file, extents) = (File::open(segment).map_err(unreadable)?, layout.extents());
        self.manifest.check_copies(model, &spec.fit, |tensor, at, buffer| {
            let start = extents[tensor.file].offset + tensor.start;
            file.read_exact_at(buffer, start + at).map_err(unreadable)
        })
    }
}

/// What engines are told to load.
pub(super) fn checkpoint(checked: &Checked, layout: &Layout, segment: &Path, root: String) -> Checkpoint {
    let Checked { manifest, odd, rename, .. } = checked;
    Checkpoint {
        path: segment.to_string_lossy().into_owned(),
        files: layout.files().iter().map(|file| file.name.clone()).collect(),
        extents: layout.extents(),
        tensors: manifest.tensors.len() as u64,
        bytes: manifest.bytes(),
        digest: Some(root),
        odd: odd.clone(),
        rename: rename.clone(),
    }
}
