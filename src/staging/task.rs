//! The staging task: obeys commands, runs one job at a time, keeps the segments.

mod prefault;
mod uploads;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use self::prefault::Prefault;
use super::adapters::Adapters;
use super::area::{Area, Kept, Spare, Whole};
use super::config::StageConfig;
use super::error::{Doing as _, StageError};
use super::fill::Fill;
use super::job::{Job, Origin, Outcome};
use super::journal::Journal;
use super::layout::{FileSize, Layout};
use super::probe::probe;
use super::records::Role;
use super::upload::{Ask, IDLE_LIMIT, Session, UploadError, UploadRequests, UploadStatus};
use crate::api::{Retain, StageProgress};
use crate::driver::handles::{
    AdapterPlace, CheckpointDir, Envelope, HandleError, NodeEvent, ReplyTo, StageEvent, StageRequest,
    StageSource, StageSpec, StageState,
};
use crate::manifest::Manifest;
use crate::tasks::{Task as TaskName, rehearse};

/// Reading the headers of a directory takes no longer, or the file system hangs.
const HEADERS_LIMIT: Duration = Duration::from_secs(60);
/// After `stop` a job may take this long to end.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Most discards waiting for the job to end.
const DISCARDS: usize = 16;

type Result<T> = std::result::Result<T, StageError>;

/// What jobs tell the task.
enum Note {
    Ended(Box<Outcome>),
    UploadReady { id: String, spare: Box<Spare>, fill: Result<(Arc<Fill>, Option<Journal>)> },
}

struct Running {
    spec: StageSpec,
    /// Is its source a version that was there before?
    passing: bool,
    address: Option<SocketAddr>,
    progress: Arc<Mutex<StageProgress>>,
    cancel: CancellationToken,
    discards: Vec<ReplyTo>,
}

/// An upload that has the spare segment.
struct Uploading {
    id: String,
    files: Vec<FileSize>,
    /// None while it is prepared, and while a job has it.
    spare: Option<Spare>,
    created: Vec<oneshot::Sender<std::result::Result<UploadStatus, UploadError>>>,
}

struct Task {
    config: Arc<StageConfig>,
    /// Taken by what blocks.
    area: Option<Area>,
    adapters: Arc<Mutex<Adapters>>,
    events: mpsc::Sender<NodeEvent>,
    notes: mpsc::Sender<Note>,
    tracker: TaskTracker,
    running: Option<Running>,
    uploads: Option<UploadRequests>,
    uploading: Option<Uploading>,
    retain: Retain,
    prefault: Prefault,
}

/// Runs the task.
pub(super) async fn run(
    mut config: StageConfig,
    mut commands: mpsc::Receiver<Envelope<StageRequest>>,
    events: mpsc::Sender<NodeEvent>,
    tracker: TaskTracker,
    stop: CancellationToken,
) {
    let uploads = config.uploads.take();
    let config = Arc::new(config);
    let opened = {
        let config = Arc::clone(&config);
        let takes_uploads = uploads.is_some();
        tokio::task::spawn_blocking(move || {
            let mut area = Area::open(config)?;
            let kept = takes_uploads.then(|| area.kept_upload()).flatten();
            io::Result::Ok((area, kept))
        })
        .await
    };
    let (area, kept) = match opened.map_err(io::Error::from).flatten() {
        Ok(opened) => opened,
        Err(error) => {
            error!(%error, "the staging area cannot be opened");
            return;
        }
    };
    let (notes, mut noted) = mpsc::channel(4);
    let adapters = Adapters::new(&config.state_dir);
    let prefault = Prefault::new(&config);
    let mut task = Task {
        config,
        area: Some(area),
        adapters: Arc::new(Mutex::new(adapters)),
        events,
        notes,
        tracker,
        running: None,
        uploads,
        uploading: None,
        retain: Retain::default(),
        prefault,
    };
    if let Some(kept) = kept {
        task.go_on_with_upload(kept);
    }
    if let Some(uploads) = &task.uploads {
        uploads.opened.send_replace(true);
    }
    loop {
        task.begin_prefault().await;
        tokio::select! {
            () = stop.cancelled() => break,
            step = task.prefault.step() => task.prefaulted(step).await,
            Some(note) = noted.recv() => task.note(note).await,
            Some(ask) = next_ask(&mut task.uploads) => task.upload(ask).await,
            command = commands.recv() => match command {
                Some(command) => task.command(command).await,
                None => break,
            },
        }
    }
    task.end(&mut noted).await;
}

async fn next_ask(uploads: &mut Option<UploadRequests>) -> Option<Ask> {
    match uploads {
        Some(uploads) => uploads.requests.recv().await,
        None => None,
    }
}

