//! Checkpoints that a trainer uploads piece by piece, straight into the spare segment.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

/// Requests waiting for the staging task.
const REQUESTS: usize = 16;

/// One file of an upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadFile {
    /// Plain file name, ending in `.safetensors`.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
}

/// What is there of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadedFile {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Ranges `[from, to)` that are there, ascending, not touching each other.
    pub ranges: Vec<(u64, u64)>,
}

/// What is there of an upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadStatus {
    /// Its name.
    pub id: String,
    /// Its files.
    pub files: Vec<UploadedFile>,
    /// Bytes there.
    pub received: u64,
    /// Bytes altogether.
    pub total: u64,
    /// All bytes are there.
    pub complete: bool,
}

/// An upload was refused, or a piece of it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UploadError {
    /// No upload of that name.
    #[error("no upload {id:?}")]
    Unknown {
        /// The name.
        id: String,
    },
    /// No such file in it.
    #[error("upload {id:?} has no file {file:?}")]
    UnknownFile {
        /// The upload.
        id: String,
        /// The file.
        file: String,
    },
    /// The segment is in use.
    #[error("upload {id:?}: {reason}")]
    Busy {
        /// The upload.
        id: String,
        /// By what.
        reason: String,
    },
    /// The request makes no sense.
    #[error("upload {id:?}: {reason}")]
    Invalid {
        /// The upload.
        id: String,
        /// Why.
        reason: String,
    },
    /// There is no room for it.
    #[error("upload {id:?}: {reason}")]
    NoSpace {
        /// The upload.
        id: String,
        /// Needed and free bytes.
        reason: String,
    },
    /// The staging area has ended, or the upload was given up.
    #[error("upload {id:?} was given up: {reason}")]
    Gone {
        /// The upload.
        id: String,
        /// Why.
        reason: String,
    },
}

/// What uploads ask of the staging task.
#[derive(Debug)]
#[expect(dead_code, reason = "answered by the task that is to come")]
pub(super) struct Create {
    pub(super) id: String,
    pub(super) files: Vec<UploadFile>,
    pub(super) reply: oneshot::Sender<Result<UploadStatus, UploadError>>,
}

/// Handle of the uploads of a node; cheap to clone.
#[derive(Clone, Debug)]
pub struct Uploads {
    requests: mpsc::Sender<Create>,
}

/// The staging task's end of [`Uploads`].
#[derive(Debug)]
pub struct UploadRequests(
    #[expect(dead_code, reason = "read by the task that is to come")] pub(super) mpsc::Receiver<Create>,
);

/// Makes a handle for uploads, and what the staging task needs to serve it.
pub fn channel() -> (Uploads, UploadRequests) {
    let (requests, receiver) = mpsc::channel(REQUESTS);
    (Uploads { requests }, UploadRequests(receiver))
}

impl Uploads {
    /// Takes room for an upload. The same id with the same files again: what is there of it.
    pub async fn create(&self, id: &str, files: Vec<UploadFile>) -> Result<UploadStatus, UploadError> {
        let (reply, answer) = oneshot::channel();
        let gone = |reason: &str| UploadError::Gone { id: id.to_owned(), reason: reason.to_owned() };
        let create = Create { id: id.to_owned(), files, reply };
        self.requests.send(create).await.map_err(|_| gone("the staging area has ended"))?;
        answer.await.map_err(|_| gone("the staging area has ended"))?
    }

    /// What is there.
    pub fn status(&self, id: &str) -> Result<UploadStatus, UploadError> {
        Err(UploadError::Unknown { id: id.to_owned() })
    }

    /// Puts bytes at an offset of a file. Bytes that are there already are skipped, whatever they are. Does not
    /// wait, but copies and hashes: give it some 100 KiB at a time.
    pub fn write(&self, id: &str, file: &str, offset: u64, bytes: &[u8]) -> Result<(), UploadError> {
        let _ = (file, offset, bytes);
        Err(UploadError::Unknown { id: id.to_owned() })
    }

    /// Gives an upload up; bytes stay as candidates for reuse.
    pub async fn discard(&self, id: &str) -> Result<(), UploadError> {
        Err(UploadError::Unknown { id: id.to_owned() })
    }
}
