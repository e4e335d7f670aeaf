//! The attachments: one task per wanted frontend, and the manager that adds and removes them.

mod frontend;
mod peer;
mod records;
mod sockets;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dp_sidecar_protocol::machine::attachment as machine;
use dp_sidecar_protocol::{EngineIndex, FrontendId};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::handles::{
    AttachmentCommand, AttachmentHandle, CoordinatorHandle, Deployment, HandleError, Origin, RankHandle,
    Reply, RouteLost,
};
use crate::api::FrontendSnapshot;
use crate::config::check_host_port;
use crate::tasks::{Task, named};

pub(crate) use records::supervised;
use records::{Attached, Record, Records};

/// Commands waiting for the manager.
const COMMANDS: usize = 16;
/// Most frontends wanted at a time.
const FRONTENDS: usize = 256;
/// For closing the routes and telling the frontends when the sidecar ends.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// Settings of the attachments.
#[derive(Clone, Debug)]
pub struct AttachmentConfig {
    /// The model of the deployment as on the engines' command line, if known. Compared with the
    /// command line of a frontend on this host.
    pub model: Option<String>,
    /// For one connection to the handshake socket or the DP coordinator of a frontend.
    pub connect_timeout: Duration,
    /// For opening the data path of a rank to an API server.
    pub route_timeout: Duration,
    /// A step of the handshake that takes longer is reported as the reason why a frontend is not attached.
    pub stall: Duration,
    /// Where the frontends are written down, and those of a killed predecessor are found. None: nowhere.
    pub state_dir: Option<PathBuf>,
    /// Frontends on the command line: others that a predecessor had there are detached.
    pub flagged: BTreeSet<String>,
    /// There is going to be a supervised frontend: that of a predecessor stays attached until it is added.
    pub supervises: bool,
}

impl Default for AttachmentConfig {
    fn default() -> Self {
        Self {
            model: None,
            connect_timeout: Duration::from_secs(5),
            route_timeout: Duration::from_secs(120),
            stall: machine::STALL,
            state_dir: None,
            flagged: BTreeSet::new(),
            supervises: false,
        }
    }
}

/// What all attachment tasks share.
struct Shared {
    config: AttachmentConfig,
    ranks: Vec<RankHandle>,
    coordinator: CoordinatorHandle,
    deployment: watch::Receiver<Deployment>,
    snapshots: watch::Sender<Vec<FrontendSnapshot>>,
    /// Slots taken by each task. Two frontends that come at once must not both take the last one.
    claims: Mutex<BTreeMap<u64, u32>>,
    /// Who hears of lost routes: the current attempt of each attachment.
    losses: Mutex<BTreeMap<FrontendId, (machine::Attempt, mpsc::Sender<machine::Event>)>>,
    /// Only locked for as long as it takes to replace a small file.
    records: Mutex<Records>,
}

impl Shared {
    fn next_id(&self) -> FrontendId {
        self.records.lock().next_id()
    }

    /// Slots that this task may take, on the rank that has the fewest.
    fn free_slots(&self, claims: &BTreeMap<u64, u32>, task: u64) -> u32 {
        let others: u32 = claims.iter().filter(|(other, _)| **other != task).map(|(_, slots)| slots).sum();
        let fewest = self
            .ranks
            .iter()
            .map(|rank| {
                let slots = rank.snapshot.borrow().slots;
                slots.all.saturating_sub(slots.draining)
            })
            .min();
        fewest.unwrap_or(0).saturating_sub(others)
    }
}

