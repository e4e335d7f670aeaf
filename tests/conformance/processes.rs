//! Nothing outlives what it belongs to.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use dp_sidecar::supervisor::procfs::{Process, processes};
use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendError, NewRequest};

use super::harness::{SOON, Setup, complete_all, directory, exited_with, frontend, model, until};

#[test]
fn sigterm_stops_everything_that_was_started() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut sidecar = Setup::spawning(2, &model).start();
    sidecar.await_admitted();
    assert!(sidecar.processes().len() >= 4, "launchers and engine cores");
    let status = sidecar.stop();
    assert!(exited_with(status, 0), "{status}");
    assert_eq!(sidecar.processes(), Vec::<i32>::new());
    let said = sidecar.command(&["status"]);
    assert_eq!(said.code, 14, "{}", said.text());
}

#[test]
fn a_lost_terminal_stops_everything_that_was_started() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    // The tests may run under nohup themselves.
    let heard = "exec env --default-signal=HUP \"$0\" \"$@\"";
    let mut sidecar = Setup::spawning(2, &model).first(heard).start();
    sidecar.await_admitted();
    sidecar.signal(Signal::SIGHUP);
    let status = sidecar.await_end();
    assert!(exited_with(status, 0), "{status}");
    assert_eq!(sidecar.processes(), Vec::<i32>::new());
}

/// What `/proc/PID/FILE` says under a name.
fn kernel_says(pid: i32, file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
}

#[test]
fn a_hangup_that_was_to_be_ignored_stays_ignored_as_under_nohup() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut sidecar = Setup::spawning(1, &model).first("trap '' HUP").start();
    sidecar.await_admitted();
    let bit = 1_u64 << (Signal::SIGHUP as u32 - 1);
    for (name, expected) in [("SigIgn:", bit), ("SigCgt:", 0)] {
        let mask = kernel_says(sidecar.pid().as_raw(), "status", name);
        assert_eq!(u64::from_str_radix(&mask, 16).unwrap() & bit, expected, "{name} {mask}");
    }
    assert!(exited_with(sidecar.stop(), 0));
}

#[test]
fn a_low_limit_of_open_files_is_raised_for_all_processes() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut sidecar = Setup::spawning(1, &model).first("ulimit -Sn 128").start();
    sidecar.await_admitted();
    let mut pids = sidecar.processes();
    pids.extend([sidecar.pid().as_raw(), sidecar.keeper().unwrap()]);
    assert!(pids.len() >= 4, "sidecar, keeper, relay process, engine: {pids:?}");
    for pid in pids {
        let limits = kernel_says(pid, "limits", "Max open files");
        let limits: Vec<_> = limits.split_whitespace().collect();
        let hard = limits[1].parse::<u64>().unwrap_or(u64::MAX);
        assert_eq!(limits[0].parse::<u64>().unwrap(), hard.min(65_535), "{pid}: {limits:?}");
    }
    assert!(exited_with(sidecar.stop(), 0));
}

/// The processes that `choose` takes.
fn chosen(choose: impl Fn(&Process) -> bool) -> Vec<Process> {
    processes().unwrap().into_iter().filter(choose).collect()
}

#[test]
fn as_the_first_process_of_a_container_it_leaves_no_zombies_and_hears_signals() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("not tried: only root makes pid namespaces everywhere");
    }
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let contained = "exec unshare --pid --fork --mount-proc --kill-child \"$0\" \"$@\"";
    let mut sidecar = Setup::spawning(2, &model).first(contained).start();
    sidecar.await_admitted();
    let outside = sidecar.pid().as_raw();
    let [first] = chosen(|process| process.parent == outside).try_into().unwrap();
    // What a dead keeper leaves is handed to the first process.
    let [keeper] = chosen(|process| {
        let line = std::fs::read_to_string(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        line.contains("\0keeper\0") && line.contains(&*sidecar.state_dir().to_string_lossy())
    })
    .try_into()
    .unwrap();
    let before = sidecar.processes();
    kill(Pid::from_raw(keeper.pid), Signal::SIGKILL).unwrap();
    until("the old processes are gone", SOON, || {
        let now = sidecar.processes();
        before.iter().all(|pid| !now.contains(pid)).then_some(())
    });
    sidecar.await_admitted();
    until("no zombies", SOON, || {
        chosen(|process| process.parent == first.pid && process.is_dead()).is_empty().then_some(())
    });
    kill(Pid::from_raw(first.pid), Signal::SIGTERM).unwrap();
    let status = sidecar.await_end();
    assert!(exited_with(status, 0), "{status}");
    sidecar.await_nothing_left();
}

#[test]
fn sigterm_during_the_start_stops_everything() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut sidecar = Setup::spawning(2, &model).env("FAKE_VLLM_START_MS", "60000").start();
    until("engines started", SOON, || (sidecar.processes().len() >= 4).then_some(()));
    let status = sidecar.stop();
    assert!(exited_with(status, 0), "{status}");
    sidecar.await_nothing_left();
}

