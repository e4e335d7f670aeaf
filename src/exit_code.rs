//! Exit codes of the `sidecar` program. They are part of its interface.

/// Clean end, a requested stop included.
pub const OK: u8 = 0;
/// A internal error of the sidecar.
pub const INTERNAL: u8 = 1;
/// Wrong usage or configuration.
pub const USAGE: u8 = 2;
/// A check before the start failed.
pub const PREFLIGHT: u8 = 3;
/// The ranks cannot be placed on the nodes (used by the planner).
pub const NO_PLACEMENT: u8 = 4;
/// Something took longer than its limit: start, shutdown, an answer.
pub const TIMEOUT: u8 = 5;
/// An engine or the supervised frontend ended or cannot be kept alive.
pub const ENGINE_FAILED: u8 = 6;
/// A fault of a peer, or the end of the lifeline, aborted the group.
pub const PEER_OR_LIFELINE: u8 = 7;
/// A port, address or state directory is in use.
pub const IN_USE: u8 = 8;
/// Nodes of one deployment are configured differently.
pub const MISMATCH: u8 = 9;
/// Update refused before any engine was touched: the directory is invalid or a precondition does
/// not hold.
pub const UPDATE_REFUSED: u8 = 10;
/// Update failed; all engines are back at the previous weights.
pub const UPDATE_ROLLED_BACK: u8 = 11;
/// Update failed and at least one engine is fenced.
pub const UPDATE_DEGRADED: u8 = 12;
/// Another controller (a running update, a frontend's pause) holds the engines.
pub const BUSY: u8 = 13;
/// No sidecar answers on the admin socket.
pub const NOT_RUNNING: u8 = 14;
/// The sidecar runs but refused the command or failed to do it.
pub const COMMAND_FAILED: u8 = 15;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunEnd {
    /// One of the codes of this module.
    pub code: u8,
    /// Why, in one line.
    pub reason: String,
    /// What was started goes on without the sidecar (`--keep-engines`).
    pub keeps_engines: bool,
}

impl RunEnd {
    /// An end with this code.
    pub fn new(code: u8, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into(), keeps_engines: false }
    }
}

/// A signal forced the end.
pub const fn signal(number: u8) -> u8 {
    128 + number
}

/// All codes with their meaning, for `--help`.
pub const TABLE: &[(u8, &str)] = &[
    (OK, "clean exit, including a requested stop"),
    (INTERNAL, "internal error of the sidecar"),
    (USAGE, "usage or configuration error"),
    (PREFLIGHT, "a startup check failed"),
    (NO_PLACEMENT, "ranks cannot be placed"),
    (TIMEOUT, "a time limit was exceeded"),
    (ENGINE_FAILED, "an engine or the frontend exited and could not be restarted"),
    (PEER_OR_LIFELINE, "a peer or the lifeline ended the group"),
    (IN_USE, "port, address or state directory in use"),
    (MISMATCH, "nodes are configured differently"),
    (UPDATE_REFUSED, "update refused, no engine was touched"),
    (UPDATE_ROLLED_BACK, "update failed, all engines hold the previous weights"),
    (UPDATE_DEGRADED, "update failed, at least one engine is fenced"),
    (BUSY, "another controller holds the engines"),
    (NOT_RUNNING, "no sidecar is running"),
    (COMMAND_FAILED, "the sidecar refused the command"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_explains_every_code_that_a_run_or_an_update_can_end_with() {
        let readme = include_str!("../README.md");
        let codes: Vec<&str> =
            readme.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next()).collect();
        // The code of the planner is not given yet.
        for (code, meaning) in TABLE.iter().filter(|(code, _)| *code != NO_PLACEMENT) {
            let named = codes.iter().any(|cell| cell.split(", ").any(|one| one == code.to_string()));
            assert!(named, "README does not explain exit code {code}: {meaning}");
        }
    }
}