/// Starts the manager. It attaches to what [`AttachmentCommand::Add`] names, as soon as `deployment`
/// is complete, and again whenever the frontend was lost.
pub fn spawn(
    config: AttachmentConfig,
    tracker: &TaskTracker,
    ranks: Vec<RankHandle>,
    coordinator: CoordinatorHandle,
    deployment: watch::Receiver<Deployment>,
) -> AttachmentHandle {
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let (snapshots, snapshot) = watch::channel(Vec::new());
    let records = Records::load(config.state_dir.as_deref());
    let predecessor = records.all().clone();
    let mut manager = Manager {
        shared: Arc::new(Shared {
            config,
            ranks,
            coordinator,
            deployment,
            snapshots,
            claims: Mutex::default(),
            losses: Mutex::default(),
            records: Mutex::new(records),
        }),
        tasks: TaskTracker::new(),
        wanted: BTreeMap::new(),
        ending: BTreeMap::new(),
        next_task: 0,
        adopted: BTreeSet::new(),
    };
    manager.adopt(predecessor);
    tracker.spawn(named(Task::Attachments, manager.run(inbox)));
    AttachmentHandle { commands, snapshot }
}

struct Manager {
    shared: Arc<Shared>,
    tasks: TaskTracker,
    wanted: BTreeMap<String, Entry>,
    /// Removed, but sockets may be left: a new task for the same address waits for it, because a
    /// frontend must not get HELLO twice.
    ending: BTreeMap<String, CancellationToken>,
    next_task: u64,
    /// Those of a predecessor that were found in its records.
    adopted: BTreeSet<FrontendId>,
}

struct Entry {
    /// Wanted by a predecessor in this way, and not yet by this sidecar.
    recorded: Option<Origin>,
    remove: oneshot::Sender<Reply<()>>,
    ended: CancellationToken,
}

impl Manager {
    async fn run(mut self, mut inbox: mpsc::Receiver<AttachmentCommand>) {
        let reply = loop {
            match inbox.recv().await {
                Some(AttachmentCommand::Add { address, origin, reply }) => {
                    let _ = reply.send(self.add(address, origin));
                }
                Some(AttachmentCommand::Remove { address, reply }) => self.remove(&address, reply),
                Some(AttachmentCommand::Routes { rank, routes, reply }) => {
                    self.close_strangers(rank, routes);
                    let _ = reply.send(Ok(()));
                }
                Some(AttachmentCommand::RouteLost(loss)) => self.route_lost(loss),
                Some(AttachmentCommand::Shutdown { reply }) => break Some(reply),
                None => break None,
            }
        };
        for (address, entry) in std::mem::take(&mut self.wanted) {
            let (done, _) = oneshot::channel();
            if entry.remove.send(done).is_err() {
                tracing::debug!(frontend.addr = %address, "attachment task has ended");
            }
        }
        self.tasks.close();
        let result = timeout(SHUTDOWN_LIMIT, self.tasks.wait()).await;
        if let Some(reply) = reply {
            let _ = reply.send(result.map_err(|_| HandleError::Deadline {
                what: "detaching from all frontends".to_owned(),
                limit: SHUTDOWN_LIMIT,
            }));
        }
    }

    /// Goes on with the frontends of a predecessor.
    fn adopt(&mut self, frontends: BTreeMap<String, Record>) {
        for (address, record) in frontends {
            self.adopted.extend(record.attached.as_ref().map(|attached| attached.id));
            let wanted = match record.origin {
                Origin::Command => true,
                Origin::Flag => self.shared.config.flagged.contains(&address),
                Origin::Supervised => self.shared.config.supervises,
            };
            self.start(&address, record.attached, Some(record.origin));
            if !wanted {
                tracing::info!(frontend.addr = %address, "frontend of the previous sidecar is no longer registered");
                let (reply, _) = oneshot::channel();
                self.remove(&address, reply);
            }
        }
    }

    fn add(&mut self, address: String, origin: Origin) -> Result<(), HandleError> {
        check_address(&address)?;
        if let Some(entry) = self.wanted.get_mut(&address) {
            // What was added by command may be on the command line the next time.
            let before =
                entry.recorded.filter(|before| (*before, origin) != (Origin::Command, Origin::Command));
            if before.is_none() {
                return Err(HandleError::failed(format!("frontend {address} is registered already")));
            }
            entry.recorded = None;
            self.shared.records.lock().want(&address, origin);
            return Ok(());
        }
        if self.wanted.len() == FRONTENDS {
            return Err(HandleError::failed(format!(
                "{FRONTENDS} frontends are registered already, the maximum"
            )));
        }
        self.shared.records.lock().want(&address, origin);
        self.start(&address, None, None);
        Ok(())
    }

