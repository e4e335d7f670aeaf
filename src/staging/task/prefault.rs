//! `--prefault`: memory for two checkpoints is taken and touched before an update needs it, while nothing else wants
//! the segments.

use std::time::Instant;

use tokio::task::{JoinError, JoinHandle, spawn_blocking};

use super::*;

/// How far it is.
#[derive(Debug)]
pub(super) enum Prefault {
    /// Not wanted, done, or given up.
    Done,
    /// The size of the model is being read.
    Measuring(JoinHandle<Result<u64>>),
    /// So many bytes are to be taken twice, when nothing else wants the segments.
    Wanted(u64),
    /// A thread has the segments.
    Running { size: u64, cancel: CancellationToken, thread: JoinHandle<(Vec<Spare>, Result<()>)> },
}

/// Something has ended.
pub(super) enum Step {
    Measured(std::result::Result<Result<u64>, JoinError>),
    Taken(std::result::Result<(Vec<Spare>, Result<()>), JoinError>),
}

impl Prefault {
    /// Begins with the size of the model.
    pub(super) fn new(config: &StageConfig) -> Self {
        let Some(path) = config.prefault.clone() else { return Self::Done };
        let chunk = config.chunk;
        Self::Measuring(spawn_blocking(move || {
            let layout = Layout::of(&Manifest::read(&path, None)?, chunk).map_err(StageError::Layout)?;
            Ok(layout.segment_size())
        }))
    }

    /// Waits for what runs.
    pub(super) async fn step(&mut self) -> Step {
        match self {
            Self::Measuring(thread) => Step::Measured(thread.await),
            Self::Running { thread, .. } => Step::Taken(thread.await),
            Self::Done | Self::Wanted(_) => std::future::pending().await,
        }
    }
}

impl Task {
    /// Begins if it is wanted and nothing else has the segments, or will be loaded out of them.
    pub(super) async fn begin_prefault(&mut self) {
        let Prefault::Wanted(size) = self.prefault else { return };
        let staged = self.area.as_ref().is_none_or(|area| area.whole(Role::Staged).is_some());
        if staged || self.running.is_some() || self.uploading.is_some() {
            return;
        }
        let mut spares = match self.with_area(Area::take_idle).await {
            Ok(spares) => spares,
            Err(error) => return self.give_up_prefault(&error),
        };
        let cancel = CancellationToken::new();
        let stopped = cancel.clone();
        let thread = spawn_blocking(move || {
            let began = Instant::now();
            let stop = || stopped.is_cancelled();
            let take = |spare: &mut Spare| {
                // The other one gets as much.
                spare.beside = spare.beside.max(size);
                spare.allocate(size, &stop)?;
                let touched = spare.segment.touch(&stop);
                touched.doing(|| format!("taking {size} bytes in {}", spare.segment.path().display()))
            };
            let done = spares.iter_mut().try_for_each(take);
            if done.is_ok() && !stop() {
                let segments = spares.len();
                info!(size, segments, took = ?began.elapsed(), "shared memory for updates is taken");
            }
            (spares, done)
        });
        self.prefault = Prefault::Running { size, cancel, thread };
    }

    /// Something of it has ended.
    pub(super) async fn prefaulted(&mut self, step: Step) {
        self.prefault = Prefault::Done;
        match step {
            Step::Measured(Ok(Ok(size))) => self.prefault = Prefault::Wanted(size),
            Step::Measured(Ok(Err(error))) => self.give_up_prefault(&error),
            Step::Taken(Ok((spares, done))) => match self.give_back_all(spares).await.and(done) {
                Ok(()) | Err(StageError::Cancelled) => {}
                Err(error) => self.give_up_prefault(&error),
            },
            Step::Measured(Err(error)) | Step::Taken(Err(error)) => {
                error!(%error, "taking shared memory for updates ended badly");
            }
        }
    }

    /// Something else wants the segments, now; it goes on later.
    pub(super) async fn interrupt_prefault(&mut self) {
        let Prefault::Running { size, cancel, thread } = &mut self.prefault else { return };
        cancel.cancel();
        let size = *size;
        // It ends with its piece.
        let Ok(ended) = timeout(STOP_LIMIT, thread).await else {
            warn!(limit = ?STOP_LIMIT, "shared memory for updates is still being taken");
            return;
        };
        self.prefaulted(Step::Taken(ended)).await;
        self.prefault = Prefault::Wanted(size);
    }

    async fn give_back_all(&mut self, spares: Vec<Spare>) -> Result<()> {
        self.with_area(move |area| spares.into_iter().try_for_each(|spare| area.give_back(spare, None, None)))
            .await
    }

    fn give_up_prefault(&mut self, error: &StageError) {
        // An update will ask for it again, and say what it lacks.
        warn!(%error, "shared memory for updates cannot be taken ahead (--prefault)");
        self.prefault = Prefault::Done;
    }
}
