//! The small subcommands that talk to a running sidecar.

use std::time::Duration;

use super::args::{DrainArgs, FrontendAction, FrontendArgs, PauseArgs, StopArgs, Target, VersionArgs};
use super::client::{call, print_json, run};
use super::status;
use crate::admin::client::{AdminClient, unexpected};
use crate::api::{Command, RelayVersion, Response, Status};
use crate::duration::millis;
use crate::exit_code;
use crate::state_dir;

/// Between two looks at what a drain or a stop waits for.
const PERIOD: Duration = Duration::from_millis(250);

fn done(target: &Target, command: Command, text: &str) -> u8 {
    run(async {
        match call(target, command).await? {
            Response::Done => {
                println!("{text}");
                Ok(exit_code::OK)
            }
            other => Err(unexpected(&other)),
        }
    })
}

/// `sidecar pause`.
pub(super) fn pause(args: &PauseArgs) -> u8 {
    let command = Command::Pause { mode: args.mode, deadline_ms: args.pause_deadline.map(millis) };
    done(&args.target, command, "all engines are paused")
}

/// `sidecar resume`.
pub(super) fn resume(target: &Target) -> u8 {
    done(target, Command::Resume, "all engines are resumed")
}

/// `sidecar drain`.
pub(super) fn drain(args: &DrainArgs) -> u8 {
    run(async {
        let mut client = AdminClient::connect(&args.target.state_dir()).await?;
        match client.call(Command::Drain).await? {
            Response::Done => println!("new requests are held until `sidecar resume`"),
            other => return Err(unexpected(&other)),
        }
        let until = tokio::time::Instant::now() + args.limit;
        let mut told = None;
        loop {
            let status = client.status().await?;
            let running: u64 = status.engines.iter().map(|engine| engine.in_flight).sum();
            let held: u64 = status.engines.iter().map(|engine| engine.held).sum();
            if told != Some((running, held)) {
                println!("{running} running, {held} held");
                told = Some((running, held));
            }
            if running == 0 {
                return Ok(exit_code::OK);
            }
            if tokio::time::Instant::now() >= until {
                eprintln!(
                    "error: drain: timed out after {:?}, {running} requests still running; new ones stay held",
                    args.limit
                );
                return Ok(exit_code::TIMEOUT);
            }
            tokio::time::sleep(PERIOD).await;
        }
    })
}

/// `sidecar stop`.
pub(super) fn stop(args: &StopArgs) -> u8 {
    if args.no_wait {
        return done(&args.target, Command::Stop, "the sidecar stops");
    }
    run(async {
        let path = args.target.state_dir();
        let mut client = AdminClient::connect(&path).await?;
        match client.call(Command::Stop).await? {
            Response::Done => {}
            other => return Err(unexpected(&other)),
        }
        let mut told = String::new();
        // Each look has a limit, and the sidecar has one for each of its steps.
        while let Ok(status) = client.status().await {
            let waits = waits_for(&status);
            if told != waits {
                println!("{waits}");
                told = waits;
            }
            tokio::time::sleep(PERIOD).await;
        }
        while let Some(pid) = state_dir::holder(&path) {
            let waits = format!("waiting for the sidecar, pid {pid}, to end");
            if told != waits {
                println!("{waits}");
                told = waits;
            }
            tokio::time::sleep(PERIOD).await;
        }
        println!("the sidecar has stopped");
        Ok(exit_code::OK)
    })
}

/// What a sidecar that stops still waits for.
fn waits_for(status: &Status) -> String {
    let running: u64 = status.engines.iter().map(|engine| engine.in_flight).sum();
    let engines: Vec<String> = status
        .engines
        .iter()
        .filter(|engine| !matches!(engine.state.as_str(), "stopped" | "failed"))
        .map(|engine| engine.rank.to_string())
        .collect();
    match (running, &engines[..]) {
        (0, []) => "waiting for the processes to end".to_owned(),
        (0, _) => format!("waiting for the engines of ranks {}", engines.join(" ")),
        _ => format!("waiting for {running} running requests"),
    }
}

/// `sidecar version`.
pub(super) fn version(args: &VersionArgs) -> u8 {
    let command = env!("CARGO_PKG_VERSION");
    if !args.json {
        println!("command   {command}");
    }
    run(async {
        let answer = call(&args.target, Command::Version).await;
        if args.json {
            let mut all = serde_json::json!({ "command": command });
            if let (Ok(Response::Version(report)), Some(all)) = (&answer, all.as_object_mut()) {
                all.insert("running".to_owned(), serde_json::json!(report));
            }
            print_json(&all);
        }
        match answer? {
            Response::Version(_) if args.json => Ok(exit_code::OK),
            Response::Version(report) => {
                println!("sidecar   {}", report.sidecar);
                for (rank, relay) in &report.relays {
                    match relay {
                        RelayVersion::Version(version) => println!("relay {rank:<3} {version}"),
                        RelayVersion::Unknown(why) => println!("relay {rank:<3} unknown: {why}"),
                    }
                }
                for (rank, version) in &report.vllm {
                    println!("engine {rank:<2} vLLM {version}");
                }
                println!("weights   {}", report.weights);
                Ok(exit_code::OK)
            }
            other => Err(unexpected(&other)),
        }
    })
}

/// `sidecar frontend`.
pub(super) fn frontend(args: &FrontendArgs) -> u8 {
    match &args.action {
        FrontendAction::Add { address, target } => done(
            target,
            Command::FrontendAdd { address: address.clone() },
            &format!("will attach to frontend {address} when it is reachable; see `sidecar frontend list`"),
        ),
        FrontendAction::Remove { address, target } => done(
            target,
            Command::FrontendRemove { address: address.clone() },
            &format!("frontend {address} is removed"),
        ),
        FrontendAction::List { json, target } => run(async {
            match call(target, Command::FrontendList).await? {
                Response::Frontends(list) => {
                    if *json {
                        print_json(&list);
                    } else {
                        print!("{}", status::frontends(&list));
                    }
                    Ok(exit_code::OK)
                }
                other => Err(unexpected(&other)),
            }
        }),
    }
}
