//! The attachments: one task per wanted frontend, and the manager that adds and removes them.

mod frontend;
mod peer;
mod sockets;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dp_sidecar_protocol::FrontendId;
use dp_sidecar_protocol::machine::attachment as machine;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::handles::{
    AttachmentCommand, AttachmentHandle, CoordinatorHandle, Deployment, FrontendSnapshot, HandleError,
    RankHandle, Reply,
};

pub use peer::{ListeningProcess, listening_process};

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
    /// Backoff and reports; the address is filled in.
    pub machine: machine::Config,
}

impl Default for AttachmentConfig {
    fn default() -> Self {
        Self {
            model: None,
            connect_timeout: Duration::from_secs(5),
            route_timeout: Duration::from_secs(120),
            machine: machine::Config::new(""),
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
    next_id: AtomicU64,
}

impl Shared {
    fn next_id(&self) -> FrontendId {
        FrontendId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Slots that this task may take, on the rank that has the fewest.
    fn free_slots(&self, claims: &BTreeMap<u64, u32>, task: u64) -> u32 {
        let others: u32 = claims.iter().filter(|(other, _)| **other != task).map(|(_, slots)| slots).sum();
        let fewest = self
            .ranks
            .iter()
            .map(|rank| {
                let (_, draining, all) = rank.snapshot.borrow().slots;
                all.saturating_sub(draining)
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
    let manager = Manager {
        shared: Arc::new(Shared {
            config,
            ranks,
            coordinator,
            deployment,
            snapshots,
            claims: Mutex::default(),
            next_id: AtomicU64::new(1),
        }),
        tasks: TaskTracker::new(),
        wanted: BTreeMap::new(),
        ending: BTreeMap::new(),
        next_task: 0,
    };
    tracker.spawn(manager.run(inbox));
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
}

struct Entry {
    remove: oneshot::Sender<Reply<()>>,
    ended: CancellationToken,
}

impl Manager {
    async fn run(mut self, mut inbox: mpsc::Receiver<AttachmentCommand>) {
        let reply = loop {
            match inbox.recv().await {
                Some(AttachmentCommand::Add { address, reply }) => {
                    let _ = reply.send(self.add(address));
                }
                Some(AttachmentCommand::Remove { address, reply }) => self.remove(address, reply),
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

    fn add(&mut self, address: String) -> Result<(), HandleError> {
        check_address(&address)?;
        if self.wanted.contains_key(&address) {
            return Err(HandleError::failed(format!("frontend {address} is wanted already")));
        }
        if self.wanted.len() == FRONTENDS {
            return Err(HandleError::failed(format!("{FRONTENDS} frontends are wanted already")));
        }
        self.ending.retain(|_, ended| !ended.is_cancelled());
        let (remove, removed) = oneshot::channel();
        let ended = CancellationToken::new();
        let task = frontend::Task::new(
            self.shared.clone(),
            self.next_task,
            address.clone(),
            ended.clone().drop_guard(),
        );
        self.next_task += 1;
        self.tasks.spawn(task.run(removed, self.ending.remove(&address)));
        self.wanted.insert(address, Entry { remove, ended });
        Ok(())
    }

    fn remove(&mut self, address: String, reply: Reply<()>) {
        let Some(entry) = self.wanted.remove(&address) else {
            let known: Vec<&str> = self.wanted.keys().map(String::as_str).collect();
            let _ = reply.send(Err(HandleError::failed(format!(
                "frontend {address} is not wanted; wanted are: {}",
                if known.is_empty() { "none".to_owned() } else { known.join(", ") }
            ))));
            return;
        };
        if let Err(reply) = entry.remove.send(reply) {
            let _ = reply.send(Ok(()));
        }
        self.ending.insert(address, entry.ended);
    }
}

fn check_address(address: &str) -> Result<(), HandleError> {
    let bad = |why: &str| {
        Err(HandleError::failed(format!(
            "frontend address {address:?}: {why}, expected HOST:PORT as given to the frontend by --data-parallel-address and --data-parallel-rpc-port"
        )))
    };
    let Some((host, port)) = address.rsplit_once(':') else {
        return bad("no port");
    };
    if host.is_empty() || host.contains(['/', ' ']) {
        return bad("no host");
    }
    if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
        return bad("an IPv6 host needs brackets");
    }
    match port.parse::<u16>() {
        Ok(0) | Err(_) => bad("no port"),
        Ok(_) => Ok(()),
    }
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
