//! The two segments of a node and what they hold, also over restarts.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use dp_sidecar_protocol::UpdateId;

use super::digest::{Digest, root};
use super::error::StageError;
use super::fill::{Fill, Origin};
use super::journal::{Journal, Noted};
use super::layout::Layout;
use super::mapping::{Mapping, Segment};
use super::records::{Records, Role, SegmentRecord};
use crate::api::Retain;
use crate::driver::handles::{StageState, StagedVersion};
use crate::files;
use crate::shared_memory::{SEGMENTS, segment_path};

/// A segment may be longer than its content by this much, in bytes.
const SLACK: u64 = 16 << 20;

/// What a segment held before it is filled anew.
#[derive(Clone, Debug, Default)]
pub(super) struct Old {
    /// Digests of chunks, where known, and the layout they are of.
    known: Option<(Arc<Layout>, Vec<Option<Digest>>)>,
    /// Something is there, nobody knows what: a sidecar ended while it was filled.
    unknown: bool,
}

impl Old {
    /// May the chunk be there already, at its place? Its bytes are still to be checked.
    pub(super) fn may_hold(&self, layout: &Layout, chunk: u32, digest: Digest) -> bool {
        if self.unknown {
            return true;
        }
        self.known.as_ref().is_some_and(|(old, digests)| {
            old.chunk_size() == layout.chunk_size()
                && digests.get(chunk as usize) == Some(&Some(digest))
                && old.length(chunk) == layout.length(chunk)
        })
    }
}

/// A complete version in a segment.
#[derive(Clone, Debug)]
pub(super) struct Whole {
    /// Name and what to load.
    pub(super) version: StagedVersion,
    /// Digests of all chunks.
    pub(super) digests: Arc<Vec<Digest>>,
    /// Its memory, all chunks valid.
    pub(super) mapping: Arc<Mapping>,
}

/// An upload that a predecessor took, with what is there of it.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) id: String,
    pub(super) spare: Spare,
    /// Chunks that are there are valid.
    pub(super) fill: Arc<Fill>,
    /// To go on with.
    pub(super) journal: Journal,
}

/// A segment on its way to be filled.
#[derive(Debug)]
pub(super) struct Spare {
    slot: usize,
    pub(super) segment: Segment,
    /// What it held.
    pub(super) old: Old,
}

impl Spare {
    /// Name of the segment.
    pub(super) const fn name(&self) -> &'static str {
        SEGMENTS[self.slot]
    }
}

#[derive(Debug, Default)]
enum Content {
    #[default]
    Nothing,
    /// With a job.
    Away,
    /// Candidates for reuse.
    Left(Old),
    Whole(Role, Whole),
}

#[derive(Debug, Default)]
struct Slot {
    segment: Option<Segment>,
    content: Content,
    /// Bytes, also while the segment is away.
    size: u64,
}

impl Slot {
    fn role(&self) -> Option<Role> {
        match &self.content {
            Content::Whole(role, _) => Some(*role),
            _ => None,
        }
    }

    fn whole(&self, wanted: Role) -> Option<&Whole> {
        match &self.content {
            Content::Whole(role, whole) if *role == wanted => Some(whole),
            _ => None,
        }
    }
}

/// The two segments of a node.
#[derive(Debug)]
pub(super) struct Area {
    node: String,
    shm_dir: PathBuf,
    state_dir: PathBuf,
    run_id: String,
    max_memory: Option<u64>,
    slots: [Slot; 2],
}

impl Area {
    /// Finds what a predecessor left, and hashes what it said is complete. Blocks.
    ///
    /// # Errors
    /// `segments.json` cannot be read.
    pub(super) fn open(config: &super::StageConfig) -> io::Result<Self> {
        let mut area = Self {
            node: config.node.clone(),
            shm_dir: config.shm_dir.clone(),
            state_dir: config.state_dir.clone(),
            run_id: config.run_id.clone(),
            max_memory: config.max_memory,
            slots: Default::default(),
        };
        let mut records = Records::read(&config.state_dir)?;
        for (at, name) in SEGMENTS.iter().enumerate() {
            let path = segment_path(&area.shm_dir, &area.run_id, name);
            if !path.exists() {
                continue;
            }
            let slot = match found(&path, records.segments.remove(*name)) {
                Ok(slot) => slot,
                Err(error) => {
                    tracing::warn!(segment = %path.display(), %error, "a segment is not used");
                    Slot::default()
                }
            };
            area.slots[at] = slot;
        }
        Ok(area)
    }

