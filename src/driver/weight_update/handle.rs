//! The handle of the update task, and what it says to the task.

use super::*;

pub(super) type RestoreReply = oneshot::Sender<Result<(), UpdateError>>;

#[derive(Debug)]
pub(super) enum Command {
    Start { request: UpdateRequest, follower: Follower },
    Follow { id: Option<UpdateId>, reply: oneshot::Sender<Result<UpdateRun, UpdateError>> },
    Abort,
    History { limit: usize, reply: oneshot::Sender<Vec<UpdateRecord>> },
    Restore { ranks: Vec<(EngineIndex, Incarnation)>, reply: RestoreReply },
    Adopt { ranks: Vec<(EngineIndex, Incarnation)>, reply: RestoreReply },
    Shutdown { engines_end: bool, reply: oneshot::Sender<()> },
}

/// Whoever started an update, or follows it.
#[derive(Debug)]
pub(super) struct Follower {
    pub(super) events: mpsc::Sender<UpdateEvent>,
    pub(super) record: oneshot::Sender<UpdateRecord>,
}

/// Handle of the update task.
#[derive(Clone, Debug)]
pub struct UpdateHandle {
    pub(super) commands: mpsc::Sender<Command>,
    pub snapshot: watch::Receiver<UpdateSnapshot>,
}

/// An update that runs. Dropping it does not stop the update.
#[derive(Debug)]
pub struct UpdateRun {
    /// Progress; closed when the update has ended. What is not read in time is dropped.
    pub events: mpsc::Receiver<UpdateEvent>,
    record: oneshot::Receiver<UpdateRecord>,
}

impl UpdateRun {
    pub(super) fn new() -> (Follower, Self) {
        let (events, progress) = mpsc::channel(EVENTS);
        let (record, end) = oneshot::channel();
        (Follower { events, record }, Self { events: progress, record: end })
    }

    /// Waits for the end.
    pub async fn record(self) -> Result<UpdateRecord, UpdateError> {
        self.record.await.map_err(|_| UpdateError::Gone)
    }
}

impl UpdateHandle {
    /// Starts an update. Also a refusal comes as a record. The id of the update that runs, with the same
    /// source and version: its progress and its record are told here as well.
    pub async fn start(&self, request: UpdateRequest) -> Result<UpdateRun, UpdateError> {
        let (follower, run) = UpdateRun::new();
        self.send(Command::Start { request, follower }).await?;
        Ok(run)
    }

    /// Progress and record of the update that runs; of no id: whichever it is.
    ///
    /// # Errors
    /// [`UpdateError::NotRunning`]; the record of an update that has ended is in [`Self::history`].
    pub async fn follow(&self, id: Option<UpdateId>) -> Result<UpdateRun, UpdateError> {
        self.ask(|reply| Command::Follow { id, reply }).await?
    }

    /// Records of the last updates, newest last, at most `limit`. Also of those before a restart.
    pub async fn history(&self, limit: usize) -> Result<Vec<UpdateRecord>, UpdateError> {
        self.ask(|reply| Command::History { limit, reply }).await
    }

    /// Ends the running update without a commit, if it is not past its commit point.
    pub async fn abort(&self) -> Result<(), UpdateError> {
        self.send(Command::Abort).await
    }

    /// Brings engines that have just become ready to the committed weights. To be called before they are
    /// admitted; of a lockstep group with all ranks at once. Waits for a running update to end.
    pub async fn restore(&self, ranks: Vec<(EngineIndex, Incarnation)>) -> Result<(), UpdateError> {
        self.ask(|reply| Command::Restore { ranks, reply }).await?
    }

    /// Takes over engines that live on from before a restart of the sidecar: what an update has left half done
    /// is rolled back or forward, engines that it left paused are resumed, admission is opened. To be called
    /// once their rank tasks answer; of a lockstep group with all ranks at once; of independent engines node by
    /// node as they come. The engines count as in service when it has answered. On an error they are to be
    /// started again; single engines of a batch are asked for through the fences.
    pub async fn adopt(&self, ranks: Vec<(EngineIndex, Incarnation)>) -> Result<(), UpdateError> {
        self.ask(|reply| Command::Adopt { ranks, reply }).await?
    }

    /// Ends the task. The next sidecar with this state directory brings its engines to the committed weights.
    /// `engines_end`: the engines have ended, so nothing is to be known of them.
    pub async fn shutdown(&self, engines_end: bool) -> Result<(), UpdateError> {
        self.ask(|reply| Command::Shutdown { engines_end, reply }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, UpdateError> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| UpdateError::Gone)
    }

    async fn send(&self, command: Command) -> Result<(), UpdateError> {
        let sent = self.commands.send(command).await;
        sent.map_err(|_| UpdateError::Gone)
    }
}
