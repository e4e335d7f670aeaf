//! One staging: leads the threads that fill a segment and feed the next node. Runs on a thread that may block.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use dp_sidecar_protocol::machine::weight_update::Checkpoint;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::area::{Spare, Whole};
use super::check::{self, Checked};
use super::config::StageConfig;
use super::digest::{Contents, root};
use super::error::{Doing as _, StageError};
use super::fill::Fill;
use super::layout::Layout;
use super::mapping::pieces;
use super::reuse::Reuse;
use super::source;
use super::transfer::receive::{self, Plan, Replies};
use super::transfer::wire::{FromReceiver, Line};
use super::transfer::{connect, send};
use super::upload::IDLE_LIMIT;
use crate::api::StageProgress;
use crate::driver::handles::{StageSpec, StagedVersion};
use crate::manifest::Manifest;

/// The leading thread looks around this often.
const TICK: Duration = Duration::from_millis(100);
/// Progress is reported this often.
const PROGRESS: Duration = Duration::from_millis(250);

/// Where a job's bytes come from.
#[derive(Debug)]
pub(super) enum Origin {
    /// A directory; its manifest was read and checked.
    Directory(Box<Manifest>, Spare),
    /// The node before, which is awaited on this socket.
    Upstream(TcpListener, Spare),
    /// An upload, which others fill.
    Upload(Arc<Fill>, Spare),
    /// A version that is there, to be passed on.
    Whole(Whole),
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) config: Arc<StageConfig>,
    pub(super) spec: StageSpec,
    /// To look for chunks in.
    pub(super) current: Option<Whole>,
    pub(super) cancel: CancellationToken,
    pub(super) runtime: Handle,
}

#[derive(Debug)]
pub(super) struct Outcome {
    /// The segment, unless the version was there before.
    pub(super) spare: Option<Spare>,
    /// What is in it.
    pub(super) contents: Option<Contents>,
    /// The complete version.
    pub(super) result: Result<Whole, Arc<StageError>>,
    pub(super) progress: StageProgress,
}

/// Called while it runs.
pub(super) type OnProgress<'a> = &'a (dyn Fn(StageProgress) + Sync);

/// Who fills the segment.
enum Feed {
    /// This job's threads, from a directory.
    Directory(Box<Manifest>),
    /// The node before.
    Upstream { line: Line, replies: Replies, reuse: Box<Reuse> },
    /// Others, who may give up.
    Upload,
    /// All is there.
    Nothing,
}

impl Feed {
    const fn replies(&self) -> Option<&Replies> {
        match self {
            Self::Upstream { replies, .. } => Some(replies),
            _ => None,
        }
    }
}

impl Job {
    /// Runs it to its end. Blocks.
    pub(super) fn run(self, origin: Origin, progress: OnProgress<'_>) -> Outcome {
        match origin {
            Origin::Whole(whole) => {
                let fill = Fill::full(Arc::clone(&whole.mapping), &whole.digests);
                let path = whole.version.checkpoint.path.as_ref();
                let result = self.lead(&fill, &Feed::Nothing, path, progress);
                let result = result.map(|_| whole);
                Outcome { spare: None, contents: None, result, progress: fill.progress() }
            }
            Origin::Directory(manifest, mut spare) => {
                let layout = Layout::of(&manifest, self.config.chunk).map_err(StageError::Layout);
                let fill = layout.and_then(|layout| spare.prepare(layout, &|| self.cancel.is_cancelled()));
                self.finish(spare, fill.map(|fill| (Arc::new(fill), Feed::Directory(manifest))), progress)
            }
            Origin::Upload(fill, spare) => self.finish(spare, Ok((fill, Feed::Upload)), progress),
            Origin::Upstream(listener, mut spare) => {
                let plan = self.await_plan(listener);
                let accepted = plan.and_then(|(line, plan)| self.accept(line, plan, &mut spare));
                self.finish(spare, accepted, progress)
            }
        }
    }

