//! The `sidecar` program: reads the command line and hands over.

mod args;
mod build;
mod children;
mod client;
mod commands;
mod normalize;
mod progress;
mod run;
mod sleep;
mod status;
mod table;
mod update;
mod values;
mod variables;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::FromArgMatches;

use self::args::{Cli, Command};
use self::children::{KeeperArgs, RelayArgs};
use crate::config::LogFormat;
use crate::exit_code;
use crate::relay::Purpose;
use crate::relay::process;
use crate::supervisor::init;
use crate::supervisor::keeper::{self, KeeperConfig};
use crate::{tasks, telemetry};

/// Runs the command line; returns the exit code.
pub fn main() -> ExitCode {
    tasks::exit_on_panic(|reason| eprintln!("error: {reason}"));
    ExitCode::from(dispatch(std::env::args_os().skip(1)))
}

fn dispatch(args: impl Iterator<Item = OsString>) -> u8 {
    let args: Result<Vec<String>, OsString> = args.map(OsString::into_string).collect();
    let args = match args {
        Ok(args) => args,
        Err(arg) => return usage(&format!("{}: not UTF-8", arg.to_string_lossy())),
    };
    let args = match normalize::normalize(args) {
        Ok(args) => args,
        Err(problem) => return usage(&problem),
    };
    let program = std::iter::once("sidecar".to_owned());
    let ignored = variables::of_kubernetes(|name| std::env::var(name).ok());
    let parsed = variables::command_without(&ignored)
        .try_get_matches_from(program.chain(args))
        .and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Help and version come as errors, too; clap knows where each belongs.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(exit_code::USAGE);
        }
    };
    match cli.command {
        // No runtime and no other thread may exist in the keeper.
        Command::Keeper(args) => keeper(args),
        Command::Relay(args) => relay(args),
        // Before there are other threads or handlers of signals.
        Command::Run(_) if init::is_first() => first(),
        Command::Run(args) => match init::unblock_signals() {
            Ok(()) => run::run(&args, &run::origins(&matches), &ignored),
            Err(error) => failed(&format!("signals: {error}")),
        },
        Command::Update(args) => update::update(&args),
        Command::Status(args) => status::status(&args),
        Command::Pause(args) => commands::pause(&args),
        Command::Resume(target) => commands::resume(&target),
        Command::Sleep(args) => sleep::sleep(&args),
        Command::Wake(args) => sleep::wake(&args),
        Command::Version(args) => commands::version(&args),
        Command::Frontend(args) => commands::frontend(&args),
        Command::Drain(args) => commands::drain(&args),
        Command::Stop(args) => commands::stop(&args),
    }
}

fn usage(problem: &str) -> u8 {
    eprintln!("error: {problem}\n\nFor more information, try '--help'.");
    exit_code::USAGE
}

/// The sidecar, as a child of this process.
fn first() -> u8 {
    init::run().unwrap_or_else(|error| failed(&format!("pid 1 of this container: {error}")))
}

fn failed(problem: &str) -> u8 {
    eprintln!("error: {problem}");
    exit_code::INTERNAL
}

fn relay(args: RelayArgs) -> u8 {
    telemetry::init(LogFormat::Text);
    let ranks = args.start_rank..args.start_rank.saturating_add(args.ranks);
    let RelayArgs { frontend_slots, kind, limits, .. } = args;
    let purpose = Purpose { ranks, frontend_slots, kind, limits };
    match process::run(&args.state_dir, &purpose) {
        Ok(()) => exit_code::OK,
        Err(error) => {
            tracing::error!(%error, "the relay process failed");
            exit_code::INTERNAL
        }
    }
}

fn keeper(args: KeeperArgs) -> u8 {
    telemetry::init(LogFormat::Text);
    let KeeperArgs { state_dir, run_id, orphan_grace, kill_grace } = args;
    let config = KeeperConfig { state_dir, orphan_grace, kill_grace, run_id };
    match keeper::run(config) {
        Ok(()) => exit_code::OK,
        Err(error) => {
            tracing::error!(%error, "the keeper failed");
            exit_code::INTERNAL
        }
    }
}