    fn start(&mut self, address: &str, adopt: Option<Attached>, recorded: Option<Origin>) {
        self.ending.retain(|_, ended| !ended.is_cancelled());
        let (remove, removed) = oneshot::channel();
        let ended = CancellationToken::new();
        let number = self.next_task;
        self.next_task += 1;
        if let Some(attached) = &adopt {
            // Before anybody else can take its slots.
            self.shared.claims.lock().insert(number, attached.api_servers());
        }
        let task = frontend::Task::new(
            self.shared.clone(),
            number,
            address.to_owned(),
            adopt,
            ended.clone().drop_guard(),
        );
        self.tasks.spawn(named(Task::Attachment, task.run(removed, self.ending.remove(address))));
        self.wanted.insert(address.to_owned(), Entry { recorded, remove, ended });
    }

    fn remove(&mut self, address: &str, reply: Reply<()>) {
        let Some(entry) = self.wanted.remove(address) else {
            let known: Vec<&str> = self.wanted.keys().map(String::as_str).collect();
            let _ = reply.send(Err(HandleError::failed(format!(
                "frontend {address} is not registered; registered frontends: {}",
                if known.is_empty() { "none".to_owned() } else { known.join(", ") }
            ))));
            return;
        };
        if let Err(reply) = entry.remove.send(reply) {
            let _ = reply.send(Ok(()));
        }
        self.ending.insert(address.to_owned(), entry.ended);
    }

    /// Of an attachment that has ended, nobody wants to know.
    fn route_lost(&self, loss: RouteLost) {
        let Some((attempt, events)) = self.shared.losses.lock().get(&loss.frontend).cloned() else {
            return;
        };
        let RouteLost { rank, api_server, reason, .. } = loss;
        let event = machine::Event::RouteLost { attempt, rank, api_server, reason };
        if let Err(mpsc::error::TrySendError::Full(event)) = events.try_send(event) {
            // Its task takes it soon: it waits for nobody but its own sockets.
            self.tasks.spawn(async move { timeout(SHUTDOWN_LIMIT, events.send(event)).await });
        }
    }

    /// Closes routes that a predecessor opened and did not write down, or whose record is lost.
    fn close_strangers(&self, rank: EngineIndex, routes: Vec<(FrontendId, u32)>) {
        let strangers: BTreeSet<FrontendId> = routes
            .into_iter()
            .map(|(frontend, _)| frontend)
            .filter(|frontend| !self.adopted.contains(frontend))
            .collect();
        let Some(handle) = self.shared.ranks.iter().find(|handle| handle.rank == rank) else {
            return;
        };
        for frontend in strangers {
            self.shared.records.lock().used(frontend);
            tracing::warn!(
                %rank, %frontend,
                "closing routes of an unknown attachment: its frontend is told that the engine is dead, and must be \
                 started again"
            );
            let handle = handle.clone();
            self.tasks.spawn(async move { frontend::close_routes(&handle, frontend, true).await });
        }
    }
}

fn check_address(address: &str) -> Result<(), HandleError> {
    check_host_port(address).map_err(|why| {
        HandleError::failed(format!(
            "frontend address {address:?}: {why} (HOST:PORT as given to the frontend by --data-parallel-address and --data-parallel-rpc-port)"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_without_host_or_port_are_refused() {
        for good in ["127.0.0.1:7200", "node-1:1", "[::1]:29550"] {
            check_address(good).unwrap();
        }
        for bad in ["", "localhost", ":7200", "h:0", "h:99999", "h:x", "::1:7200", "http://h:80"] {
            let error = check_address(bad).unwrap_err().to_string();
            assert!(error.contains("HOST:PORT"), "{bad}: {error}");
        }
    }
}
