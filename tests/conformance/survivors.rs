//! Engine cores that outlive everything else of their deployment, its state directory too.

use std::path::{Path, PathBuf};

use dp_sidecar_testkit::engine::FakeEngine;
use dp_sidecar_testkit::frontend::FakeFrontend;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{
    Model, SOON, Setup, Sidecar, complete_on_all_ranks, directory, engine, frontend, model, until,
};

fn command_line(pid: i32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

fn parent(pid: i32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').map_or(0, |(_, rest)| rest.split_whitespace().nth(1).unwrap().parse().unwrap())
}

fn kill_9(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

fn lives(pid: i32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Kills everything but the engine cores, and loses the state directory. The cores, which the caller must end.
fn lose_all_but_the_cores(sidecar: &mut Sidecar) -> Vec<i32> {
    let keeper = sidecar.keeper().unwrap();
    let all = sidecar.processes();
    let is_core =
        |pid: &i32| all.contains(&parent(*pid)) && command_line(*pid).iter().any(|arg| arg == "serve");
    let cores: Vec<i32> = all.iter().copied().filter(is_core).collect();
    // It would end the cores of dead launchers, and its own death asks launchers to end theirs.
    kill(Pid::from_raw(keeper), Signal::SIGSTOP).unwrap();
    for pid in all.iter().filter(|pid| !cores.contains(pid)) {
        kill_9(*pid);
    }
    sidecar.signal(Signal::SIGKILL);
    sidecar.await_end();
    kill_9(keeper);
    until("nothing but the cores", SOON, || {
        all.iter().all(|pid| cores.contains(pid) || !lives(*pid)).then_some(())
    });
    std::fs::remove_dir_all(sidecar.state_dir()).unwrap();
    cores
}

/// One at the same address that has heard nothing yet: the lost sidecar may have sent a HELLO already.
fn anew(frontend: FakeFrontend, size: u16) -> FakeFrontend {
    let address = frontend.address().to_owned();
    drop(frontend);
    self::frontend(size, |options| options.address = address)
}

/// Where one can connect to what engines are connected to. The DP coordinator's publisher (`ci`) takes several.
fn open_sockets(state_dir: &Path) -> Vec<PathBuf> {
    let all = std::fs::read_dir(state_dir.join("ipc")).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.extension().is_none_or(|kind| kind != "ci")).collect()
}

#[test]
fn engine_cores_that_outlived_their_state_directory_are_ended_and_none_of_their_answers_is_seen() {
    let directory = directory();
    let (old, new) = (model(directory.path(), "m", 1, false), model(directory.path(), "n", 2, false));
    let link = directory.path().join("served");
    std::os::unix::fs::symlink(&old.path, &link).unwrap();
    let served = Model { path: link.clone(), digest: String::new() };
    let frontend = frontend(2, |_| {});
    let mut sidecar =
        Setup::spawning(2, &served).args(&["--orphan-grace", "60s"]).frontend(&frontend).start();
    sidecar.await_admitted();
    let cores = lose_all_but_the_cores(&mut sidecar);
    assert_eq!(cores.len(), 2, "engine cores");
    assert!(cores.iter().all(|pid| lives(*pid)), "the engine cores outlive their launchers");
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&new.path, &link).unwrap();

    let mut frontend = anew(frontend, 2);
    sidecar.start_again();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    let left: Vec<i32> = cores.iter().copied().filter(|pid| lives(*pid)).collect();
    let done = complete_on_all_ranks(&mut frontend, "after", 8, 4);
    cores.iter().for_each(|pid| kill_9(*pid));
    for done in done {
        assert_eq!(done.tokens, new.tokens(4), "rank {}", done.rank);
    }
    assert_eq!(left, Vec::<i32>::new(), "cores of the lost run beside the new ones");
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn no_answer_comes_from_an_engine_that_somebody_else_started_for_a_lost_state_directory() {
    let directory = directory();
    let (old, new) = (model(directory.path(), "m", 1, false), model(directory.path(), "n", 2, false));
    let frontend = frontend(1, |_| {});
    let mut sidecar = Setup::waiting(1, false).args(&["--orphan-grace", "60s"]).frontend(&frontend).start();
    let start = |sidecar: &Sidecar, model: &Model| -> FakeEngine {
        engine(sidecar, 0, |options| options.model = Some(model.path.clone()))
    };
    let survivor = start(&sidecar, &old);
    sidecar.await_admitted();
    lose_all_but_the_cores(&mut sidecar);
    let mut frontend = anew(frontend, 1);
    sidecar.start_again();
    let engine = start(&sidecar, &new);
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    for done in complete_on_all_ranks(&mut frontend, "after", 8, 4) {
        assert_eq!(done.tokens, new.tokens(4));
    }
    assert_eq!(open_sockets(sidecar.state_dir()), Vec::<PathBuf>::new(), "others can connect");
    assert!(!survivor.ended() && !engine.ended(), "an engine ended");
    sidecar.await_admitted();
}

/// Files in shared memory of a sidecar.
fn in_shared_memory(sidecar: &Sidecar) -> Vec<PathBuf> {
    let run_id = std::fs::read_to_string(sidecar.state_dir().join("run-id")).unwrap();
    let prefix = format!("dp-sidecar-{}-", run_id.trim());
    let all = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap());
    all.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect()
}

#[test]
fn segments_of_a_lost_state_directory_go_with_the_next_sidecar_of_the_node() {
    let directory = directory();
    let (old, new) = (model(directory.path(), "m", 1, false), model(directory.path(), "n", 2, false));
    let start = || {
        let sidecar = Setup::spawning(1, &old).args(&["--orphan-grace", "60s"]).start();
        sidecar.await_admitted();
        let said = sidecar.begin_update(&new.path, &[]).wait();
        assert_eq!(said.code, 0, "{}", said.text());
        sidecar
    };
    let (mut lost, mut kept) = (start(), start());
    let (of_lost, of_kept) = (in_shared_memory(&lost), in_shared_memory(&kept));
    assert!(of_lost.len() >= 2 && of_kept.len() >= 2, "segments and a lock: {of_lost:?} {of_kept:?}");
    // A sidecar that is away, as in a restart, keeps what it has with its keeper.
    kept.signal(Signal::SIGKILL);
    kept.await_end();
    lose_all_but_the_cores(&mut lost).into_iter().for_each(kill_9);
    assert!(of_lost.iter().all(|path| path.exists()), "nobody has removed them");
    let mut next = start();
    let left: Vec<_> = of_lost.iter().filter(|path| path.exists()).collect();
    assert!(left.is_empty(), "left: {left:?}");
    assert!(of_kept.iter().all(|path| path.exists()), "those of a living deployment");
    next.stop();
    assert_eq!(in_shared_memory(&next), Vec::<PathBuf>::new());
    kept.start_again();
    kept.await_admitted();
    kept.stop();
}