#[test]
fn after_a_kill_of_the_sidecar_nothing_is_left_when_the_grace_is_over() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut sidecar = Setup::spawning(2, &model).start();
    sidecar.await_admitted();
    let keeper = sidecar.keeper().unwrap();
    sidecar.signal(Signal::SIGKILL);
    sidecar.await_end();
    assert!(!sidecar.processes().is_empty(), "engines survive the sidecar for the grace");
    sidecar.await_nothing_left();
    until("end of the keeper", SOON, || kill(Pid::from_raw(keeper), None).is_err().then_some(()));
}

#[test]
fn after_a_kill_of_the_keeper_the_engines_are_stopped_and_started_again() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |_| {});
    let mut sidecar = Setup::spawning(2, &model).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    let before = sidecar.processes();
    let keeper = sidecar.keeper().unwrap();
    kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
    until("the old processes are gone", SOON, || {
        let now = sidecar.processes();
        before.iter().all(|pid| !now.contains(pid)).then_some(())
    });
    sidecar.await_status("another keeper", |status| {
        status["sidecar"]["keeper_pid"].as_i64().is_some_and(|pid| pid != i64::from(keeper))
    });
    sidecar.await_admitted();
    // The relay process has ended with its keeper, and with it what the frontend was connected to.
    let error = frontend.server().until("its end", SOON, |_| false).unwrap_err();
    assert!(matches!(error, FrontendError::EngineDead { .. }), "{error}");
    let mut frontend = again(frontend);
    frontend.startup(SOON).unwrap();
    for done in complete_all(&mut frontend, "after", 4, 4) {
        assert_eq!(done.tokens, model.tokens(4));
    }
    sidecar.stop();
    sidecar.await_nothing_left();
}

/// A successor at the same address, as a supervisor starts one.
fn again(frontend: FakeFrontend) -> FakeFrontend {
    let address = frontend.address().to_owned();
    drop(frontend);
    super::harness::frontend(2, |options| options.address = address)
}

#[test]
fn a_launcher_that_is_killed_takes_its_engine_core_with_it() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let sidecar = Setup::spawning(1, &model).start();
    let status = sidecar.await_admitted();
    let launcher = status["engines"][0]["pid"].as_i64().unwrap();
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    let core: i32 = children.split_whitespace().next().unwrap().parse().unwrap();
    let launcher = i32::try_from(launcher).unwrap();
    kill(Pid::from_raw(launcher), Signal::SIGKILL).unwrap();
    until("end of the stray engine core", SOON, || (!sidecar.processes().contains(&core)).then_some(()));
    sidecar.await_admitted();
}

#[test]
fn the_served_frontend_comes_up_and_answers() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let port = super::harness::free_port().to_string();
    let mut sidecar =
        Setup::spawning(2, &model).args(&["--serve", "--port", &port, "--host", "127.0.0.1"]).start();
    sidecar.await_admitted();
    let answer = until("an HTTP answer", SOON, || {
        let body = r#"{"prompt": [1, 2, 3], "max_tokens": 4}"#;
        http(&port, body)
    });
    let body: serde_json::Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(body["choices"][0]["token_ids"], serde_json::json!(model.tokens(4)));
    let status = sidecar.stop();
    assert!(exited_with(status, 0), "{status}");
    sidecar.await_nothing_left();
}

#[test]
fn sigterm_lets_running_requests_end() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |_| {});
    let mut sidecar = Setup::spawning(2, &model).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    for rank in 0..2 {
        let request = NewRequest::new(format!("r{rank}"), 200).to(rank);
        frontend.server().add(&request).unwrap();
    }
    frontend
        .server()
        .until("first tokens", SOON, |server| {
            server.requests().values().all(|request| !request.tokens.is_empty())
        })
        .unwrap();
    sidecar.signal(Signal::SIGTERM);
    for rank in 0..2 {
        let id = format!("r{rank}");
        let done = frontend.server().await_request(&id, SOON).unwrap();
        assert_eq!((done.tokens.len(), done.finish), (200, Some(1)), "{id}");
    }
    let status = sidecar.await_end();
    assert!(exited_with(status, 0), "{status}");
    sidecar.await_nothing_left();
}

#[test]
fn the_end_of_the_lifeline_stops_everything() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut sidecar = Setup::spawning(1, &model).lifeline().start();
    sidecar.await_admitted();
    sidecar.cut_lifeline();
    let status = sidecar.await_end();
    assert!(exited_with(status, 0) || exited_with(status, 7), "{status}");
    sidecar.await_nothing_left();
}

pub(crate) fn http(port: &str, body: &str) -> Option<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(format!("127.0.0.1:{port}")).ok()?;
    write!(stream, "POST /v1/completions HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).ok()?;
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.1 200").then_some(answer)
}
