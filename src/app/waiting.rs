//! What clients are told while the sidecar waits for other nodes.

use tokio::sync::{mpsc, watch};

use super::Run;
use super::runtime::{asked, ended_by};
use super::status::deployment;
use crate::api::{AdminCommand, AdminError, Command, ErrorKind, Response, SidecarStatus, Status};
use crate::exit_code::{self, RunEnd};
use crate::shutdown::Asked;

/// A status without engines.
pub(super) fn status(run: &Run, state: &str) -> Status {
    let config = &run.config;
    Status {
        sidecar: SidecarStatus {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: run.began.elapsed().as_secs(),
            state: state.to_owned(),
            state_dir: config.state_dir.display().to_string(),
            ..SidecarStatus::default()
        },
        deployment: deployment(config),
        ..Status::default()
    }
}

/// Does `work`, and answers clients meanwhile with `look` and `why_not`; a stop from outside, or by a client, ends it.
pub(super) async fn serve_while<T>(
    work: impl Future<Output = T>,
    admin: &mut mpsc::Receiver<AdminCommand>,
    outside: &mut watch::Receiver<Asked>,
    look: impl Fn() -> Status,
    why_not: &str,
) -> Result<T, RunEnd> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            why = asked(outside) => return Err(ended_by(why)),
            done = &mut work => return Ok(done),
            command = admin.recv() => match command {
                Some(AdminCommand { command: Command::Status, reply }) => {
                    reply.send(Ok(Response::Status(Box::new(look()))));
                }
                Some(AdminCommand { command: Command::Stop, reply }) => {
                    reply.send(Ok(Response::Done));
                    return Err(RunEnd::new(exit_code::OK, "stop command"));
                }
                Some(AdminCommand { reply, .. }) => {
                    reply.send(Err(AdminError::new(ErrorKind::Unavailable, why_not)));
                }
                None => return Err(RunEnd::new(exit_code::INTERNAL, "the admin server has ended")),
            },
        }
    }
}
