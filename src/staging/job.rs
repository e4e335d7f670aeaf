//! One staging: leads the threads that fill a segment and feed the next node. Runs on a thread that may block.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use dp_sidecar_protocol::UpdateId;
use dp_sidecar_protocol::machine::weight_update::Checkpoint;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::area::{Area, Limits, Spare, Whole};
use super::check;
use super::config::HopAuth;
use super::digest::{Digest, root};
use super::error::StageError;
use super::fill::Fill;
use super::hop::receive::{self, Back};
use super::hop::send;
use super::hop::wire::{Line, Up};
use super::hop::{Ends, connect};
use super::layout::Layout;
use super::mapping::PIECE;
use super::reuse::Reuse;
use super::source;
use crate::api::StageProgress;
use crate::driver::handles::{StageSpec, StagedVersion};
use crate::manifest::Manifest;

/// The leading thread looks around this often.
const TICK: Duration = Duration::from_millis(100);
/// Progress is told this often.
const PROGRESS: Duration = Duration::from_millis(250);

/// Where a job's bytes come from.
#[derive(Debug)]
pub(super) enum Origin {
    /// A directory; its manifest was read and checked.
    Directory(Box<Manifest>, Spare),
    /// The node before, which is awaited on this socket.
    Upstream(std::net::TcpListener, Spare),
    /// An upload, which others fill.
    Upload(Arc<Fill>, Spare),
    /// A version that is there, to be passed on.
    Whole(Whole),
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) node: String,
    pub(super) spec: StageSpec,
    pub(super) origin: Option<Origin>,
    /// To look for chunks in.
    pub(super) current: Option<Whole>,
    pub(super) limits: Option<Limits>,
    pub(super) chunk: u32,
    pub(super) idle_limit: Duration,
    pub(super) accept_limit: Duration,
    /// Nothing new for this long: the source is given up.
    pub(super) stall_limit: Option<Duration>,
    pub(super) auth: Arc<dyn HopAuth>,
    pub(super) cancel: CancellationToken,
    pub(super) runtime: Handle,
}

#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) id: UpdateId,
    /// The segment, unless the version was there before.
    pub(super) spare: Option<Spare>,
    /// What is in it.
    pub(super) chunks: Option<(Arc<Layout>, Vec<Option<Digest>>)>,
    /// The complete version.
    pub(super) result: Result<Whole, Arc<StageError>>,
    pub(super) progress: StageProgress,
}

/// Told while it runs.
pub(super) type OnProgress<'a> = &'a (dyn Fn(StageProgress) + Sync);

impl Job {
    /// Runs it to its end. Blocks.
    pub(super) fn run(mut self, progress: OnProgress<'_>) -> Outcome {
        let id = self.spec.id.clone();
        match self.origin.take() {
            None => {
                let reason = "the job has no source".to_owned();
                let result = Err(Arc::new(StageError::Refused { node: self.node.clone(), reason }));
                Outcome { id, spare: None, chunks: None, result, progress: StageProgress::default() }
            }
            Some(Origin::Whole(whole)) => {
                let fill = Fill::full(Arc::clone(&whole.mapping), &whole.digests);
                let result =
                    self.lead(&fill, Feed::Nothing, whole.version.checkpoint.path.as_ref(), progress);
                let result = result.map(|_| whole);
                Outcome { id, spare: None, chunks: None, result, progress: fill.progress() }
            }
            Some(Origin::Directory(manifest, mut spare)) => {
                let layout = Layout::of(&manifest, self.chunk).map_err(|reason| self.layout_error(reason));
                let fill = layout.and_then(|layout| self.fill(&mut spare, layout));
                let feed = |_: &Fill| Ok(Feed::Directory(&manifest));
                self.finish(id, spare, fill.map(Arc::new), feed, progress)
            }
            Some(Origin::Upload(fill, spare)) => {
                self.finish(id, spare, Ok(fill), |_| Ok(Feed::Nothing), progress)
            }
            Some(Origin::Upstream(listener, mut spare)) => {
                let mut come = None;
                let fill = self.await_plan(listener).and_then(|(line, plan)| {
                    let back = line.another().map_err(|error| self.io("using the connection", error))?;
                    let back = Back::new(back);
                    let filled = self.with_pings(&back, || self.fill(&mut spare, plan.layout));
                    match &filled {
                        Ok(_) => come = Some((line, back, plan.node)),
                        Err(error) => back.fail(&error.to_string()),
                    }
                    filled
                });
                let reuse = Reuse::new(spare.old.clone(), self.current.take().as_ref());
                let ends = Ends {
                    from: come.as_ref().map_or("", |(.., node)| node.as_str()).into(),
                    to: self.node.as_str().into(),
                };
                let accept = Up::Accept { node: self.node.clone() };
                let feed = |fill: &Fill| {
                    let Some((line, back, _)) = come.take() else { return Ok(Feed::Nothing) };
                    let said = back.say(&accept, fill);
                    said.map_err(|error| {
                        let called_off = || StageError::Cancelled { node: self.node.clone() };
                        send::describe(&ends, error).unwrap_or_else(called_off)
                    })?;
                    Ok(Feed::Upstream { line, back, reuse: &reuse, ends: &ends })
                };
                self.finish(id, spare, fill.map(Arc::new), feed, progress)
            }
        }
    }

