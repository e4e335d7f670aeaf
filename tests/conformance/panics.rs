//! A task that panics ends its process, whichever it is, and the process that is started then goes on.
//!
//! Each task panics for real, see `src/tasks.rs`: the file that `DP_SIDECAR_TEST_PANIC` names says which.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dp_sidecar::tasks::Task;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{
    Model, SOON, Setup, Sidecar, complete_all, directory, exited_with, free_port, frontend, model, until,
};

/// From the panic to the end of the process: a second, and what a machine that is busy with other tests adds.
const END: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Leader,
    Follower,
    Relay,
    Keeper,
    /// It is there while engines and the supervised frontend start.
    Starting,
}

/// A new task does not compile before it has a place, and is tested then.
const fn place(task: Task) -> Place {
    match task {
        Task::Accelerators
        | Task::Admin
        | Task::AdminCommand
        | Task::AdminConnection
        | Task::Attachment
        | Task::Attachments
        | Task::Control
        | Task::Coordinator
        | Task::Handshake
        | Task::Http
        | Task::HttpConnection
        | Task::KeeperClient
        | Task::KeeperEvents
        | Task::Lifeline
        | Task::LinkClient
        | Task::Node
        | Task::Outside
        | Task::PauseWatch
        | Task::PeerConnection
        | Task::PeerListener
        | Task::Processes
        | Task::Queue
        | Task::RelayHost
        | Task::Staging
        | Task::StagingThread
        | Task::WeightUpdate => Place::Leader,
        Task::Follower | Task::FollowerLinking => Place::Follower,
        Task::Edge
        | Task::EdgeReader
        | Task::EnginePublisher
        | Task::Rank
        | Task::RelayListener
        | Task::RelayServer => Place::Relay,
        Task::HandshakeConnection | Task::HandshakeListener | Task::SupervisedFrontend => Place::Starting,
        Task::Keeper => Place::Keeper,
    }
}

fn tasks(of: Place) -> impl Iterator<Item = Task> {
    Task::ALL.iter().copied().filter(move |task| place(*task) == of)
}

/// Two nodes with one lockstep rank each.
struct Pair {
    leader: Sidecar,
    follower: Sidecar,
    orders: [PathBuf; 2],
    /// Ports of the leader that a stranger can connect to.
    ports: [u16; 2],
    other: Model,
    _directory: tempfile::TempDir,
}

impl Pair {
    fn start(frontend_at: Option<&str>) -> Self {
        let directory = directory();
        let model = |name, seed| model(directory.path(), name, seed, true);
        let (first, other) = (model("m", 1), model("n", 2));
        let token = directory.path().join("token");
        std::fs::write(&token, "the secret of this test").unwrap();
        let (peers, http, handshake) = (free_port(), free_port(), free_port());
        let orders = ["leader", "follower"].map(|name| directory.path().join(name));
        let node = |start: u16| {
            let setup = Setup::spawning(2, &first).node(start, 1, &format!("127.0.0.1:{peers}"), &token);
            let order = orders[usize::from(start)].display().to_string();
            setup.args(&["--orphan-grace", "60s"]).env("DP_SIDECAR_TEST_PANIC", order)
        };
        let mut leader = node(0).port(handshake).lifeline().args(&["--http", &format!("127.0.0.1:{http}")]);
        if let Some(address) = frontend_at {
            leader = leader.args(&["--frontend", address]);
        }
        let (leader, follower) = (leader.start(), node(1).start());
        leader.await_admitted();
        let ports = [peers, http];
        Self { leader, follower, orders, ports, other, _directory: directory }
    }

    /// Does what makes every task do something.
    fn poke(&mut self, task: Task) {
        match task {
            Task::PeerConnection | Task::HttpConnection => {
                let connections = self.ports.map(|port| TcpStream::connect(("127.0.0.1", port)));
                // A connection is looked at when it comes; so it may go again.
                drop(connections);
            }
            Task::Accelerators | Task::AdminCommand | Task::AdminConnection => {
                self.leader.status();
            }
            Task::Lifeline => self.leader.write_lifeline(),
            Task::StagingThread => {
                let path = self.other.path.display().to_string();
                self.leader.command(&["update", "--path", &path]);
            }
            _ => {}
        }
    }
}

fn order(file: &Path, task: Task) {
    // At once and whole: it is looked at all the time.
    let fresh = file.with_extension("new");
    std::fs::write(&fresh, task.name()).unwrap();
    std::fs::rename(fresh, file).unwrap();
}

