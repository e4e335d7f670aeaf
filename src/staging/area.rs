//! The two segments of a node and what they hold, also over restarts.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;

use dp_sidecar_protocol::UpdateId;

use super::config::StageConfig;
use super::digest::{Contents, Digest, root};
use super::error::{Doing as _, StageError};
use super::fill::{Fill, Origin};
use super::journal::{Journal, Noted};
use super::layout::Layout;
use super::mapping::{Mapping, Segment};
use super::records::{Records, Role, SegmentRecord};
use crate::api::Retain;
use crate::driver::handles::{StageState, StagedVersion};
use crate::shared_memory::{SEGMENTS, segment_path};
use crate::{files, memory, parallel};

/// Most threads that hash what is in the segments.
const THREADS: usize = 16;
/// A segment may be longer than its content by this much, in bytes.
const SLACK: u64 = 16 << 20;

/// What a segment held before it is filled anew.
#[derive(Clone, Debug, Default)]
pub(super) struct Old {
    known: Option<Contents>,
    /// Something is there, nobody knows what: a sidecar ended while it was filled.
    unknown: bool,
}

impl Old {
    /// May the chunk be there already, at its place? Its bytes are still to be checked.
    pub(super) fn may_hold(&self, layout: &Layout, chunk: u32, digest: Digest) -> bool {
        if self.unknown {
            return true;
        }
        self.known.as_ref().is_some_and(|old| {
            old.layout.chunk_size() == layout.chunk_size()
                && old.digests.get(chunk as usize) == Some(&Some(digest))
                && old.layout.length(chunk) == layout.length(chunk)
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

impl Whole {
    fn contents(&self) -> Contents {
        let digests = self.digests.iter().copied().map(Some).collect();
        Contents { layout: Arc::clone(self.mapping.layout()), digests }
    }
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
    config: Arc<StageConfig>,
    slot: usize,
    pub(super) segment: Segment,
    /// What it held.
    pub(super) old: Old,
    /// Bytes that the other segment takes, or is going to take.
    pub(super) beside: u64,
}

impl Spare {
    /// Name of the segment.
    pub(super) const fn name(&self) -> &'static str {
        SEGMENTS[self.slot]
    }

    /// Makes it large enough, within the limits, unless `stop` says that nobody wants it any more. Blocks.
    pub(super) fn allocate(&mut self, size: u64, stop: &dyn Fn() -> bool) -> Result<(), StageError> {
        let before = self.segment.size().unwrap_or(0);
        let needed = size.max(before).saturating_add(self.beside);
        if let Some(limit) = self.config.max_memory
            && needed > limit
        {
            return Err(StageError::Limit { needed, limit });
        }
        let room = || memory::available(&self.config.system).0;
        self.segment.allocate(size, SLACK, &room, stop).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => StageError::Cancelled,
            io::ErrorKind::OutOfMemory => {
                let (free, by) = memory::available(&self.config.system);
                StageError::NoMemory { needed: size.saturating_sub(before), free, by }
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let dir = self.config.shm_dir.clone();
                let free =
                    rustix::fs::statvfs(&dir).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
                StageError::NoSpace { dir, needed: size.saturating_sub(before), free }
            }
            _ => {
                let what = format!("allocating {size} bytes in {}", self.segment.path().display());
                StageError::Io { what, error }
            }
        })
    }

    /// Makes it ready to be filled with a checkpoint of this layout. Blocks.
    pub(super) fn prepare(&mut self, layout: Layout, stop: &dyn Fn() -> bool) -> Result<Fill, StageError> {
        self.allocate(layout.segment_size(), stop)?;
        let mapping = self.segment.map(Arc::new(layout), false);
        Ok(Fill::new(mapping.doing(|| "mapping the segment".to_owned())?))
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

impl Content {
    /// What is there of use when it is filled anew.
    fn into_old(self) -> Old {
        match self {
            Self::Left(old) => old,
            Self::Whole(_, whole) => Old { known: Some(whole.contents()), unknown: false },
            Self::Nothing | Self::Away => Old::default(),
        }
    }
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
    config: Arc<StageConfig>,
    slots: [Slot; 2],
}

impl Area {
    /// Finds what a predecessor left, and hashes what it said is complete. Blocks.
    ///
    /// # Errors
    /// `segments.json` cannot be read.
    pub(super) fn open(config: Arc<StageConfig>) -> io::Result<Self> {
        let mut records = Records::read(&config.state_dir)?;
        let slots = SEGMENTS.map(|name| {
            let path = segment_path(&config.shm_dir, &config.run_id, name);
            if !path.exists() {
                return Slot::default();
            }
            found(&path, records.segments.remove(name)).unwrap_or_else(|error| {
                tracing::warn!(segment = %path.display(), %error, "a segment is not used");
                Slot::default()
            })
        });
        Ok(Self { config, slots })
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
            return Err(StageError::Refused("the spare segment is in use".to_owned()));
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
        let old = std::mem::replace(&mut slot.content, Content::Away).into_old();
        let path = segment_path(&self.config.shm_dir, &self.config.run_id, SEGMENTS[at]);
        let segment = match slot.segment.take() {
            Some(segment) => Ok(segment),
            None => Segment::open(&path).doing(|| format!("opening {}", path.display())),
        };
        match segment.and_then(|segment| self.save().map(|()| segment)) {
            Ok(segment) => Ok(self.spare(at, segment, old)),
            Err(error) => {
                self.slots[at].content = Content::Left(old);
                Err(error)
            }
        }
    }

    fn spare(&self, slot: usize, segment: Segment, old: Old) -> Spare {
        Spare { config: Arc::clone(&self.config), slot, segment, old, beside: self.slots[1 - slot].size }
    }

    /// The upload that a predecessor took, if its segment is there. Its chunks are hashed. Blocks.
    pub(super) fn kept_upload(&mut self) -> Option<Kept> {
        let kept = self.find_upload();
        if kept.is_none()
            && let Err(error) = Journal::remove(&self.config.state_dir)
        {
            tracing::warn!(%error, "the notes of an upload cannot be removed");
        }
        kept
    }

    fn find_upload(&mut self) -> Option<Kept> {
        let noted = Journal::read(&self.config.state_dir).unwrap_or_else(|error| {
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
        for_each_chunk(&digests, |chunk, digest| {
            if let Some(expected) = digest
                && let Some(claim) = fill.mapping().claim(chunk)
                && Digest::of(&claim) == *expected
            {
                fill.finish(claim, *expected, Origin::Read);
            }
            Ok::<(), Infallible>(())
        })
        .ok();
        let old = std::mem::replace(&mut slot.content, Content::Away).into_old();
        let segment = slot.segment.take()?;
        Some(Kept { id, spare: self.spare(at, segment, old), fill, journal })
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

    /// A segment comes back: with a complete version, or with chunks of it. No upload has it any more.
    pub(super) fn give_back(
        &mut self,
        spare: Spare,
        contents: Option<Contents>,
        whole: Option<Whole>,
    ) -> Result<(), StageError> {
        let removed = Journal::remove(&self.config.state_dir);
        let removed = removed.doing(|| "removing the notes of an upload".to_owned());
        let slot = &mut self.slots[spare.slot];
        slot.size = spare.segment.size().unwrap_or(0);
        slot.segment = Some(spare.segment);
        slot.content = match (whole, contents) {
            (Some(whole), _) => Content::Whole(Role::Staged, whole),
            (None, None) => Content::Left(spare.old),
            (None, Some(mut contents)) => {
                // A chunk that was not touched may still hold what it held.
                if let Some(old) = spare.old.known.filter(|old| old.layout == contents.layout) {
                    for (digest, old) in contents.digests.iter_mut().zip(old.digests) {
                        *digest = digest.or(old);
                    }
                }
                Content::Left(Old { known: Some(contents), unknown: spare.old.unknown })
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
            return Err(StageError::Refused(format!("update {id} is not staged")));
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
            if slot.whole(Role::Staged).is_some_and(|whole| whole.version.id == *id) {
                slot.content = Content::Left(std::mem::take(&mut slot.content).into_old());
            }
        }
        self.save()
    }

    fn remove(&mut self, at: usize) -> Result<(), StageError> {
        let slot = std::mem::take(&mut self.slots[at]);
        if let Some(segment) = slot.segment {
            let path = segment.path().to_owned();
            files::absent_is_fine(segment.remove()).doing(|| format!("removing {}", path.display()))?;
        }
        Ok(())
    }

    fn save(&self) -> Result<(), StageError> {
        let mut records = Records::default();
        for (name, slot) in SEGMENTS.iter().zip(&self.slots) {
            let record = match &slot.content {
                Content::Left(Old { known: Some(contents), unknown: false }) => {
                    SegmentRecord::new(Role::Left, contents, None)
                }
                Content::Whole(role, whole) => {
                    SegmentRecord::new(*role, &whole.contents(), Some(whole.version.clone()))
                }
                Content::Nothing | Content::Away | Content::Left(_) => continue,
            };
            records.segments.insert((*name).to_owned(), record);
        }
        let dir = &self.config.state_dir;
        records.write(dir).doing(|| format!("writing {}", Records::path(dir).display()))
    }
}

/// A segment that was there at the start. Without a usable record its bytes are anything.
fn found(path: &Path, record: Option<SegmentRecord>) -> io::Result<Slot> {
    let mut segment = Segment::open(path)?;
    let size = segment.size()?;
    let content = match record {
        Some(record) => checked(&mut segment, record)?,
        None => None,
    };
    let content = content.unwrap_or(Content::Left(Old { known: None, unknown: true }));
    Ok(Slot { segment: Some(segment), content, size })
}

/// What the record says is in the segment, unless that is not so.
fn checked(segment: &mut Segment, record: SegmentRecord) -> io::Result<Option<Content>> {
    let Some(contents) = record.contents() else { return Ok(None) };
    if record.role == Role::Left {
        return Ok(Some(Content::Left(Old { known: Some(contents), unknown: false })));
    }
    let digests = contents.digests.into_iter().collect::<Option<Vec<_>>>();
    let (Some(version), Some(digests)) = (record.version, digests) else { return Ok(None) };
    let layout = contents.layout;
    let mapping = segment.map(Arc::clone(&layout), true)?;
    let hashed = for_each_chunk(&digests, |chunk, expected| match mapping.bytes(chunk).map(Digest::of) {
        Some(actual) if actual == *expected => Ok(()),
        _ => Err(chunk),
    });
    if let Err(chunk) = hashed {
        tracing::warn!(
            segment = %segment.path().display(), chunk = layout.describe(chunk), version = %version.version,
            "a version in shared memory is damaged and not used"
        );
        return Ok(None);
    }
    let intact = version.checkpoint.digest.as_ref() == Some(&root(&layout, &digests));
    let whole = Whole { version, digests: Arc::new(digests), mapping };
    Ok(intact.then_some(Content::Whole(record.role, whole)))
}

fn for_each_chunk<T: Sync, E: Send>(
    digests: &[T],
    work: impl Fn(u32, &T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    // A layout has fewer chunks than `u32::MAX`.
    let work = |at: usize| u32::try_from(at).map_or(Ok(()), |chunk| work(chunk, &digests[at]));
    parallel::for_each(digests.len(), THREADS, || work)
}