impl Task {
    async fn command(&mut self, Envelope { ask, reply, .. }: Envelope<StageRequest>) {
        let result = match ask {
            StageRequest::State => Ok(()),
            StageRequest::Probe(directory) => {
                let probed = tokio::task::spawn_blocking(move || probe(&directory));
                let probed = timeout(HEADERS_LIMIT, probed).await.ok().and_then(std::result::Result::ok);
                let mut state = self.state();
                state.probed = probed.flatten();
                reply.send::<StageRequest>(Ok(state));
                return;
            }
            StageRequest::Begin(spec) => self.begin(spec).await,
            StageRequest::Commit { id } => {
                let retain = self.retain;
                let done = self.with_area(move |area| area.commit(&id, retain).map(|()| id)).await;
                done.map(|id| info!(update = %id, "staged weights are the current ones"))
            }
            StageRequest::Discard { id } => {
                if let Some(running) = &mut self.running
                    && running.spec.id == id
                {
                    running.cancel.cancel();
                    if running.discards.len() < DISCARDS {
                        // Answered when the job has ended.
                        running.discards.push(reply);
                    }
                    return;
                }
                self.with_area(move |area| area.discard(&id)).await
            }
            StageRequest::TakeAdapter { digest, path } => {
                return self.with_adapters(reply, move |adapters| {
                    adapters.take(&digest, path.as_deref().map(Path::new)).map(Some)
                });
            }
            StageRequest::AdapterPiece { digest, offset, size, bytes } => {
                return self.with_adapters(reply, move |adapters| {
                    adapters.piece(&digest, offset, size, &bytes).map(Some)
                });
            }
            StageRequest::KeepAdapters { digests } => {
                return self.with_adapters(reply, move |adapters| adapters.keep(&digests).map(|()| None));
            }
        };
        let answer = result.map(|()| self.state()).map_err(|error| self.failed(&error));
        reply.send::<StageRequest>(answer);
    }

    fn state(&self) -> StageState {
        let mut state = self.area.as_ref().map(Area::state).unwrap_or_default();
        if let Some(running) = &self.running {
            state.data_address = running.address;
            state.running = Some((running.spec.id.clone(), *running.progress.lock()));
        }
        state
    }

    async fn begin(&mut self, spec: StageSpec) -> Result<()> {
        if let Some(running) = &self.running {
            if running.spec == spec {
                return Ok(());
            }
            return Err(refused(format!("update {} is being staged", running.spec.id)));
        }
        self.retain = spec.retain;
        let area = self.area.as_ref().ok_or_else(|| refused("the segments are lost"))?;
        let there = match spec.source {
            StageSource::Current => {
                let current = area.whole(Role::Current).cloned();
                Some(current.ok_or_else(|| refused("no version is current in shared memory"))?)
            }
            _ => area.by_id(&spec.id).cloned(),
        };
        if let Some(whole) = there {
            if spec.downstream.is_some() {
                self.start(spec, Origin::Whole(whole), None);
                return Ok(());
            }
            let progress = Fill::full(whole.mapping, &whole.digests).progress();
            let checkpoint = whole.version.checkpoint;
            self.tell(StageEvent::Staged { id: spec.id, checkpoint, progress }).await;
            return Ok(());
        }
        if let StageSource::Upload(name) = &spec.source {
            let name = name.clone();
            return self.begin_upload(spec, &name);
        }
        self.displace_upload().await?;
        match spec.source.clone() {
            StageSource::Directory(directory) => {
                let manifest = self.read_directory(directory, &spec).await?;
                let spare = self.take(spec.retain).await?;
                self.start(spec, Origin::Directory(Box::new(manifest), spare), None);
            }
            _ => {
                let at = SocketAddr::new(self.config.data_host, 0);
                let bound = TcpListener::bind(at).and_then(|listener| {
                    listener.set_nonblocking(true)?;
                    let address = listener.local_addr()?;
                    Ok((listener, address))
                });
                let (listener, address) = bound.doing(|| format!("listening on {at}"))?;
                let spare = self.take(spec.retain).await?;
                self.start(spec, Origin::Upstream(listener, spare), Some(address));
            }
        }
        Ok(())
    }

    /// Reads the headers of a directory and compares them with the model's.
    async fn read_directory(&self, directory: CheckpointDir, spec: &StageSpec) -> Result<Manifest> {
        let path = directory.path.clone();
        let (model, fit) = (spec.model.clone(), spec.fit.clone());
        let read = tokio::task::spawn_blocking(move || {
            let manifest = directory.manifest()?;
            if let Some(model) = model {
                manifest.renamed(&fit.rename)?.check_against(&model.manifest()?, &fit)?;
            }
            Ok::<_, StageError>(manifest)
        });
        match timeout(HEADERS_LIMIT, read).await {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => Err(refused(format!("reading {path} failed: {error}"))),
            Err(_) => {
                Err(refused(format!("reading the headers in {path} took longer than {HEADERS_LIMIT:?}")))
            }
        }
    }

    async fn take(&mut self, retain: Retain) -> Result<Spare> {
        self.interrupt_prefault().await;
        self.with_area(move |area| area.take(retain)).await
    }

