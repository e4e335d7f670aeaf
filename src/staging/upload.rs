//! Checkpoints that a trainer uploads piece by piece, straight into the spare segment. Complete chunks flow on
//! down the chain while others arrive, once an update with this source has begun.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use super::digest::Digest;
use super::fill::{Fill, Origin};
use super::journal::Journal;
use super::layout::FileSize;
use super::mapping::Claim;

/// An upload that nobody touches can be displaced, and one that an update takes has failed, after this long.
pub(super) const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Requests waiting for the staging task.
const REQUESTS: usize = 16;
/// So many uploads that have ended are remembered.
const REMEMBERED: usize = 8;

/// What is there of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadedFile {
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Ranges `[from, to)` that are there, ascending, not touching each other.
    pub ranges: Vec<(u64, u64)>,
}

/// What is there of an upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadStatus {
    pub id: String,
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
    Unknown { id: String },
    /// No such file in it.
    #[error("upload {id:?} has no file {file:?}")]
    UnknownFile { id: String, file: String },
    /// The segment is in use; the reason says by what.
    #[error("upload {id:?}: {reason}")]
    Busy { id: String, reason: String },
    /// The request makes no sense.
    #[error("upload {id:?}: {reason}")]
    Invalid { id: String, reason: String },
    /// There is no room for it; the reason says how many bytes are needed and free.
    #[error("upload {id:?}: {reason}")]
    NoSpace { id: String, reason: String },
    /// The staging area has ended, or the upload was given up.
    #[error("upload {id:?} was given up: {reason}")]
    Gone { id: String, reason: String },
}

/// What uploads ask of the staging task.
#[derive(Debug)]
pub(super) enum Ask {
    Create { id: String, files: Vec<FileSize>, reply: oneshot::Sender<Result<UploadStatus, UploadError>> },
    Discard { id: String, reply: oneshot::Sender<Result<(), UploadError>> },
}

/// Handle of the uploads of a node; cheap to clone.
#[derive(Clone, Debug)]
pub struct Uploads {
    requests: mpsc::Sender<Ask>,
    sessions: Arc<Mutex<Sessions>>,
    opened: watch::Receiver<bool>,
}

/// The staging task's end of [`Uploads`].
#[derive(Debug)]
pub struct UploadRequests {
    pub(super) requests: mpsc::Receiver<Ask>,
    pub(super) sessions: Arc<Mutex<Sessions>>,
    pub(super) opened: watch::Sender<bool>,
}

/// Uploads by name.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    open: BTreeMap<String, Arc<Session>>,
    ended: Vec<UploadStatus>,
}

impl Sessions {
    pub(super) fn open(&mut self, session: Arc<Session>) {
        self.ended.retain(|status| status.id != session.id);
        self.open.insert(session.id.clone(), session);
    }

    pub(super) fn get(&self, id: &str) -> Option<Arc<Session>> {
        self.open.get(id).cloned()
    }

    /// Nothing more is taken; what was there is remembered.
    pub(super) fn end(&mut self, id: &str) {
        let Some(session) = self.open.remove(id) else { return };
        self.ended.push(session.status());
        session.close();
        if self.ended.len() > REMEMBERED {
            self.ended.remove(0);
        }
    }
}

/// Makes a handle for uploads, and what the staging task needs to serve it.
pub fn channel() -> (Uploads, UploadRequests) {
    let (requests, receiver) = mpsc::channel(REQUESTS);
    let (opened, is_opened) = watch::channel(false);
    let sessions = Arc::new(Mutex::new(Sessions::default()));
    let uploads = Uploads { requests, sessions: Arc::clone(&sessions), opened: is_opened };
    (uploads, UploadRequests { requests: receiver, sessions, opened })
}

impl Uploads {
    /// Takes room for an upload. The same id with the same files again: what is there of it.
    pub async fn create(&self, id: &str, files: Vec<FileSize>) -> Result<UploadStatus, UploadError> {
        let (reply, answer) = oneshot::channel();
        self.ask(id, Ask::Create { id: id.to_owned(), files, reply }, answer).await
    }

