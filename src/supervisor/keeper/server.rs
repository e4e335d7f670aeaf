//! The keeper's loop: signals, connections, output of children, time.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::KeeperConfig;
use super::child::{Child, is_valid_name};
use super::connection::Connection;
use super::wire::{Answer, ExitReport, FromKeeper, KeeperEvent, Request, SpawnSpec, ToKeeper};
use crate::net;
use crate::shared_memory::{SHM_DIR, remove_segments};
use crate::supervisor::procfs;
use crate::tasks;

/// More connections than this at a time are a mistake.
const CONNECTION_LIMIT: usize = 16;
/// More children than this are a mistake.
const CHILD_LIMIT: usize = 1024;
/// A keeper that has no children does not wait longer than this for an owner.
const IDLE_GRACE: Duration = Duration::from_secs(10);
/// Ended children that are remembered for the next owner.
const EXIT_LIMIT: usize = 256;
/// Answers that wait in an outbox when the keeper ends get this long.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// All children are being stopped.
#[derive(Debug)]
struct Shutdown {
    grace: Duration,
    /// Children with this number are being stopped.
    stage: Option<u32>,
    /// Who wants to know: connection and sequence number.
    asked_by: Vec<(u64, u64)>,
}

/// The keeper's state.
#[derive(Debug)]
pub struct Keeper {
    config: KeeperConfig,
    listener: UnixListener,
    signals: SignalFd,
    logs: PathBuf,
    connections: Vec<Connection>,
    next_connection: u64,
    owner: Option<u64>,
    ever_owned: bool,
    orphan_since: Instant,
    children: Vec<Child>,
    /// The last end of each child that was not started again: an owner may end before it has read the event.
    exits: VecDeque<ExitReport>,
    shutdown: Option<Shutdown>,
}

impl Keeper {
    /// A keeper without children.
    pub fn new(config: KeeperConfig, listener: UnixListener, signals: SignalFd, logs: PathBuf) -> Self {
        Self {
            config,
            listener,
            signals,
            logs,
            connections: Vec::new(),
            next_connection: 0,
            owner: None,
            ever_owned: false,
            orphan_since: Instant::now(),
            children: Vec::new(),
            exits: VecDeque::new(),
            shutdown: None,
        }
    }

