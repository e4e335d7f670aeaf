//! What the subcommands share that talk to a running sidecar.

use std::future::Future;
use std::path::PathBuf;

use serde::Serialize;

use super::args::Target;
use super::build::Environment;
use crate::admin::client::{AdminClient, ClientError};
use crate::api::{Command, ErrorKind, Response};
use crate::config::LogFormat;
use crate::exit_code;
use crate::telemetry;

impl Target {
    /// The state directory that is meant.
    pub(super) fn state_dir(&self) -> PathBuf {
        Environment::own(0).state_dir(self.state_dir.as_deref(), self.dp_rank)
    }
}

/// Runs a subcommand: a runtime, and the exit code of its error.
pub(super) fn run(work: impl Future<Output = Result<u8, ClientError>>) -> u8 {
    telemetry::init(LogFormat::Text);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: runtime: {error}");
            return exit_code::INTERNAL;
        }
    };
    match runtime.block_on(work) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            code_of(&error)
        }
    }
}

/// The exit code that says what went wrong.
fn code_of(error: &ClientError) -> u8 {
    match error {
        ClientError::NotRunning { .. } => exit_code::NOT_RUNNING,
        ClientError::Deadline(_) => exit_code::TIMEOUT,
        ClientError::Broken(_) => exit_code::COMMAND_FAILED,
        ClientError::Refused(error) => match error.kind {
            ErrorKind::Busy => exit_code::BUSY,
            ErrorKind::Invalid => exit_code::USAGE,
            ErrorKind::Timeout => exit_code::TIMEOUT,
            ErrorKind::Unavailable | ErrorKind::Failed => exit_code::COMMAND_FAILED,
        },
    }
}

/// One command, one answer.
pub(super) async fn call(target: &Target, command: Command) -> Result<Response, ClientError> {
    AdminClient::connect(&target.state_dir()).await?.call(command).await
}

/// Prints a value as indented JSON.
pub(super) fn print_json(value: &impl Serialize) {
    print(serde_json::to_string_pretty(value));
}

/// Prints a value as a line of JSON.
pub(super) fn print_line(value: &impl Serialize) {
    print(serde_json::to_string(value));
}

fn print(json: serde_json::Result<String>) {
    match json {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("error: {error}"),
    }
}
