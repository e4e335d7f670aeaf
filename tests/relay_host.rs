//! The sidecar's side of the relay process, with a real keeper and a real relay process.

use std::collections::BTreeMap;
use std::time::Duration;

use dp_sidecar::driver::handles::GroupKind;
use dp_sidecar::relay::host::{self, HostOptions};
use dp_sidecar::relay::{CHILD, Purpose};
use dp_sidecar::state_dir::StateDir;
use dp_sidecar::supervisor::{KeeperClient, KeeperOptions, SpawnSpec};
use dp_sidecar_protocol::machine::virtual_engine::Limits;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const PATIENCE: Duration = Duration::from_secs(60);

fn options(state: &StateDir, tasks: &TaskTracker) -> KeeperOptions {
    KeeperOptions {
        state_dir: state.path().to_owned(),
        exe: env!("CARGO_BIN_EXE_sidecar").into(),
        run_id: state.run_id().to_owned(),
        orphan_grace: PATIENCE,
        kill_grace: Duration::from_millis(500),
        configuration: "a deployment".to_owned(),
        keep: [CHILD.to_owned()].into(),
        tasks: tasks.clone(),
    }
}

/// A successor that takes over a dying relay process hears of its end late: that must not end the next one.
#[tokio::test]
async fn the_end_of_an_old_relay_process_that_is_heard_of_late_is_not_taken_for_that_of_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s")).unwrap();
    let tasks = TaskTracker::new();
    let (first, _events) = KeeperClient::connect_or_start(options(&state, &tasks)).await.unwrap();
    let old = SpawnSpec {
        name: CHILD.to_owned(),
        incarnation: 1,
        argv: ["/bin/sh", "-c", "exec sleep 1000"].map(str::to_owned).to_vec(),
        env: BTreeMap::from([("PATH".to_owned(), std::env::var("PATH").unwrap())]),
        cwd: None,
        stop_order: 2,
    };
    let pid = first.spawn(old).await.unwrap();
    drop(first);
    let (keeper, events) = KeeperClient::connect_or_start(options(&state, &tasks)).await.unwrap();
    assert_eq!(keeper.inherited().last_incarnation(CHILD), 1);
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
    let gone = async {
        while !keeper.list().await.unwrap().is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
    // Its end is in `events` now, which nobody has read.
    let (reports, _reported) = mpsc::channel(64);
    let stop = CancellationToken::new();
    let (kind, limits) = (GroupKind::Independent, Limits::default());
    let purpose = Purpose { ranks: 0..1, frontend_slots: 1, kind, limits };
    let options = HostOptions {
        state_dir: state.path().to_owned(),
        exe: env!("CARGO_BIN_EXE_sidecar").into(),
        purpose,
        keeper: keeper.clone(),
        kill_grace: Duration::from_millis(500),
        tracker: tasks.clone(),
        stop: stop.clone(),
    };
    let mut relay = host::start(options, events, reports).await.unwrap();
    assert!(relay.failed.try_recv().is_err());
    let children = keeper.list().await.unwrap();
    assert_eq!(children.len(), 1, "{children:?}");
    assert_eq!(children[0].incarnation, 2, "no number is used twice");
    assert_eq!(Some(children[0].pid), *relay.pid.borrow());
    relay.retire.cancel();
    keeper.shutdown(Duration::from_millis(500)).await.unwrap();
    stop.cancel();
    drop((keeper, relay));
    tasks.close();
    timeout(PATIENCE, tasks.wait()).await.unwrap();
}