    /// Runs until all children are gone and nobody needs the keeper any more.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            tasks::rehearse(tasks::Task::Keeper);
            let now = Instant::now();
            if self.take_signals()? {
                self.reap_adopted();
            }
            self.accept();
            self.serve(now);
            for child in &mut self.children {
                child.output.pump();
            }
            self.look_after_children(now);
            self.look_for_owner(now);
            if self.advance_shutdown(now) {
                self.remove_segments();
                self.finish();
                return Ok(());
            }
        }
    }

    /// Waits until something is to be done.
    fn wait(&self) -> io::Result<()> {
        let mut descriptors = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        for connection in &self.connections {
            let mut events = PollFlags::POLLIN;
            if connection.wants_write() {
                events |= PollFlags::POLLOUT;
            }
            descriptors.push(PollFd::new(connection.stream().as_fd(), events));
        }
        for child in &self.children {
            if let Some(pipe) = &child.output.pipe {
                descriptors.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
            }
        }
        let timeout = match self.due() {
            None => PollTimeout::NONE,
            Some(due) => {
                let left = due.saturating_duration_since(Instant::now());
                // Rounded up, so that it is really due after the wait.
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn due(&self) -> Option<Instant> {
        let now = Instant::now();
        let children = self.children.iter().filter_map(|child| child.due(now));
        let orphan = (self.owner.is_none() && self.shutdown.is_none())
            .then(|| self.orphan_since + self.orphan_grace());
        children.chain(orphan).min()
    }

    fn orphan_grace(&self) -> Duration {
        if !self.ever_owned {
            IDLE_GRACE
        } else if self.children.is_empty() {
            self.config.orphan_grace.min(IDLE_GRACE)
        } else {
            self.config.orphan_grace
        }
    }

    /// Returns whether a child, or an adopted one, has ended.
    fn take_signals(&mut self) -> io::Result<bool> {
        let mut ended = false;
        while let Some(info) = self.signals.read_signal()? {
            let signal = i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
            ended |= signal == Some(Signal::SIGCHLD);
            // SIGHUP (a lost terminal) means nothing here.
            if matches!(signal, Some(Signal::SIGTERM | Signal::SIGINT)) {
                let grace = if self.shutdown.is_some() { Duration::ZERO } else { self.config.kill_grace };
                tracing::info!(?signal, ?grace, "told to end");
                self.begin_shutdown(grace, None);
            }
        }
        Ok(ended)
    }

    /// Reaps processes that were adopted because their parent died. Children of our own are reaped
    /// when all they left behind is gone.
    fn reap_adopted(&self) {
        let own: BTreeSet<i32> = self.children.iter().map(Child::pid).collect();
        let Ok(all) = procfs::own_children() else {
            return;
        };
        for process in all {
            if process.is_dead() && !own.contains(&process.pid) {
                let _ = waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG));
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let allowed = net::is_allowed(&stream);
            if !allowed || self.connections.len() >= CONNECTION_LIMIT {
                tracing::warn!(allowed, "connection refused");
                continue;
            }
            self.next_connection += 1;
            match Connection::new(self.next_connection, stream) {
                Ok(connection) => self.connections.push(connection),
                Err(error) => tracing::warn!(%error, "connection dropped"),
            }
        }
    }

    fn serve(&mut self, now: Instant) {
        let mut received = Vec::new();
        for connection in &mut self.connections {
            connection.flush();
            for request in connection.read() {
                received.push((connection.id, request));
            }
        }
        for (id, ToKeeper { seq, request }) in received {
            if let Some(answer) = self.handle(now, id, seq, request) {
                self.send_to(id, &FromKeeper::Answer { seq, answer });
            }
        }
        self.connections.retain(|connection| !connection.closed);
        if self.owner.is_some_and(|owner| self.connections.iter().all(|c| c.id != owner)) {
            tracing::info!(grace = ?self.orphan_grace(), "the owner is gone");
            self.owner = None;
            self.orphan_since = now;
        }
    }

    /// Handles a request; `None` if it is answered later.
    fn handle(&mut self, now: Instant, from: u64, seq: u64, request: Request) -> Option<Answer> {
        match request {
            Request::Own => {
                self.owned_by(from);
                Some(Answer::Keeper { pid: std::process::id(), run_id: self.config.run_id.clone() })
            }
            Request::TakeOver { orphan_grace_ms, kill_grace_ms } => {
                if self.shutdown.is_some() {
                    return Some(failed("everything is being stopped"));
                }
                self.owned_by(from);
                self.config.orphan_grace = Duration::from_millis(orphan_grace_ms);
                self.config.kill_grace = Duration::from_millis(kill_grace_ms);
                tracing::info!(children = self.children.len(), "taken over by a new owner");
                Some(Answer::Inventory {
                    pid: std::process::id(),
                    run_id: self.config.run_id.clone(),
                    children: self.children.iter().map(Child::info).collect(),
                    exits: self.exits.iter().cloned().collect(),
                })
            }
            Request::Spawn { spec } => Some(self.spawn(&spec)),
            Request::Stop { name, grace_ms } => {
                let grace = Duration::from_millis(grace_ms);
                // There is one of a name at most.
                let Some(child) = self.children.iter_mut().find(|child| child.name() == name) else {
                    return Some(failed(format!("no child {name:?}")));
                };
                child.stop(now, grace);
                Some(Answer::Done)
            }
            Request::List => {
                Some(Answer::Children { children: self.children.iter().map(Child::info).collect() })
            }
            Request::Shutdown { grace_ms } => {
                self.begin_shutdown(Duration::from_millis(grace_ms), Some((from, seq)));
                None
            }
        }
    }

    fn owned_by(&mut self, connection: u64) {
        self.ever_owned = true;
        if let Some(old) = self.owner.replace(connection)
            && let Some(known) = self.connections.iter_mut().find(|c| c.id == old)
        {
            known.closed = old != connection;
        }
    }

    fn spawn(&mut self, spec: &SpawnSpec) -> Answer {
        if self.shutdown.is_some() {
            return failed("everything is being stopped");
        }
        if !is_valid_name(&spec.name) {
            return failed(format!("invalid name {:?}", spec.name));
        }
        if self.children.len() >= CHILD_LIMIT {
            return failed(format!("{CHILD_LIMIT} children already"));
        }
        if let Some(child) = self.children.iter().map(Child::info).find(|child| child.name == spec.name) {
            return failed(format!(
                "{} (incarnation {}, pid {}) is not gone yet",
                child.name, child.incarnation, child.pid
            ));
        }
        match Child::spawn(spec, &self.config, &self.logs) {
            Ok(child) => {
                let pid = child.pid().unsigned_abs();
                tracing::info!(name = spec.name, incarnation = spec.incarnation, pid, "started");
                self.children.push(child);
                self.exits.retain(|exit| exit.name != spec.name);
                self.report(KeeperEvent::Spawned {
                    name: spec.name.clone(),
                    incarnation: spec.incarnation,
                    pid,
                });
                Answer::Spawned { pid }
            }
            Err(error) => {
                let program = spec.argv.first().map_or("", String::as_str);
                tracing::warn!(name = spec.name, program, %error, "not started");
                failed(format!("{program}: {error}"))
            }
        }
    }

    fn look_after_children(&mut self, now: Instant) {
        let mut reports = Vec::new();
        self.children.retain_mut(|child| match child.step(now) {
            Some(report) => {
                reports.push(report);
                false
            }
            None => true,
        });
        for report in reports {
            tracing::info!(
                name = report.name,
                incarnation = report.incarnation,
                pid = report.pid,
                status = %report.status,
                requested = report.requested,
                strays_killed = report.strays_killed,
                left = ?report.left,
                "ended"
            );
            self.exits.retain(|exit| exit.name != report.name);
            if self.exits.len() >= EXIT_LIMIT {
                self.exits.pop_front();
            }
            self.exits.push_back(report.clone());
            self.report(KeeperEvent::Exited(report));
        }
    }

    fn look_for_owner(&mut self, now: Instant) {
        if self.owner.is_none() && self.shutdown.is_none() && now >= self.orphan_since + self.orphan_grace() {
            tracing::warn!(
                children = self.children.len(),
                grace = ?self.orphan_grace(),
                "no owner: everything is stopped"
            );
            self.begin_shutdown(self.config.kill_grace, None);
        }
    }

    fn begin_shutdown(&mut self, grace: Duration, asked_by: Option<(u64, u64)>) {
        let now = Instant::now();
        let shutdown = self.shutdown.get_or_insert(Shutdown { grace, stage: None, asked_by: Vec::new() });
        shutdown.asked_by.extend(asked_by);
        if grace < shutdown.grace {
            // Told again, with less patience: that counts for the running stage, too.
            shutdown.grace = grace;
            let stage = shutdown.stage;
            for child in &mut self.children {
                if stage == Some(child.stop_order) {
                    child.stop(now, grace);
                }
            }
        }
    }

    /// Stops the next group of children when the one before is gone; returns whether all are.
    fn advance_shutdown(&mut self, now: Instant) -> bool {
        let Some(shutdown) = &mut self.shutdown else {
            return false;
        };
        let Some(stage) = self.children.iter().map(|child| child.stop_order).min() else {
            return true;
        };
        if shutdown.stage != Some(stage) {
            shutdown.stage = Some(stage);
            for child in &mut self.children {
                if child.stop_order == stage {
                    child.stop(now, shutdown.grace);
                }
            }
        }
        false
    }

    /// Weights in shared memory are for engines; these are gone. A sidecar that is there has a use for them.
    fn remove_segments(&self) {
        if self.owner.is_some() {
            return;
        }
        match remove_segments(Path::new(SHM_DIR), &self.config.run_id) {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "segments with weights are removed"),
            Err(error) => tracing::warn!(%error, "segments with weights are left behind"),
        }
    }

    /// Answers those who asked for the shutdown, and waits a little until they have read it.
    fn finish(&mut self) {
        let asked_by = self.shutdown.take().map(|shutdown| shutdown.asked_by).unwrap_or_default();
        for (id, seq) in asked_by {
            self.send_to(id, &FromKeeper::Answer { seq, answer: Answer::Done });
        }
        let limit = Instant::now() + FLUSH_LIMIT;
        loop {
            for connection in &mut self.connections {
                connection.flush();
            }
            self.connections.retain(|connection| connection.wants_write() && !connection.closed);
            let left = limit.saturating_duration_since(Instant::now());
            if self.connections.is_empty() || left.is_zero() {
                return;
            }
            let mut descriptors: Vec<PollFd<'_>> = self
                .connections
                .iter()
                .map(|connection| PollFd::new(connection.stream().as_fd(), PollFlags::POLLOUT))
                .collect();
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let _ = poll(&mut descriptors, timeout);
        }
    }

    fn report(&mut self, event: KeeperEvent) {
        if let Some(owner) = self.owner {
            self.send_to(owner, &FromKeeper::Event { event });
        }
    }

    fn send_to(&mut self, id: u64, message: &FromKeeper) {
        if let Some(connection) = self.connections.iter_mut().find(|c| c.id == id) {
            connection.send(message);
        }
    }
}

fn failed(error: impl Into<String>) -> Answer {
    Answer::Failed { error: error.into() }
}
