//! `sidecar sleep` and `sidecar wake`.

use super::args::{SleepArgs, Target, WakeArgs};
use super::client::{call, print_json, run};
use crate::admin::client::unexpected;
use crate::api::{Command, Response, SleepReport};
use crate::duration::millis;
use crate::exit_code;

/// `sidecar sleep`.
pub(super) fn sleep(args: &SleepArgs) -> u8 {
    let deadline_ms = args.pause_deadline.map(millis);
    ask(&args.target, Command::Sleep { level: args.level, mode: args.mode, deadline_ms }, args.json)
}

/// `sidecar wake`.
pub(super) fn wake(args: &WakeArgs) -> u8 {
    ask(&args.target, Command::Wake { tags: args.tag.clone() }, args.json)
}

fn ask(target: &Target, command: Command, json: bool) -> u8 {
    run(async {
        match call(target, command).await? {
            Response::Sleep(report) => {
                if json {
                    print_json(&report);
                } else {
                    print!("{}", describe(&report));
                }
                for engine in &report.engines {
                    if let Some(error) = &engine.error {
                        eprintln!("error: rank {}: {error}", engine.rank);
                    }
                }
                Ok(if report.is_whole() { exit_code::OK } else { exit_code::COMMAND_FAILED })
            }
            other => Err(unexpected(&other)),
        }
    })
}

fn describe(report: &SleepReport) -> String {
    let mut text = String::new();
    for engine in &report.engines {
        let state = match (&engine.error, engine.asleep.is_empty()) {
            (Some(_), _) => "FAILED".to_owned(),
            (None, true) => "awake".to_owned(),
            (None, false) => format!("asleep: {}", engine.asleep.join(", ")),
        };
        let weights = if engine.without_weights { ", without weights" } else { "" };
        text.push_str(&format!("rank {} {state}{weights}\n", engine.rank));
    }
    let next = if report.engines.iter().any(|engine| engine.without_weights) {
        let asleep = report.engines.iter().any(|engine| engine.asleep.iter().any(|tag| tag == "weights"));
        match asleep {
            true => "next: `sidecar wake --tag weights`, then `sidecar update`, then `sidecar wake`",
            false => "next: `sidecar update`, then `sidecar wake`",
        }
    } else if report.engines.iter().any(|engine| !engine.asleep.is_empty()) {
        "next: `sidecar wake`"
    } else if report.paused {
        "the engines are paused: `sidecar resume`"
    } else {
        "the engines serve"
    };
    text + &format!("weights {}\n{next}\n", report.version)
}
