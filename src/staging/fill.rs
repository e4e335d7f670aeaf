//! The filling of one segment: which chunks are known and valid, what the next node wants, and how it ends.
//! Shared by the threads of a job.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::digest::{Contents, Digest, root};
use super::error::StageError;
use super::layout::Layout;
use super::mapping::{Claim, Mapping};
use crate::api::{Chunks, StageProgress};
use crate::duration::millis;

/// Most digests in one announcement.
const BATCH: usize = 512;

/// Where a chunk came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A directory, or an upload.
    Read,
    /// The network.
    Received,
    /// Memory of this node.
    Reused,
}

/// What the thread that feeds the next node does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Tell digests.
    Announce(Vec<(u32, Digest)>),
    /// Tell that there are no more, with the digest of the whole.
    AllKnown(String),
    /// Send a chunk, which is valid.
    Send(u32),
    /// Nothing now.
    Idle,
    /// It has failed or was called off.
    Ended,
}

#[derive(Clone, Debug, Default)]
struct Downstream {
    /// Entries of `known` that were told.
    announced: usize,
    all_told: bool,
    /// Wanted, and not sent since.
    wanted: Vec<bool>,
    /// Wanted and valid.
    ready: VecDeque<u32>,
    /// The next node has everything.
    done: bool,
}

#[derive(Clone, Debug)]
struct Inner {
    digests: Vec<Option<Digest>>,
    /// Chunks in the order in which their digests became known.
    known: Vec<u32>,
    valid: Vec<bool>,
    progress: StageProgress,
    cancelled: bool,
    failure: Option<Arc<StageError>>,
    down: Option<Downstream>,
}

/// The filling of one segment.
#[derive(Debug)]
pub(super) struct Fill {
    mapping: Arc<Mapping>,
    inner: Mutex<Inner>,
    /// Something for the thread that feeds the next node.
    down_changed: Condvar,
    /// Something for the thread that leads the job.
    lead_changed: Condvar,
    started: Instant,
}

impl Fill {
    /// Nothing is known yet.
    pub(super) fn new(mapping: Arc<Mapping>) -> Self {
        let chunks = mapping.layout().chunks();
        let inner = Inner {
            digests: vec![None; chunks as usize],
            known: Vec::with_capacity(chunks as usize),
            valid: vec![false; chunks as usize],
            progress: StageProgress {
                total: mapping.layout().bytes(),
                chunks: Chunks { done: 0, total: u64::from(chunks) },
                ..StageProgress::default()
            },
            cancelled: false,
            failure: None,
            down: None,
        };
        Self::with(mapping, inner)
    }

    fn with(mapping: Arc<Mapping>, inner: Inner) -> Self {
        Self {
            mapping,
            inner: Mutex::new(inner),
            down_changed: Condvar::new(),
            lead_changed: Condvar::new(),
            started: Instant::now(),
        }
    }

    /// All chunks are there: to be passed on.
    pub(super) fn full(mapping: Arc<Mapping>, digests: &[Digest]) -> Self {
        let mut fill = Self::new(mapping);
        let known = fill.layout().order();
        let inner = fill.inner.get_mut();
        inner.known = known;
        inner.digests = digests.iter().copied().map(Some).collect();
        inner.valid.fill(true);
        inner.progress.chunks.done = inner.progress.chunks.total;
        inner.progress.done = inner.progress.total;
        inner.progress.reused = inner.progress.total;
        fill
    }

    /// What was filled, without its failure and without a next node.
    pub(super) fn again(&self) -> Self {
        let inner = self.inner.lock().clone();
        let inner = Inner { cancelled: false, failure: None, down: None, ..inner };
        Self::with(Arc::clone(&self.mapping), inner)
    }

    /// The layout of the segment.
    pub(super) fn layout(&self) -> &Arc<Layout> {
        self.mapping.layout()
    }

    /// Its memory.
    pub(super) const fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The digest of a chunk is known. False: another one was known before.
    pub(super) fn know(&self, chunk: u32, digest: Digest) -> bool {
        let mut inner = self.inner.lock();
        let agreed = inner.know(chunk, digest);
        drop(inner);
        self.down_changed.notify_all();
        agreed
    }

    /// The chunk of a claim holds its bytes. False: another digest was known before, and nothing is done.
    pub(super) fn finish(&self, claim: Claim, digest: Digest, origin: Origin) -> bool {
        let chunk = claim.chunk();
        let bytes = claim.len() as u64;
        let mut inner = self.inner.lock();
        if !inner.know(chunk, digest) {
            return false;
        }
        claim.finish();
        inner.valid[chunk as usize] = true;
        inner.progress.chunks.done += 1;
        inner.progress.done += bytes;
        if origin == Origin::Reused {
            inner.progress.reused += bytes;
        }
        if let Some(down) = &mut inner.down
            && down.wanted[chunk as usize]
        {
            down.ready.push_back(chunk);
        }
        let (_, offset) = self.layout().locate(chunk);
        let lead = offset == 0 || inner.is_complete();
        drop(inner);
        self.down_changed.notify_all();
        if lead {
            self.lead_changed.notify_all();
        }
        true
    }

    /// Payload came over the network.
    pub(super) fn count_received(&self, bytes: u64) {
        self.inner.lock().progress.received += bytes;
    }