    fn finish<'a>(
        &'a self,
        id: UpdateId,
        spare: Spare,
        fill: Result<Arc<Fill>, StageError>,
        feed: impl FnOnce(&Fill) -> Result<Feed<'a>, StageError>,
        progress: OnProgress<'_>,
    ) -> Outcome {
        let path = spare.segment.path().to_owned();
        let fill = match fill {
            Ok(fill) => fill,
            Err(error) => {
                let (result, progress) = (Err(Arc::new(error)), StageProgress::default());
                return Outcome { id, spare: Some(spare), chunks: None, result, progress };
            }
        };
        let result = feed(&fill).map_err(Arc::new).and_then(|feed| self.lead(&fill, feed, &path, progress));
        let chunks = Some((Arc::clone(fill.layout()), fill.valid_digests()));
        let result = result.map(|checkpoint| Whole {
            version: StagedVersion { id: id.clone(), version: self.spec.version.clone(), checkpoint },
            digests: Arc::new(fill.all_digests().unwrap_or_default()),
            mapping: Arc::clone(fill.mapping()),
        });
        Outcome { id, spare: Some(spare), chunks, result, progress: fill.progress() }
    }

    /// Starts the threads and waits for them.
    fn lead(
        &self,
        fill: &Fill,
        feed: Feed<'_>,
        path: &Path,
        progress: OnProgress<'_>,
    ) -> Result<Checkpoint, Arc<StageError>> {
        let back = feed.back();
        if self.spec.downstream.is_some() {
            fill.open_down();
        }
        let result = std::thread::scope(|scope| {
            scope.spawn(|| self.populate(fill));
            match &feed {
                Feed::Directory(manifest) => {
                    scope.spawn(|| source::read(&self.node, manifest, fill));
                }
                Feed::Upstream { line, back, reuse, ends } => match line.another() {
                    Ok(line) => {
                        scope.spawn(|| receive::run(line, back, fill, reuse, ends));
                    }
                    Err(error) => fill.fail(self.io("using the connection", error)),
                },
                Feed::Nothing => {}
            }
            if let Some(downstream) = self.spec.downstream {
                scope.spawn(move || self.send_down(fill, downstream));
            }
            let result = self.watch(fill, back, path, progress);
            // Nobody goes on when this has failed; the first cause sticks.
            if result.is_err() {
                fill.cancel();
            }
            result
        });
        if let (Err(error), Some(back)) = (&result, back) {
            back.fail(&error.to_string());
        }
        result
    }

    /// Waits until all is there, checked, and passed on.
    fn watch(
        &self,
        fill: &Fill,
        back: Option<&Back>,
        path: &Path,
        progress: OnProgress<'_>,
    ) -> Result<Checkpoint, Arc<StageError>> {
        let mut told = Instant::now();
        let mut moved = (0, Instant::now());
        let mut manifest: Option<Manifest> = None;
        let mut checkpoint: Option<Checkpoint> = None;
        loop {
            if self.cancel.is_cancelled() {
                fill.cancel();
            }
            if let Some(failure) = fill.failure() {
                return Err(failure);
            }
            if fill.cancelled() {
                return Err(Arc::new(StageError::Cancelled { node: self.node.clone() }));
            }
            if manifest.is_none() {
                manifest = self.check_manifest(fill, path).map_err(Arc::new)?;
            }
            if let Some(manifest) = &manifest
                && checkpoint.is_none()
                && fill.complete()
                && let Some(digests) = fill.all_digests()
            {
                let root = root(fill.layout(), &digests);
                checkpoint = Some(check::checkpoint(manifest, fill.layout(), path, root));
                if let Some(back) = back {
                    // The sender may be gone by now; all that counts is here.
                    let _ = back.say(&Up::Done, fill);
                }
            }
            if let Some(checkpoint) = &checkpoint
                && fill.is_down_done()
            {
                return Ok(checkpoint.clone());
            }
            let done = fill.progress().done;
            if done != moved.0 {
                moved = (done, Instant::now());
            }
            if let Some(limit) = self.stall_limit
                && !fill.complete()
                && moved.1.elapsed() > limit
            {
                let reason = format!("no chunk was uploaded for {limit:?}");
                return Err(Arc::new(StageError::Refused { node: self.node.clone(), reason }));
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                progress(fill.progress());
            }
            fill.wait(TICK);
        }
    }

    fn check_manifest(&self, fill: &Fill, path: &Path) -> Result<Option<Manifest>, StageError> {
        let fault = |error| StageError::Manifest { node: self.node.clone(), error };
        let Some(manifest) = check::manifest(fill, path).map_err(fault)? else { return Ok(None) };
        if let Some(model_path) = &self.spec.model_path {
            let model = Manifest::read(Path::new(model_path)).map_err(fault)?;
            manifest.check_against(&model).map_err(fault)?;
        }
        Ok(Some(manifest))
    }

    fn fill(&self, spare: &mut Spare, layout: Layout) -> Result<Fill, StageError> {
        if let Some(limits) = &self.limits {
            Area::allocate(limits, spare, layout.segment_size(), &|| self.cancel.is_cancelled())?;
        }
        let mapping = spare.segment.map(Arc::new(layout), false);
        let mapping = mapping.map_err(|error| self.io("mapping the segment", error))?;
        Ok(Fill::new(mapping))
    }

    /// Does something that takes long while the node before is kept from giving up.
    fn with_pings<T>(&self, back: &Back, work: impl FnOnce() -> T) -> T {
        let (done, finished) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while finished.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                    // Should it be gone, that is seen later.
                    let _ = back.ping(&|| self.cancel.is_cancelled());
                }
            });
            let result = work();
            drop(done);
            result
        })
    }

    /// Touches the segment's pages, ahead of those who write them.
    fn populate(&self, fill: &Fill) {
        let size = fill.layout().segment_size();
        let mut at = 0;
        while at < size && !fill.ended() && !fill.complete() {
            if let Err(error) = fill.mapping().populate(at, PIECE.min(size - at)) {
                fill.fail(self.io("taking shared memory", error));
                return;
            }
            at += PIECE;
        }
    }

    /// Waits for the node before, and for what it wants to send.
    fn await_plan(&self, listener: std::net::TcpListener) -> Result<(Line, receive::Plan), StageError> {
        let waiting = |error| self.io("waiting for the node before", error);
        let until = tokio::time::Instant::now() + self.accept_limit;
        let listener = {
            let _in_runtime = self.runtime.enter();
            tokio::net::TcpListener::from_std(listener).map_err(waiting)?
        };
        loop {
            let accepted = self.runtime.block_on(async {
                tokio::select! {
                    accepted = connect::accept(&listener, &self.auth, until) => Some(accepted),
                    () = self.cancel.cancelled() => None,
                }
            });
            let called_off = || StageError::Cancelled { node: self.node.clone() };
            let (stream, peer) = accepted.ok_or_else(called_off)?.map_err(waiting)?;
            let mut line = Line::new(stream, self.idle_limit).map_err(waiting)?;
            let refusal = match receive::plan(&mut line, &|| self.cancel.is_cancelled()) {
                Ok(plan) if plan.id == self.spec.id.0 => return Ok((line, plan)),
                Ok(plan) => {
                    format!("{} awaits update {}, not {}", self.node, self.spec.id, plan.id)
                }
                Err(error) => format!("{}: no plan: {error:?}", self.node),
            };
            tracing::warn!(%peer, refusal, "a connection for weights is refused");
            receive::refuse(&mut line, &refusal);
        }
    }

    /// Connects to the next node and feeds it.
    fn send_down(&self, fill: &Fill, address: SocketAddr) {
        let reached = self.runtime.block_on(async {
            tokio::select! {
                reached = connect::connect(address, &self.auth) => Some(reached),
                () = self.cancel.cancelled() => None,
            }
        });
        let Some(reached) = reached else { return };
        let unnamed = Ends { from: self.node.as_str().into(), to: address.to_string().into() };
        let lines = reached.and_then(|stream| {
            let line = Line::new(stream, self.idle_limit)?;
            let another = line.another()?;
            Ok((line, another))
        });
        let (mut line, wants) = match lines {
            Ok(lines) => lines,
            Err(error) => {
                let (from, to) = (unnamed.from.to_string(), unnamed.to.to_string());
                fill.fail(StageError::Hop { from, to, reason: error.to_string() });
                return;
            }
        };
        match send::introduce(&mut line, fill, &self.spec.id.0, &self.node) {
            Ok(name) => {
                let ends = Ends { to: format!("{name} ({address})").into(), ..unnamed };
                send::run(line, wants, fill, &ends);
            }
            Err(error) => send::fail(fill, &unnamed, error),
        }
    }

    fn layout_error(&self, reason: String) -> StageError {
        StageError::Layout { node: self.node.clone(), reason }
    }

    fn io(&self, what: &str, error: std::io::Error) -> StageError {
        StageError::Io { node: self.node.clone(), what: what.to_owned(), error }
    }
}

/// Who fills the segment.
enum Feed<'a> {
    /// This job's threads, from a directory.
    Directory(&'a Manifest),
    /// The node before.
    Upstream { line: Line, back: Back, reuse: &'a Reuse, ends: &'a Ends },
    /// Somebody else, or nobody.
    Nothing,
}

impl Feed<'_> {
    const fn back(&self) -> Option<&Back> {
        match self {
            Self::Upstream { back, .. } => Some(back),
            _ => None,
        }
    }
}
