//! Processes around the fakes: signals, `vllm serve --headless`, exit status.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use serde_json::json;
use zmq::Context;

use crate::Reporter;
use crate::argv::ServeCommand;
use crate::engine::{EngineOptions, FakeEngine, Faults};
use crate::frontend::{FakeFrontend, FrontendOptions, http};

/// How many fake engines share one ZMQ context: libzmq allows 1023 sockets in one.
const ENGINES_PER_CONTEXT: usize = 24;

/// Delivers SIGTERM and SIGINT to a channel. Call it before any other thread is started.
pub fn signals() -> mpsc::Receiver<Signal> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    // Blocking cannot fail for a valid set.
    let _ = set.thread_block();
    let (sender, receiver) = mpsc::channel();
    let _ = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        while let Ok(signal) = set.wait() {
            if sender.send(signal).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Options of the engines of this process that come by environment, for `fake-vllm`: the command
/// line is vLLM's, and what makes it a fake must get past whoever builds it.
///
/// `FAKE_VLLM_VERSION`, `FAKE_VLLM_FAULTS`, `FAKE_VLLM_CONTROL`, `FAKE_VLLM_STEP_MS`,
/// `FAKE_VLLM_TOKENS`, `FAKE_VLLM_LOAD_MS`, `FAKE_VLLM_START_MS`, `FAKE_VLLM_HASH`, `FAKE_VLLM_MOE`.
pub fn options_from_environment(command: &ServeCommand, rank: u16) -> Result<EngineOptions, String> {
    let variable = |name: &str| std::env::var(name).ok();
    let number = |name: &str| {
        variable(name).map(|text| text.parse::<u64>().map_err(|error| format!("{name}: {error}"))).transpose()
    };
    let defaults = EngineOptions::default();
    let time =
        |name: &str, default: Duration| Ok::<_, String>(number(name)?.map_or(default, Duration::from_millis));
    Ok(EngineOptions {
        rank,
        size: command.size,
        moe: variable("FAKE_VLLM_MOE").map_or_else(|| command.moe(), |text| text == "1"),
        version: variable("FAKE_VLLM_VERSION").map_or(Ok(defaults.version), |text| text.parse())?,
        handshake: command.handshake(),
        model: command.model.clone(),
        tokens: number("FAKE_VLLM_TOKENS")?
            .and_then(|tokens| u32::try_from(tokens).ok())
            .unwrap_or(defaults.tokens),
        step: time("FAKE_VLLM_STEP_MS", defaults.step)?,
        load: time("FAKE_VLLM_LOAD_MS", defaults.load)?,
        start: time("FAKE_VLLM_START_MS", defaults.start)?,
        parallel_config_hash: variable("FAKE_VLLM_HASH").unwrap_or(defaults.parallel_config_hash),
        faults: Faults::for_rank(&variable("FAKE_VLLM_FAULTS").unwrap_or_default(), rank)?,
        control: variable("FAKE_VLLM_CONTROL").map(PathBuf::from),
        ..EngineOptions::default()
    })
}

/// Runs engines until one ends or a signal comes; the others are ended then, as vLLM's launcher
/// does.
pub fn run_engines(
    all: Vec<EngineOptions>,
    reporter: &Reporter,
    signals: &mpsc::Receiver<Signal>,
) -> ExitCode {
    let mut engines = Vec::new();
    for chunk in all.chunks(ENGINES_PER_CONTEXT) {
        let context = Context::new();
        for options in chunk {
            match FakeEngine::spawn_in(&context, options.clone(), reporter.clone()) {
                Ok(engine) => engines.push(engine),
                Err(error) => {
                    reporter.report("cannot_start", json!({"error": error.to_string()}));
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    let mut signalled = false;
    while !engines.iter().any(FakeEngine::ended) {
        match signals.recv_timeout(Duration::from_millis(20)) {
            Ok(signal) => {
                reporter.report("signal", json!({"signal": signal.as_str()}));
                signalled = true;
                break;
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    let mut code = 0;
    for engine in &engines {
        engine.terminate();
    }
    for engine in &mut engines {
        let end = match engine.wait(Duration::from_secs(2)) {
            Some(end) => end,
            None => engine.kill(),
        };
        code = code.max(end.exit_code());
    }
    if signalled {
        return ExitCode::SUCCESS;
    }
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// Runs the same command again as a child and waits for it: vLLM's launcher and engine core are two
/// processes, and who stops the one must not forget the other.
pub fn run_as_launcher(reporter: &Reporter, signals: &mpsc::Receiver<Signal>) -> ExitCode {
    let child = std::env::current_exe().and_then(|program| {
        Command::new(program).args(std::env::args_os().skip(1)).env("FAKE_VLLM_ROLE", "engine-core").spawn()
    });
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            reporter.report("cannot_start", json!({"error": error.to_string()}));
            return ExitCode::FAILURE;
        }
    };
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                reporter.report("engine_core_exited", json!({"status": status.to_string()}));
                let code = status.code().and_then(|code| u8::try_from(code).ok());
                return ExitCode::from(code.unwrap_or(1));
            }
            Ok(None) => {}
            Err(error) => {
                reporter.report("cannot_wait", json!({"error": error.to_string()}));
                return ExitCode::FAILURE;
            }
        }
        if let Ok(signal) = signals.recv_timeout(Duration::from_millis(20))
            && let Ok(pid) = i32::try_from(child.id())
        {
            // The child may have ended meanwhile.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
    }
}

/// Plays `vllm serve MODEL --data-parallel-size-local 0`: handshake, then HTTP, until a signal comes.
pub fn run_frontend(
    command: &ServeCommand,
    reporter: &Reporter,
    signals: &mpsc::Receiver<Signal>,
) -> Result<(), String> {
    let like = options_from_environment(command, 0)?;
    let mut frontend = FakeFrontend::bind(
        FrontendOptions {
            size: command.size,
            address: command.handshake(),
            api_servers: usize::from(command.api_servers),
            moe: like.moe,
            version: like.version,
            parallel_config_hash: like.parallel_config_hash,
            named_inputs: None,
        },
        reporter.clone(),
    )
    .map_err(|error| format!("handshake address {}: {error}", command.handshake()))?;
    reporter.report("listening", json!({"address": frontend.address()}));
    // vLLM waits without end; a signal must still end it.
    let slice = Duration::from_millis(200);
    while let Err(error) = frontend.startup(slice) {
        if signals.try_recv().is_ok() {
            return Ok(());
        }
        if !matches!(error, crate::frontend::FrontendError::Timeout { .. }) {
            return Err(error.to_string());
        }
    }
    let host = command.host.as_deref().unwrap_or("127.0.0.1");
    let listener = std::net::TcpListener::bind((host, command.port))
        .map_err(|error| format!("{host}:{}: {error}", command.port))?;
    reporter.report("serving", json!({"host": host, "port": command.port}));
    let model = command.model.as_ref().map_or_else(String::new, |model| model.display().to_string());
    let stopped = || signals.try_recv().is_ok();
    http::serve(&mut frontend, listener, &model, &stopped).map_err(|error| error.to_string())
}