    /// All digests, if all are known.
    pub(super) fn all_digests(&self) -> Option<Vec<Digest>> {
        self.inner.lock().digests.iter().copied().collect()
    }

    /// The chunks that are valid.
    pub(super) fn contents(&self) -> Contents {
        let inner = self.inner.lock();
        let digests = inner.digests.iter().zip(&inner.valid);
        let digests = digests.map(|(digest, valid)| digest.filter(|_| *valid)).collect();
        Contents { layout: Arc::clone(self.layout()), digests }
    }

    pub(super) fn digest(&self, chunk: u32) -> Option<Digest> {
        self.inner.lock().digests.get(chunk as usize).copied().flatten()
    }

    /// Is the chunk valid?
    pub(super) fn is_valid(&self, chunk: u32) -> bool {
        self.inner.lock().valid.get(chunk as usize).copied().unwrap_or(false)
    }

    /// Are all chunks valid?
    pub(super) fn complete(&self) -> bool {
        self.inner.lock().is_complete()
    }

    /// How far it is.
    pub(super) fn progress(&self) -> StageProgress {
        StageProgress { ms: millis(self.started.elapsed()), ..self.inner.lock().progress }
    }

    /// It has failed; the first cause sticks. That the job has ended is none.
    pub(super) fn fail(&self, error: StageError) {
        if !matches!(error, StageError::Cancelled) {
            self.inner.lock().failure.get_or_insert_with(|| Arc::new(error));
        }
        self.wake();
    }

    /// It is called off.
    pub(super) fn cancel(&self) {
        self.inner.lock().cancelled = true;
        self.wake();
    }

    /// Failed or called off.
    pub(super) fn ended(&self) -> bool {
        let inner = self.inner.lock();
        inner.cancelled || inner.failure.is_some()
    }

    /// Why it failed.
    pub(super) fn failure(&self) -> Option<Arc<StageError>> {
        self.inner.lock().failure.clone()
    }

    /// Was it called off?
    pub(super) fn cancelled(&self) -> bool {
        self.inner.lock().cancelled
    }

    /// From now on there is a next node.
    pub(super) fn open_down(&self) {
        let wanted = vec![false; self.layout().chunks() as usize];
        self.inner.lock().down = Some(Downstream { wanted, ..Downstream::default() });
    }

    /// The next node wants a chunk. False: there is no such chunk.
    pub(super) fn want(&self, chunk: u32) -> bool {
        let mut inner = self.inner.lock();
        let Some(valid) = inner.valid.get(chunk as usize).copied() else { return false };
        if let Some(down) = &mut inner.down
            && !std::mem::replace(&mut down.wanted[chunk as usize], true)
            && valid
        {
            down.ready.push_back(chunk);
        }
        drop(inner);
        self.down_changed.notify_all();
        true
    }

    /// The next node has everything.
    pub(super) fn down_done(&self) {
        if let Some(down) = &mut self.inner.lock().down {
            down.done = true;
        }
        self.wake();
    }

    /// Has the next node everything, or is there none?
    pub(super) fn is_down_done(&self) -> bool {
        self.inner.lock().down.as_ref().is_none_or(|down| down.done)
    }

    /// What to do for the next node; waits up to `tick` for something.
    pub(super) fn next_work(&self, tick: Duration) -> Work {
        let mut inner = self.inner.lock();
        let until = Instant::now() + tick;
        loop {
            if inner.cancelled || inner.failure.is_some() {
                return Work::Ended;
            }
            if let Some(work) = inner.work(self.layout()) {
                return work;
            }
            let done = inner.down.as_ref().is_none_or(|down| down.done);
            if done || self.down_changed.wait_until(&mut inner, until).timed_out() {
                return Work::Idle;
            }
        }
    }

    /// Waits up to `tick` for the first chunk of a file, for completion, failure, or the next node's completion.
    pub(super) fn wait(&self, tick: Duration) {
        let mut inner = self.inner.lock();
        if inner.cancelled || inner.failure.is_some() {
            return;
        }
        self.lead_changed.wait_for(&mut inner, tick);
    }

    fn wake(&self) {
        self.down_changed.notify_all();
        self.lead_changed.notify_all();
    }
}

impl Inner {
    const fn is_complete(&self) -> bool {
        self.progress.chunks.done == self.progress.chunks.total
    }

    fn know(&mut self, chunk: u32, digest: Digest) -> bool {
        let Some(slot) = self.digests.get_mut(chunk as usize) else { return false };
        match slot {
            Some(known) => *known == digest,
            None => {
                *slot = Some(digest);
                self.known.push(chunk);
                true
            }
        }
    }

    fn work(&mut self, layout: &Layout) -> Option<Work> {
        let down = self.down.as_mut()?;
        if down.announced < self.known.len() {
            let end = self.known.len().min(down.announced + BATCH);
            let batch = &self.known[down.announced..end];
            let digests = batch.iter().filter_map(|chunk| Some((*chunk, self.digests[*chunk as usize]?)));
            down.announced = end;
            return Some(Work::Announce(digests.collect()));
        }
        if !down.all_told && self.known.len() == layout.chunks() as usize {
            down.all_told = true;
            let digests: Vec<Digest> = self.digests.iter().copied().flatten().collect();
            return Some(Work::AllKnown(root(layout, &digests)));
        }
        let chunk = down.ready.pop_front()?;
        down.wanted[chunk as usize] = false;
        Some(Work::Send(chunk))
    }
}