#[track_caller]
fn ends_with_1(sidecar: &mut Sidecar, task: Task, since: Instant) {
    let end = sidecar.await_end();
    let name = task.name();
    assert!(exited_with(end, 1), "{name}: {end:?}\n{}", sidecar.log());
    assert!(since.elapsed() < END, "{name}: ended after {:?}", since.elapsed());
    let log = sidecar.log();
    let last = log.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
    assert!(last.starts_with(r#"{"exit":1,"#) && last.contains("a test asked for it"), "{name}: {last}");
    if !matches!(task, Task::Accelerators | Task::Lifeline | Task::StagingThread) {
        assert!(last.contains(&format!("task {name} panicked at ")), "{last}");
    }
}

#[test]
fn a_panic_of_any_task_of_a_sidecar_ends_it_with_exit_code_1_and_its_successor_finds_its_engines() {
    let mut frontend = frontend(2, |options| options.moe = true);
    let address = frontend.host_port().to_owned();
    let mut pair = Pair::start(Some(&address));
    frontend.startup(SOON).unwrap();
    let before = pair.leader.await_attached(&address);
    let keeper = pair.leader.keeper();
    for task in tasks(Place::Leader) {
        order(&pair.orders[0], task);
        let file = pair.orders[0].clone();
        until(&format!("{} has panicked", task.name()), SOON, || {
            pair.poke(task);
            (!file.exists()).then_some(())
        });
        ends_with_1(&mut pair.leader, task, Instant::now());
        pair.leader.start_again();
        pair.leader.await_attached(&address);
        pair.leader.await_admitted();
        assert_eq!(pair.leader.keeper(), keeper, "{}", task.name());
        pair.leader.await_status(&format!("the same engines after {}", task.name()), |status| {
            [0, 1].iter().all(|rank| {
                let (now, then) = (&status["engines"][rank], &before["engines"][rank]);
                now["pid"] == then["pid"] && now["incarnation"] == then["incarnation"]
            })
        });
    }
    for task in tasks(Place::Follower) {
        order(&pair.orders[1], task);
        let file = pair.orders[1].clone();
        until(&format!("{} has panicked", task.name()), SOON, || (!file.exists()).then_some(()));
        ends_with_1(&mut pair.follower, task, Instant::now());
        pair.follower.start_again();
        pair.leader.await_status("the follower is back", |status| status["nodes"][1]["link"] == "up");
        pair.leader.await_admitted();
    }
    complete_all(&mut frontend, "last", 4, 4);
}

#[test]
fn a_panic_of_any_task_of_a_relay_process_or_of_the_keeper_ends_that_process_and_the_sidecar_replaces_it() {
    for task in tasks(Place::Relay).chain(tasks(Place::Keeper)) {
        // Engines that are started again and again wait for longer and longer: a new pair for each.
        let pair = Pair::start(None);
        let is_keeper = place(task) == Place::Keeper;
        let what = if is_keeper { "keeper_pid" } else { "relay_pid" };
        let status = pair.leader.await_status("its processes run", |status| status["sidecar"][what].is_i64());
        let old = status["sidecar"][what].as_i64().unwrap();
        order(&pair.orders[0], task);
        until(&format!("{} has panicked", task.name()), SOON, || {
            if is_keeper {
                // Wakes it, and means nothing when no child has ended.
                let _ = kill(Pid::from_raw(i32::try_from(old).unwrap()), Signal::SIGCHLD);
            }
            (!pair.orders[0].exists()).then_some(())
        });
        pair.leader.await_status(&format!("another process after {}", task.name()), |status| {
            status["sidecar"][what].as_i64().is_some_and(|pid| pid != old)
        });
        pair.leader.await_admitted();
    }
}

#[test]
fn a_panic_while_engines_start_ends_the_sidecar_and_its_successor_starts_them() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    for task in tasks(Place::Starting) {
        let file = directory.path().join("order");
        order(&file, task);
        let since = Instant::now();
        let port = free_port().to_string();
        let setup = Setup::spawning(1, &model)
            .args(&["--serve", "--port", &port])
            .env("DP_SIDECAR_TEST_PANIC", file.display().to_string());
        let mut sidecar = setup.start();
        ends_with_1(&mut sidecar, task, since);
        sidecar.start_again();
        sidecar.await_admitted();
    }
}