    fn start(&mut self, spec: StageSpec, origin: Origin, address: Option<SocketAddr>) {
        let current = self.area.as_ref().and_then(|area| area.whole(Role::Current)).cloned();
        let passing = matches!(origin, Origin::Whole(_));
        let cancel = CancellationToken::new();
        let progress = Arc::new(Mutex::new(StageProgress::default()));
        let job = Job {
            config: Arc::clone(&self.config),
            spec: spec.clone(),
            current,
            cancel: cancel.clone(),
            runtime: Handle::current(),
        };
        info!(update = %spec.id, version = %spec.version, source = ?spec.source, downstream = ?spec.downstream, "staging begins");
        let (notes, events) = (self.notes.clone(), self.events.clone());
        let (id, shown) = (spec.id.clone(), Arc::clone(&progress));
        self.tracker.spawn_blocking(move || {
            let report = |progress| {
                *shown.lock() = progress;
                // Progress that nobody has time for is dropped.
                let _ = events.try_send(NodeEvent::Stage(StageEvent::Progress { id: id.clone(), progress }));
            };
            rehearse(TaskName::StagingThread);
            let outcome = job.run(origin, &report);
            // The task waits for it, unless it has ended.
            let _ = notes.blocking_send(Note::Ended(Box::new(outcome)));
        });
        self.running = Some(Running { spec, passing, address, progress, cancel, discards: Vec::new() });
    }

    async fn note(&mut self, note: Note) {
        match note {
            Note::Ended(outcome) => self.ended(*outcome).await,
            Note::UploadReady { id, spare, fill } => self.upload_ready(id, *spare, fill).await,
        }
    }

    async fn ended(&mut self, outcome: Outcome) {
        let Some(running) = self.running.take() else { return };
        let Outcome { spare, contents, mut result, progress } = outcome;
        let id = running.spec.id;
        let discarded = running.cancel.is_cancelled();
        let upload = match running.spec.source {
            StageSource::Upload(name) if !running.passing => Some(name),
            _ => None,
        };
        let kept_upload = upload.as_deref().filter(|_| result.is_err() || discarded);
        if let Some(spare) = spare {
            if let Some(uploading) = self.uploading.as_mut().filter(|_| kept_upload.is_some()) {
                // The trainer need not send it again.
                uploading.spare = Some(spare);
                if let Some(session) = kept_upload.and_then(|id| self.session(id)) {
                    session.renew();
                }
            } else {
                if let Some(name) = &upload {
                    self.end_session(name);
                    self.uploading = None;
                }
                let whole = result.as_ref().ok().filter(|_| !discarded).cloned();
                let given = self.with_area(move |area| area.give_back(spare, contents, whole)).await;
                if let Err(error) = given {
                    error!(%error, "what is in shared memory cannot be noted");
                    result = Err(Arc::new(error));
                }
            }
        }
        match result {
            _ if discarded => info!(update = %id, "staging was cancelled"),
            Ok(Whole { version, .. }) => {
                info!(update = %id, ?progress, "weights are staged");
                self.tell(StageEvent::Staged { id, checkpoint: version.checkpoint, progress }).await;
            }
            Err(error) => {
                warn!(update = %id, %error, "staging failed");
                self.tell(StageEvent::Failed { id, error: error.on(&self.config.node) }).await;
            }
        }
        for reply in running.discards {
            reply.send::<StageRequest>(Ok(self.state()));
        }
    }

    // --- the end, and helpers ---

    async fn end(&mut self, noted: &mut mpsc::Receiver<Note>) {
        self.interrupt_prefault().await;
        if let Some(running) = &self.running {
            running.cancel.cancel();
            match timeout(STOP_LIMIT, noted.recv()).await {
                Ok(Some(note)) => self.note(note).await,
                _ => warn!(limit = ?STOP_LIMIT, "a staging did not end in time"),
            }
        }
        // A successor that finds the segments goes on with it.
        if let Some(uploading) = self.uploading.take() {
            self.end_session(&uploading.id);
        }
    }

    async fn tell(&self, event: StageEvent) {
        // Nobody listens when the sidecar stops.
        let _ = self.events.send(NodeEvent::Stage(event)).await;
    }

    /// Does something with the segments on a thread that may block.
    async fn with_area<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Area) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let Some(mut area) = self.area.take() else { return Err(refused("the segments are lost")) };
        let done = tokio::task::spawn_blocking(move || {
            let result = work(&mut area);
            (area, result)
        });
        match done.await {
            Ok((area, result)) => {
                self.area = Some(area);
                result
            }
            Err(error) => Err(refused(format!("the segments are lost: {error}"))),
        }
    }

    /// Does something with the adapters on a thread that may block, while other commands go on.
    fn with_adapters(
        &self,
        reply: ReplyTo,
        work: impl FnOnce(&mut Adapters) -> Result<Option<AdapterPlace>> + Send + 'static,
    ) {
        let (state, adapters, config) = (self.state(), Arc::clone(&self.adapters), Arc::clone(&self.config));
        self.tracker.spawn_blocking(move || {
            let done = work(&mut adapters.lock());
            let done = done.map(|adapter| StageState { adapter, ..state });
            let answer = done.map_err(|error| HandleError::failed(error.on(&config.node)));
            reply.send::<StageRequest>(answer);
        });
    }

    fn failed(&self, error: &StageError) -> HandleError {
        HandleError::failed(error.on(&self.config.node))
    }
}

fn refused(reason: impl Into<String>) -> StageError {
    StageError::Refused(reason.into())
}