    fn finish(
        &self,
        spare: Spare,
        begun: Result<(Arc<Fill>, Feed), StageError>,
        progress: OnProgress<'_>,
    ) -> Outcome {
        let (fill, feed) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                let (result, progress) = (Err(Arc::new(error)), StageProgress::default());
                return Outcome { spare: Some(spare), contents: None, result, progress };
            }
        };
        let result = self.lead(&fill, &feed, spare.segment.path(), progress);
        let result = result.map(|checkpoint| Whole {
            version: StagedVersion {
                id: self.spec.id.clone(),
                version: self.spec.version.clone(),
                checkpoint,
            },
            digests: Arc::new(fill.all_digests().unwrap_or_default()),
            mapping: Arc::clone(fill.mapping()),
        });
        Outcome { spare: Some(spare), contents: Some(fill.contents()), result, progress: fill.progress() }
    }

    /// Starts the threads and waits for them.
    fn lead(
        &self,
        fill: &Fill,
        feed: &Feed,
        path: &Path,
        progress: OnProgress<'_>,
    ) -> Result<Checkpoint, Arc<StageError>> {
        if self.spec.downstream.is_some() {
            fill.open_down();
        }
        let result = std::thread::scope(|scope| {
            scope.spawn(|| populate(fill));
            match feed {
                Feed::Directory(manifest) => {
                    scope.spawn(|| source::read(manifest, fill));
                }
                Feed::Upstream { line, replies, reuse } => match line.another() {
                    Ok(line) => {
                        scope.spawn(|| receive::run(line, replies, fill, reuse));
                    }
                    Err(error) => fill.fail(error),
                },
                Feed::Upload | Feed::Nothing => {}
            }
            if let Some(downstream) = self.spec.downstream {
                scope.spawn(move || self.send_down(fill, downstream));
            }
            let result = self.watch(fill, feed, path, progress);
            // Nobody goes on when this has failed; the first cause sticks.
            if result.is_err() {
                fill.cancel();
            }
            result
        });
        if let (Err(error), Some(replies)) = (&result, feed.replies()) {
            replies.fail(error.on(&self.config.node));
        }
        result
    }

    /// Waits until all is there, checked, and passed on.
    fn watch(
        &self,
        fill: &Fill,
        feed: &Feed,
        path: &Path,
        progress: OnProgress<'_>,
    ) -> Result<Checkpoint, Arc<StageError>> {
        let mut reported = Instant::now();
        let mut moved = (0, Instant::now());
        let mut checked: Option<Checked> = None;
        let mut checkpoint: Option<Checkpoint> = None;
        loop {
            if self.cancel.is_cancelled() {
                fill.cancel();
            }
            if let Some(failure) = fill.failure() {
                return Err(failure);
            }
            if fill.cancelled() {
                return Err(Arc::new(StageError::Cancelled));
            }
            if checked.is_none() {
                checked = self.check_manifest(fill, path).map_err(Arc::new)?;
            }
            if let Some(checked) = &checked
                && checkpoint.is_none()
                && fill.complete()
                && let Some(digests) = fill.all_digests()
            {
                let root = root(fill.layout(), &digests);
                let copies = checked.copies(&self.spec, fill.layout(), path);
                copies.map_err(|error| Arc::new(error.into()))?;
                checkpoint = Some(check::checkpoint(checked, fill.layout(), path, root));
                if let Some(replies) = feed.replies() {
                    // The sender may be gone by now; all that counts is here.
                    let _ = replies.send(&FromReceiver::Done, fill);
                }
            }
            if let Some(checkpoint) = &checkpoint
                && fill.is_down_done()
            {
                return Ok(checkpoint.clone());
            }
            if let Some(replies) = feed.replies() {
                // Should the sender be gone, that is seen by who receives.
                let _ = replies.ping(&|| fill.ended() || self.cancel.is_cancelled());
            }
            let done = fill.progress().done;
            if done != moved.0 {
                moved = (done, Instant::now());
            }
            if matches!(feed, Feed::Upload) && !fill.complete() && moved.1.elapsed() > IDLE_LIMIT {
                let reason = format!("no chunk was uploaded for {IDLE_LIMIT:?}");
                return Err(Arc::new(StageError::Refused(reason)));
            }
            if reported.elapsed() >= PROGRESS {
                reported = Instant::now();
                progress(fill.progress());
            }
            fill.wait(TICK);
        }
    }

    fn check_manifest(&self, fill: &Fill, path: &Path) -> Result<Option<Checked>, StageError> {
        let Some(manifest) = check::manifest(fill, path)? else { return Ok(None) };
        Ok(Some(Checked::new(manifest, &self.spec)?))
    }

    /// Waits for the node before, and for what it wants to send.
    fn await_plan(&self, listener: TcpListener) -> Result<(Line, Plan), StageError> {
        let what = || "waiting for the node before".to_owned();
        let StageConfig { node, idle_limit, token, .. } = &*self.config;
        let until = tokio::time::Instant::now() + self.config.accept_limit;
        let listener = {
            let _in_runtime = self.runtime.enter();
            tokio::net::TcpListener::from_std(listener).doing(what)?
        };
        loop {
            let (stream, peer) =
                self.unless_cancelled(connect::accept(&listener, token.as_ref(), until))?.doing(what)?;
            let mut line = Line::new(stream, *idle_limit, peer.to_string(), node.clone())?;
            let refusal = match receive::plan(&mut line, &|| self.cancel.is_cancelled()) {
                Ok(plan) if plan.id == self.spec.id.0 => return Ok((line, plan)),
                Ok(plan) => format!("{node} awaits update {}, not {}", self.spec.id, plan.id),
                Err(error) => format!("{node}: no plan: {error}"),
            };
            tracing::warn!(%peer, refusal, "a connection for weights is refused");
            line.end(Some(&FromReceiver::Failed(refusal)));
        }
    }

    /// Takes memory for what the node before wants to send, and tells it.
    fn accept(&self, line: Line, plan: Plan, spare: &mut Spare) -> Result<(Arc<Fill>, Feed), StageError> {
        let replies = Replies::new(line.another()?);
        let prepared = self
            .with_pings(&replies, || spare.prepare(plan.layout, &|| self.cancel.is_cancelled()))
            .inspect_err(|error| replies.fail(error.on(&self.config.node)))?;
        replies.send(&FromReceiver::Accept { node: self.config.node.clone() }, &prepared)?;
        let reuse = Box::new(Reuse::new(spare.old.clone(), self.current.as_ref()));
        Ok((Arc::new(prepared), Feed::Upstream { line, replies, reuse }))
    }

    /// Does something that takes long while the node before is kept from giving up.
    fn with_pings<T>(&self, replies: &Replies, work: impl FnOnce() -> T) -> T {
        let (done, finished) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while finished.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                    // Should it be gone, that is seen later.
                    let _ = replies.ping(&|| self.cancel.is_cancelled());
                }
            });
            let result = work();
            drop(done);
            result
        })
    }

    /// Connects to the next node and feeds it.
    fn send_down(&self, fill: &Fill, address: SocketAddr) {
        let StageConfig { node, idle_limit, token, .. } = &*self.config;
        let (from, to) = (node.clone(), address.to_string());
        let line =
            self.unless_cancelled(connect::connect(address, token.as_ref())).and_then(
                |reached| match reached {
                    Ok(stream) => Line::new(stream, *idle_limit, from, to),
                    Err(error) => Err(StageError::Transfer { from, to, reason: error.to_string() }),
                },
            );
        match line {
            Ok(line) => send::run(line, fill, &self.spec.id.0),
            Err(error) => fill.fail(error),
        }
    }

    fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Result<T, StageError> {
        let done = self.runtime.block_on(self.cancel.run_until_cancelled(work));
        done.ok_or(StageError::Cancelled)
    }
}

/// Touches the segment's pages, ahead of those who write them.
fn populate(fill: &Fill) {
    for (at, length) in pieces(0, fill.layout().segment_size()) {
        if fill.ended() || fill.complete() {
            return;
        }
        if let Err(error) = fill.mapping().populate(at, length).doing(|| "taking shared memory".to_owned()) {
            return fill.fail(error);
        }
    }
}
