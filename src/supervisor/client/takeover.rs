//! Taking over a living keeper, with its children, from a sidecar that ended.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use tokio::time::timeout;

use super::launch;
use super::{ClientTask, INTRODUCTION_LIMIT, Inherited, KeeperOptions, Known, Link, SHUTDOWN_MARGIN};
use crate::duration::millis;
use crate::files;
use crate::supervisor::keeper::wire::{Answer, FromKeeper, KeeperEvent, Request, ToKeeper};

/// File of the state directory that names the deployment its keeper works for.
pub(super) const CONFIGURATION_FILE: &str = "configuration";

/// Notes which deployment a fresh keeper works for.
pub(super) fn remember(options: &KeeperOptions) -> Result<(), String> {
    files::replace(&options.state_dir, CONFIGURATION_FILE, format!("{}\n", options.configuration).as_bytes())
        .map_err(|error| format!("{CONFIGURATION_FILE}: {error}"))
}

fn remembered(state_dir: &Path) -> Option<String> {
    let text = fs::read_to_string(state_dir.join(CONFIGURATION_FILE)).ok()?;
    Some(text.trim().to_owned())
}

impl ClientTask {
    /// Takes over a living keeper that works for the same deployment. `None`: there is none, or it is to be
    /// retired.
    pub(super) async fn take_over(&mut self) -> Option<(Link, Inherited)> {
        let options = &self.options;
        let mut link = Link::new(launch::connect(&options.state_dir).await?);
        if remembered(&options.state_dir).as_deref() != Some(options.configuration.as_str()) {
            tracing::warn!(
                "the options of the deployment have changed: stopping what the previous sidecar left running"
            );
            return None;
        }
        let request = Request::TakeOver {
            orphan_grace_ms: millis(options.orphan_grace),
            kill_grace_ms: millis(options.kill_grace),
        };
        let (pid, children, exits) = match link.exchange(request, INTRODUCTION_LIMIT).await {
            Ok(Answer::Inventory { pid, run_id, children, exits }) if run_id == options.run_id => {
                (pid, children, exits)
            }
            other => {
                tracing::warn!(answer = ?other, "the keeper of an earlier sidecar cannot be taken over");
                return None;
            }
        };
        for child in &children {
            let known = Known { incarnation: child.incarnation, pid: child.pid };
            self.children.insert(child.name.clone(), known);
        }
        let (kept, unwanted): (Vec<_>, Vec<_>) =
            children.into_iter().partition(|child| self.options.keep.contains(&child.name));
        let unwanted = unwanted.into_iter().map(|child| child.name).collect();
        if let Err(problem) = self.stop_unwanted(&mut link, unwanted).await {
            tracing::warn!(problem, "the keeper of an earlier sidecar cannot be taken over");
            self.children.clear();
            self.backlog.clear();
            return None;
        }
        let names: Vec<&str> = kept.iter().map(|child| child.name.as_str()).collect();
        tracing::info!(pid, children = names.join(", "), "keeper taken over");
        self.pid.send_replace(Some(pid));
        Some((link, Inherited { children: kept, exits }))
    }

    /// Stops children that nobody wants any more and waits until they are gone.
    async fn stop_unwanted(&mut self, link: &mut Link, mut names: BTreeSet<String>) -> Result<(), String> {
        let grace = self.options.kill_grace;
        for name in &names {
            tracing::info!(name, "no longer needed: stopped");
            let request = Request::Stop { name: name.clone(), grace_ms: millis(grace) };
            link.send(&ToKeeper { seq: 0, request }).await?;
        }
        let gone = async {
            while !names.is_empty() {
                match link.receive().await? {
                    FromKeeper::Event { event: KeeperEvent::Exited(report) }
                        if names.remove(&report.name) =>
                    {
                        self.children.remove(&report.name);
                    }
                    message => self.take(link, message),
                }
            }
            Ok(())
        };
        let limit = grace + SHUTDOWN_MARGIN;
        match timeout(limit, gone).await {
            Ok(result) => result,
            Err(_) => Err(format!("{names:?} did not end within {limit:?}")),
        }
    }
}