    /// Waits until the staging task has looked at what a predecessor left. Before that nothing is known of its
    /// upload.
    pub async fn opened(&self) {
        // Where the task has ended, all that is asked of it says so.
        let _ = self.opened.clone().wait_for(|opened| *opened).await;
    }

    pub fn status(&self, id: &str) -> Result<UploadStatus, UploadError> {
        let sessions = self.sessions.lock();
        if let Some(session) = sessions.open.get(id) {
            return Ok(session.status());
        }
        let ended = sessions.ended.iter().find(|status| status.id == id).cloned();
        ended.ok_or_else(|| UploadError::Unknown { id: id.to_owned() })
    }

    /// Puts bytes at an offset of a file. Bytes that are there already are skipped, whatever they are. Does not
    /// wait, but copies and hashes: give it some 100 KiB at a time.
    pub fn write(&self, id: &str, file: &str, offset: u64, bytes: &[u8]) -> Result<(), UploadError> {
        let session = self.sessions.lock().get(id);
        match session {
            Some(session) => session.write(file, offset, bytes),
            // Everything was there when it ended; a repeated piece changes nothing.
            None if self.status(id)?.complete => Ok(()),
            None => Err(UploadError::Gone { id: id.to_owned(), reason: "it has ended".to_owned() }),
        }
    }

    /// Gives an upload up; bytes stay as candidates for reuse. Refused while an update takes it.
    pub async fn discard(&self, id: &str) -> Result<(), UploadError> {
        let (reply, answer) = oneshot::channel();
        self.ask(id, Ask::Discard { id: id.to_owned(), reply }, answer).await
    }

    async fn ask<T>(
        &self,
        id: &str,
        ask: Ask,
        answer: oneshot::Receiver<Result<T, UploadError>>,
    ) -> Result<T, UploadError> {
        let gone =
            || UploadError::Gone { id: id.to_owned(), reason: "the staging area has ended".to_owned() };
        self.requests.send(ask).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// A chunk of which some bytes are there.
#[derive(Debug)]
struct Partial {
    claim: Claim,
    /// Ranges in the chunk, ascending, not touching each other.
    ranges: Vec<(usize, usize)>,
}

/// An upload that takes bytes.
#[derive(Debug)]
pub(super) struct Session {
    id: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    fill: Arc<Fill>,
    partial: BTreeMap<u32, Partial>,
    /// When somebody came to it last; never since the sidecar was started.
    touched: Option<Instant>,
    /// For a successor.
    journal: Option<Journal>,
    closed: bool,
}

impl Session {
    pub(super) fn new(id: String, fill: Arc<Fill>, journal: Option<Journal>) -> Self {
        let state = State { fill, partial: BTreeMap::new(), touched: None, journal, closed: false };
        Self { id, state: Mutex::new(state) }
    }

    pub(super) fn fill(&self) -> Arc<Fill> {
        Arc::clone(&self.state.lock().fill)
    }

    /// Somebody came to it.
    pub(super) fn touch(&self) {
        self.state.lock().touched = Some(Instant::now());
    }

    /// For how long nobody came to it. One that a predecessor left waits for nobody: what else wants the segment may
    /// have it.
    pub(super) fn idle(&self) -> Duration {
        self.state.lock().touched.map_or(Duration::MAX, |touched| touched.elapsed())
    }

    /// After a failed update: the bytes are kept for the next one.
    pub(super) fn renew(&self) -> Arc<Fill> {
        let mut state = self.state.lock();
        state.fill = Arc::new(state.fill.again());
        Arc::clone(&state.fill)
    }

    fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.partial.clear();
        state.journal = None;
    }

    fn write(&self, name: &str, offset: u64, mut bytes: &[u8]) -> Result<(), UploadError> {
        let mut state = self.state.lock();
        state.touched = Some(Instant::now());
        let id = || self.id.clone();
        let fill = Arc::clone(&state.fill);
        let layout = fill.layout();
        let file = layout.files().iter().position(|file| file.name == name);
        let file = file.ok_or_else(|| UploadError::UnknownFile { id: id(), file: name.to_owned() })?;
        let size = layout.files()[file].size;
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= size);
        if end.is_none() {
            let reason = format!("{} bytes at {offset} of {name}, which is {size} bytes long", bytes.len());
            return Err(UploadError::Invalid { id: id(), reason });
        }
        let chunk_size = u64::from(layout.chunk_size());
        let mut at = offset;
        while !bytes.is_empty() {
            if state.closed {
                return Err(UploadError::Gone { id: id(), reason: "it has ended".to_owned() });
            }
            let invalid = |_| UploadError::Invalid { id: id(), reason: "it is too large".to_owned() };
            let chunk = layout.first_chunk(file) + u32::try_from(at / chunk_size).map_err(invalid)?;
            let from = usize::try_from(at % chunk_size).unwrap_or(0);
            let length = bytes.len().min(layout.length(chunk) as usize - from);
            let (piece, rest) = bytes.split_at(length);
            state.put(chunk, from, piece);
            bytes = rest;
            at += length as u64;
        }
        Ok(())
    }

