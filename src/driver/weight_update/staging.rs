//! The check of the directories, before any engine is touched.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dp_sidecar_protocol::machine::weight_update::{Checkpoint, Fit, OddTensor};
use parking_lot::Mutex;

use super::super::handles::{ADAPTER_FILE, CheckpointDir};
use crate::files;
use crate::manifest::{Manifest, ManifestError, ManifestFile, Progress};

/// Longest `adapter_config.json`, in bytes. It travels with each request that loads the adapter.
const MAX_CONFIG: u64 = 1 << 20;

/// What is known about directories, so that nothing is hashed twice.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Manifest of the command line's checkpoint, by directory, as it was first seen.
    models: BTreeMap<String, Manifest>,
    /// Whole digests, with the files they belong to.
    digests: BTreeMap<PathBuf, (Vec<ManifestFile>, String)>,
}

/// Calls the work off when dropped: a blocking task cannot be aborted.
#[derive(Debug, Default)]
pub(super) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub(super) fn flag(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Known {
    /// Compares a new directory with that of the command line's checkpoint. Gives its manifest, the other one, and what
    /// only one of them has. Blocks.
    pub(super) fn compare(
        &self,
        source: &CheckpointDir,
        model: &CheckpointDir,
        fit: &Fit,
    ) -> Result<(Manifest, Manifest, Vec<OddTensor>), String> {
        let model = self.model(model).map_err(|error| {
            format!("cannot read the checkpoint that the engines were started from: {error}")
        })?;
        let new = source.manifest().and_then(|new| new.renamed(&fit.rename));
        let new = new.map_err(|error| error.to_string())?;
        let odd = new.check_against(&model, fit).map_err(|error| error.to_string())?;
        Ok((new, model, odd))
    }

    /// The same, and hashes it. Blocks.
    pub(super) fn check(
        &self,
        source: &CheckpointDir,
        model: &CheckpointDir,
        fit: &Fit,
        progress: &(dyn Fn(Progress) + Sync),
        cancel: &AtomicBool,
    ) -> Result<Checkpoint, String> {
        let (new, model, odd) = self.compare(source, model, fit)?;
        // The digest is that of the files, whatever their tensors are loaded as.
        let original = source.manifest().map_err(|error| error.to_string())?;
        let digest = self.digest(&original, progress, cancel).map_err(|error| error.to_string())?;
        let files = new.open().map_err(|error| error.to_string())?;
        let copies = new.check_copies(&model, fit, |tensor, at, buffer| {
            let read = files[tensor.file].read_exact_at(buffer, tensor.start + at);
            read.map_err(|error| new.unreadable(tensor.file, &error))
        });
        copies.map_err(|error| error.to_string())?;
        Ok(Checkpoint { odd, rename: fit.rename.clone(), ..new.checkpoint(Some(digest)) })
    }

    /// Reads an adapter, compares its shapes with the checkpoint that the engines were started from, and hashes it.
    /// Blocks.
    pub(super) fn adapter(
        &self,
        path: &Path,
        model: &CheckpointDir,
        cancel: &AtomicBool,
    ) -> Result<(Checkpoint, String), String> {
        let failed = |error: &dyn std::fmt::Display| format!("adapter in {}: {error}", path.display());
        if !path.is_absolute() {
            return Err(failed(&"expected an absolute path"));
        }
        let path = path.canonicalize().map_err(|error| failed(&error))?;
        let config = adapter_config(&path.join("adapter_config.json"))
            .map_err(|error| failed(&format!("adapter_config.json: {error}")))?;
        let manifest = Manifest::read(&path, None).map_err(|error| failed(&error))?;
        let model = self.model(model).inspect_err(|error| {
            tracing::warn!("the shapes of an adapter are not compared with the model's: {error}");
        });
        manifest.check_adapter(model.ok().as_ref()).map_err(|error| failed(&error))?;
        let digest = self.digest(&manifest, &|_| {}, cancel).map_err(|error| failed(&error))?;
        let checkpoint = manifest.checkpoint(Some(digest));
        if checkpoint.files != [ADAPTER_FILE] {
            let files = checkpoint.files.join(", ");
            return Err(failed(&format!("files {files}, expected {ADAPTER_FILE}")));
        }
        Ok((checkpoint, config))
    }

    fn model(&self, model: &CheckpointDir) -> Result<Manifest, ManifestError> {
        if let Some(known) = self.inner.lock().models.get(&model.path) {
            return Ok(known.clone());
        }
        let manifest = model.manifest()?;
        let mut inner = self.inner.lock();
        Ok(inner.models.entry(model.path.clone()).or_insert(manifest).clone())
    }

    /// The checkpoint that the engines were started from, checked to be what it was when it was first seen. Blocks.
    pub(super) fn startup(&self, model: &CheckpointDir, cancel: &AtomicBool) -> Result<Checkpoint, String> {
        let gone = |error: &dyn std::fmt::Display| {
            format!("the directory of the current weights, {}, cannot be used: {error}", model.path)
        };
        let model = self.model(model).map_err(|error| gone(&error))?;
        model.check_unchanged().map_err(|error| gone(&error))?;
        let digest = self.digest(&model, &|_| {}, cancel).map_err(|error| gone(&error))?;
        Ok(model.checkpoint(Some(digest)))
    }

    /// Whether a directory still holds what it held when it was committed. Blocks.
    pub(super) fn verify(&self, checkpoint: &Checkpoint, cancel: &AtomicBool) -> Result<(), String> {
        let files = Some(&checkpoint.files[..]);
        let manifest = Manifest::read(Path::new(&checkpoint.path), files).map_err(|e| e.to_string())?;
        let digest = self.digest(&manifest, &|_| {}, cancel).map_err(|error| error.to_string())?;
        match &checkpoint.digest {
            Some(expected) if *expected != digest => {
                Err(format!("its content has changed: digest {digest}, expected {expected}"))
            }
            _ => Ok(()),
        }
    }

    fn digest(
        &self,
        manifest: &Manifest,
        progress: &(dyn Fn(Progress) + Sync),
        cancel: &AtomicBool,
    ) -> Result<String, ManifestError> {
        if let Some((files, digest)) = self.inner.lock().digests.get(&manifest.path)
            && *files == manifest.files
        {
            let total = manifest.bytes();
            progress(Progress { done: total, total });
            return Ok(digest.clone());
        }
        let digests = manifest.digests(progress, cancel)?;
        let entry = (manifest.files.clone(), digests.whole.clone());
        let mut inner = self.inner.lock();
        inner.digests.insert(manifest.path.clone(), entry);
        // Two directories are in use at a time; a few more do not matter.
        while inner.digests.len() > 16 {
            inner.digests.pop_first();
        }
        Ok(digests.whole)
    }
}

/// Text of an adapter's configuration.
fn adapter_config(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let file = files::open_regular(path).map_err(|error| error.to_string())?;
    file.take(MAX_CONFIG + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(format!("more than {MAX_CONFIG} bytes"));
    }
    let config: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).map_err(|error| error.to_string())?;
    match config.get("peft_type").map(|kind| kind.as_str()) {
        None | Some(Some("LORA")) => Ok(text),
        Some(_) => Err("describes no LoRA adapter".to_owned()),
    }
}