    pub(super) fn state(&self) -> StageState {
        let version = |role| self.whole(role).map(|whole| whole.version.clone());
        StageState {
            current: version(Role::Current),
            previous: version(Role::Previous),
            staged: version(Role::Staged),
            memory: self.slots.iter().map(|slot| slot.size).sum(),
            ..StageState::default()
        }
    }

    /// The version in that role.
    pub(super) fn whole(&self, role: Role) -> Option<&Whole> {
        self.slots.iter().find_map(|slot| slot.whole(role))
    }

    /// The version that was staged or committed by this update.
    pub(super) fn by_id(&self, id: &UpdateId) -> Option<&Whole> {
        let whole = |role| self.whole(role).filter(|whole| whole.version.id == *id);
        whole(Role::Staged).or_else(|| whole(Role::Current))
    }

    /// Takes a segment to be filled: the one that is not current, or the only one. What it held is no version any
    /// more, from before a byte is written. Blocks.
    pub(super) fn take(&mut self, retain: Retain) -> Result<Spare, StageError> {
        if self.slots.iter().any(|slot| matches!(slot.content, Content::Away)) {
            return Err(StageError::Refused {
                node: self.node.clone(),
                reason: "the spare segment is in use".to_owned(),
            });
        }
        let current = self.slots.iter().position(|slot| slot.role() == Some(Role::Current));
        let used = self.slots.iter().position(|slot| slot.segment.is_some());
        let at = match (retain, current) {
            (Retain::Memory, Some(current)) => 1 - current,
            (_, current) => current.or(used).unwrap_or(0),
        };
        if retain != Retain::Memory {
            self.remove(1 - at)?;
        }
        self.take_slot(at)
    }

    fn take_slot(&mut self, at: usize) -> Result<Spare, StageError> {
        let slot = &mut self.slots[at];
        let old = match std::mem::replace(&mut slot.content, Content::Away) {
            Content::Left(old) => old,
            Content::Whole(_, whole) => Old {
                known: Some((
                    Arc::clone(whole.mapping.layout()),
                    whole.digests.iter().copied().map(Some).collect(),
                )),
                unknown: false,
            },
            Content::Nothing | Content::Away => Old::default(),
        };
        let segment = match slot.segment.take() {
            Some(segment) => Ok(segment),
            None => {
                let path = segment_path(&self.shm_dir, &self.run_id, SEGMENTS[at]);
                Segment::open(&path).map_err(|error| self.io(format!("opening {}", path.display()), error))
            }
        };
        let saved = segment.and_then(|segment| self.save().map(|()| segment));
        match saved {
            Ok(segment) => Ok(Spare { slot: at, segment, old }),
            Err(error) => {
                self.slots[at].content = Content::Left(old);
                Err(error)
            }
        }
    }

    /// The upload that a predecessor took, if its segment is there. Its chunks are hashed. Blocks.
    pub(super) fn kept_upload(&mut self) -> Option<Kept> {
        let kept = self.find_upload();
        if kept.is_none()
            && let Err(error) = Journal::remove(&self.state_dir)
        {
            tracing::warn!(%error, "the notes of an upload cannot be removed");
        }
        kept
    }

    fn find_upload(&mut self) -> Option<Kept> {
        let noted = Journal::read(&self.state_dir).unwrap_or_else(|error| {
            tracing::warn!(%error, "the upload of a predecessor is lost");
            None
        })?;
        let Noted { id, segment, layout, digests, journal } = noted;
        let at = SEGMENTS.iter().position(|name| *name == segment)?;
        let slot = &mut self.slots[at];
        if slot.role().is_some() {
            // It ended, and what came of it has been noted.
            return None;
        }
        let mapping = match slot.segment.as_mut()?.map(Arc::new(layout), false) {
            Ok(mapping) => mapping,
            Err(error) => {
                tracing::warn!(%error, "the upload of a predecessor is lost");
                return None;
            }
        };
        let fill = Arc::new(Fill::new(mapping));
        for_all(&digests, |chunk, digest| {
            if let Some(expected) = digest
                && let Some(claim) = fill.mapping().claim(chunk)
                && Digest::of(&claim) == *expected
            {
                fill.finish(claim, *expected, Origin::Read);
            }
            true
        });
        let old = match std::mem::replace(&mut slot.content, Content::Away) {
            Content::Left(old) => old,
            _ => Old { known: None, unknown: true },
        };
        let segment = slot.segment.take()?;
        Some(Kept { id, spare: Spare { slot: at, segment, old }, fill, journal })
    }