    pub(super) fn status(&self) -> UploadStatus {
        let state = self.state.lock();
        let fill = &state.fill;
        let layout = fill.layout();
        let mut files: Vec<UploadedFile> = layout
            .files()
            .iter()
            .map(|file| UploadedFile { name: file.name.clone(), size: file.size, ranges: Vec::new() })
            .collect();
        let mut received = 0;
        for chunk in 0..layout.chunks() {
            let (file, offset) = layout.locate(chunk);
            let whole = [(0, layout.length(chunk) as usize)];
            let ranges = match state.partial.get(&chunk) {
                Some(partial) => partial.ranges.as_slice(),
                None if fill.is_valid(chunk) => &whole,
                None => &[],
            };
            for (from, to) in ranges {
                let (from, to) = (offset + *from as u64, offset + *to as u64);
                received += to - from;
                match files[file].ranges.last_mut() {
                    Some(last) if last.1 == from => last.1 = to,
                    _ => files[file].ranges.push((from, to)),
                }
            }
        }
        let total = layout.bytes();
        UploadStatus { id: self.id.clone(), files, received, total, complete: received == total }
    }
}

impl State {
    /// Puts bytes into a chunk; a chunk that is full is hashed and becomes valid.
    fn put(&mut self, chunk: u32, from: usize, bytes: &[u8]) {
        let partial = match self.partial.entry(chunk) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                // Valid already: nothing to do.
                let Some(claim) = self.fill.mapping().claim(chunk) else { return };
                entry.insert(Partial { claim, ranges: Vec::new() })
            }
        };
        partial.put(from, bytes);
        if partial.ranges == [(0, partial.claim.len())]
            && let Some(Partial { claim, .. }) = self.partial.remove(&chunk)
        {
            let digest = Digest::of(&claim);
            if self.fill.finish(claim, digest, Origin::Read)
                && let Some(journal) = &self.journal
                && let Err(error) = journal.note(chunk, digest)
            {
                tracing::warn!(%error, "after a restart of the sidecar this upload begins again");
                self.journal = None;
            }
        }
    }
}

impl Partial {
    /// Copies what is missing, and notes it.
    fn put(&mut self, from: usize, bytes: &[u8]) {
        let to = from + bytes.len();
        let mut at = from;
        for (start, end) in self.ranges.iter().copied().filter(|(_, end)| *end > from).collect::<Vec<_>>() {
            if start >= to {
                break;
            }
            if at < start {
                self.claim[at..start].copy_from_slice(&bytes[at - from..start - from]);
            }
            at = at.max(end);
        }
        if at < to {
            self.claim[at..to].copy_from_slice(&bytes[at - from..]);
        }
        insert(&mut self.ranges, (from, to));
    }
}

/// Adds a range and joins those that touch.
fn insert(ranges: &mut Vec<(usize, usize)>, (mut from, mut to): (usize, usize)) {
    ranges.retain(|(start, end)| {
        let touches = *start <= to && from <= *end;
        if touches {
            from = from.min(*start);
            to = to.max(*end);
        }
        !touches
    });
    let at = ranges.partition_point(|(start, _)| *start < from);
    ranges.insert(at, (from, to));
}
