//! Whether staged bytes are a checkpoint that the model can take.

use std::path::Path;

use dp_sidecar_protocol::machine::weight_update::Checkpoint;

use super::fill::Fill;
use super::layout::Layout;
use super::mapping::Mapping;
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

/// What engines are told to load.
pub(super) fn checkpoint(manifest: &Manifest, layout: &Layout, segment: &Path, root: String) -> Checkpoint {
    Checkpoint {
        path: segment.to_string_lossy().into_owned(),
        files: layout.files().iter().map(|file| file.name.clone()).collect(),
        extents: layout.extents(),
        tensors: manifest.tensors.len() as u64,
        bytes: manifest.bytes(),
        digest: Some(root),
    }
}
