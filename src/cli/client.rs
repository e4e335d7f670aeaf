//! What the subcommands share that talk to a running sidecar.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::args::Target;
use super::build::{self, Surroundings};
use crate::admin::client::{AdminClient, ClientError};
use crate::api::{Command, ErrorKind, Response};
use crate::config::LogFormat;
use crate::exit_code;
use crate::supervisor::environment;
use crate::telemetry;

/// How long a simple answer may take.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(15);

impl Target {
    /// The state directory that is meant.
    pub(super) fn state_dir(&self) -> PathBuf {
        let surroundings = Surroundings {
            variables: environment::own(),
            nvml_count: 0,
            exe: PathBuf::new(),
            cwd: std::env::current_dir().ok(),
        };
        build::state_dir(self.state_dir.as_deref(), self.dp_rank, &surroundings)
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
pub(super) async fn call(
    target: &Target,
    command: Command,
    limit: Duration,
) -> Result<Response, ClientError> {
    let mut client = AdminClient::connect(&target.state_dir()).await?;
    client.call(command, limit).await
}

/// Prints a value as indented JSON.
pub(super) fn print_json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("error: {error}"),
    }
}