    /// Takes the segments that have no version, to be made ready before they are needed. Blocks.
    pub(super) fn take_idle(&mut self) -> Result<Vec<Spare>, StageError> {
        let mut taken = Vec::new();
        for at in 0..SEGMENTS.len() {
            if !matches!(self.slots[at].content, Content::Nothing | Content::Left(_)) {
                continue;
            }
            match self.take_slot(at) {
                Ok(spare) => taken.push(spare),
                Err(error) => {
                    for spare in taken {
                        self.give_back(spare, None, None)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    /// Bytes that the other segment takes.
    pub(super) fn besides(&self, spare: &Spare) -> u64 {
        self.slots[1 - spare.slot].size
    }

    /// A segment comes back: with a complete version, or with chunks of it. No upload has it any more.
    pub(super) fn give_back(
        &mut self,
        spare: Spare,
        chunks: Option<(Arc<Layout>, Vec<Option<Digest>>)>,
        whole: Option<Whole>,
    ) -> Result<(), StageError> {
        let removed = Journal::remove(&self.state_dir);
        let removed = removed.map_err(|error| self.io("removing the notes of an upload".to_owned(), error));
        let slot = &mut self.slots[spare.slot];
        slot.size = spare.segment.size().unwrap_or(0);
        slot.segment = Some(spare.segment);
        slot.content = match (whole, chunks) {
            (Some(whole), _) => Content::Whole(Role::Staged, whole),
            (None, None) => Content::Left(spare.old),
            (None, Some((layout, mut digests))) => {
                // A chunk that was not touched may still hold what it held.
                if let Some((old, old_digests)) = spare.old.known.filter(|(old, _)| **old == *layout) {
                    debug_assert_eq!(old.chunks(), layout.chunks());
                    for (digest, old) in digests.iter_mut().zip(old_digests) {
                        *digest = digest.or(old);
                    }
                }
                Content::Left(Old { known: Some((layout, digests)), unknown: spare.old.unknown })
            }
        };
        let saved = self.save();
        removed.and(saved)
    }

    /// The staged version becomes current, the current one previous.
    pub(super) fn commit(&mut self, id: &UpdateId, retain: Retain) -> Result<(), StageError> {
        if self.whole(Role::Current).is_some_and(|whole| whole.version.id == *id) {
            return Ok(());
        }
        if self.whole(Role::Staged).is_none_or(|whole| whole.version.id != *id) {
            return Err(StageError::Refused {
                node: self.node.clone(),
                reason: format!("update {id} is not staged"),
            });
        }
        for slot in &mut self.slots {
            if let Content::Whole(role, _) = &mut slot.content {
                *role = if *role == Role::Staged { Role::Current } else { Role::Previous };
            }
        }
        if retain != Retain::Memory
            && let Some(at) = self.slots.iter().position(|slot| slot.role() == Some(Role::Previous))
        {
            self.remove(at)?;
        }
        self.save()
    }

    /// A staged version is one no more; its bytes stay as candidates.
    pub(super) fn discard(&mut self, id: &UpdateId) -> Result<(), StageError> {
        for slot in &mut self.slots {
            if slot.whole(Role::Staged).is_some_and(|whole| whole.version.id == *id)
                && let Content::Whole(_, whole) = std::mem::take(&mut slot.content)
            {
                let digests = whole.digests.iter().copied().map(Some).collect();
                let known = Some((Arc::clone(whole.mapping.layout()), digests));
                slot.content = Content::Left(Old { known, unknown: false });
            }
        }
        self.save()
    }

    /// Makes a taken segment large enough, within the limits, unless `stop` says that nobody wants it any more. Blocks.
    pub(super) fn allocate(
        limits: &Limits,
        spare: &mut Spare,
        size: u64,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), StageError> {
        let node = || limits.node.clone();
        let before = spare.segment.size().unwrap_or(0);
        let needed = size.max(before).saturating_add(limits.besides);
        if let Some(limit) = limits.max_memory
            && needed > limit
        {
            return Err(StageError::Limit { node: node(), needed, limit });
        }
        spare.segment.allocate(size, SLACK, stop).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => StageError::Cancelled { node: node() },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let free = rustix::fs::statvfs(&limits.shm_dir)
                    .map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
                let dir = limits.shm_dir.clone();
                StageError::NoSpace { node: node(), dir, needed: size.saturating_sub(before), free }
            }
            _ => {
                let what = format!("allocating {size} bytes in {}", spare.segment.path().display());
                StageError::Io { node: node(), what, error }
            }
        })
    }

    /// What a job needs to know to allocate.
    pub(super) fn limits(&self, spare: &Spare) -> Limits {
        Limits {
            node: self.node.clone(),
            shm_dir: self.shm_dir.clone(),
            max_memory: self.max_memory,
            besides: self.besides(spare),
        }
    }

    fn remove(&mut self, at: usize) -> Result<(), StageError> {
        let slot = std::mem::take(&mut self.slots[at]);
        if let Some(segment) = slot.segment {
            let what = format!("removing {}", segment.path().display());
            files::absent_is_fine(segment.remove()).map_err(|error| self.io(what, error))?;
        }
        Ok(())
    }

    fn save(&self) -> Result<(), StageError> {
        let mut records = Records::default();
        for (name, slot) in SEGMENTS.iter().zip(&self.slots) {
            let record = match &slot.content {
                Content::Nothing | Content::Away => continue,
                Content::Left(old) => match &old.known {
                    Some((layout, digests)) if !old.unknown => {
                        SegmentRecord::new(Role::Left, layout, digests.iter().copied(), None)
                    }
                    _ => continue,
                },
                Content::Whole(role, whole) => SegmentRecord::new(
                    *role,
                    whole.mapping.layout(),
                    whole.digests.iter().copied().map(Some),
                    Some(whole.version.clone()),
                ),
            };
            records.segments.insert((*name).to_owned(), record);
        }
        records
            .write(&self.state_dir)
            .map_err(|error| self.io(format!("writing {}", Records::path(&self.state_dir).display()), error))
    }

    fn io(&self, what: String, error: io::Error) -> StageError {
        StageError::Io { node: self.node.clone(), what, error }
    }
}

/// What allocation must keep to.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    node: String,
    shm_dir: PathBuf,
    max_memory: Option<u64>,
    besides: u64,
}

impl Limits {
    /// The other segment will have at least so many bytes.
    pub(super) fn beside(self, size: u64) -> Self {
        Self { besides: self.besides.max(size), ..self }
    }
}

/// A segment that was there at the start. Without a usable record its bytes are anything.
fn found(path: &Path, record: Option<SegmentRecord>) -> io::Result<Slot> {
    let mut segment = Segment::open(path)?;
    let size = segment.size()?;
    let anything = Content::Left(Old { known: None, unknown: true });
    let Some((record, layout)) = record.and_then(|record| Some((record.clone(), record.layout()?))) else {
        return Ok(Slot { segment: Some(segment), content: anything, size });
    };
    let digests = record.digests();
    let content = match (record.role, record.version, digests.iter().copied().collect::<Option<Vec<_>>>()) {
        (Role::Left, ..) => Content::Left(Old { known: Some((Arc::new(layout), digests)), unknown: false }),
        (role, Some(version), Some(digests)) => {
            let layout = Arc::new(layout);
            let mapping = segment.map(Arc::clone(&layout), true)?;
            match check(&mapping, &digests) {
                Some(chunk) => {
                    let chunk = layout.describe(chunk);
                    tracing::warn!(
                        segment = %path.display(), chunk, version = %version.version,
                        "a version in shared memory is damaged and not used"
                    );
                    anything
                }
                None if version.checkpoint.digest.as_ref() != Some(&root(&layout, &digests)) => anything,
                None => Content::Whole(role, Whole { version, digests: Arc::new(digests), mapping }),
            }
        }
        _ => anything,
    };
    Ok(Slot { segment: Some(segment), content, size })
}

/// Hashes all chunks; the number of one that is not what it should be.
fn check(mapping: &Mapping, digests: &[Digest]) -> Option<u32> {
    let bad = AtomicU32::new(u32::MAX);
    for_all(digests, |chunk, expected| {
        let good = mapping.bytes(chunk).map(Digest::of) == Some(*expected);
        if !good {
            bad.store(chunk, Ordering::Relaxed);
        }
        good
    });
    let bad = bad.into_inner();
    (bad != u32::MAX).then_some(bad)
}

/// Does something for all chunks, on all cores, until one says that it is enough.
fn for_all<T: Sync>(digests: &[T], work: impl Fn(u32, &T) -> bool + Sync) {
    let next = AtomicU32::new(0);
    let stop = AtomicBool::new(false);
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            let Some(digest) = digests.get(chunk as usize) else { return };
            if !work(chunk, digest) {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    std::thread::scope(|scope| {
        for _ in 1..cores {
            scope.spawn(work);
        }
        work();
    });
}
