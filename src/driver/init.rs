//! What the node task tells an engine at INIT, and checks about it.

use std::net::{Ipv4Addr, TcpListener};

use bytes::Bytes;
use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::handshake::{Addresses, GroupPorts, Init};
use dp_sidecar_protocol::layout::{Layout, UnknownVersion, VllmVersion};
use dp_sidecar_protocol::machine::restart::RestartPolicy;
use dp_sidecar_protocol::registration::{DetectError, EngineReadyResponse, detect_layout};

use super::handles::{GroupKind, SlotAddresses};
use crate::config::Config;
use crate::supervisor::keeper::wire::ExitReport;

/// Ports given to a lockstep group. vLLM takes them from the end of the list: the engine cores'
/// gloo store first, the workers' world store second, more only when one is taken
/// (`vllm/config/parallel.py` 0.32.0, `get_next_dp_init_port`).
const GROUP_PORTS: usize = 5;

/// When engines are started again, by `--max-restarts`.
pub(super) fn restart_policy(config: &Config) -> RestartPolicy {
    RestartPolicy { budget: config.max_restarts, ..RestartPolicy::default() }
}

/// Field positions of the engine's version, or why it cannot be used.
pub(super) fn layout_of(registration: &[u8], allow_untested: bool) -> Result<Layout, String> {
    match detect_layout(registration, None) {
        Ok(detected) => Ok(detected.layout),
        Err(DetectError::Unknown(UnknownVersion(version))) if allow_untested => Ok(Layout::closest(version)),
        Err(error) => Err(error.to_string()),
    }
}

/// A dense engine (0.14.1 and later) reports one rank, a lockstep engine the whole group: a model kind
/// that was guessed wrongly shows here, before it can hang a group.
pub(super) fn check_kind(
    kind: GroupKind,
    size: u16,
    rank: EngineIndex,
    response: &EngineReadyResponse,
) -> Result<(), String> {
    let Some(reported) = response.data_parallel_size else {
        return Ok(());
    };
    if size < 2 {
        return Ok(());
    }
    let expected = match kind {
        GroupKind::Independent => 1,
        GroupKind::Lockstep => u64::from(size),
    };
    if reported == expected {
        return Ok(());
    }
    Err(format!(
        "registration of engine {rank}: data_parallel_size is {reported}, expected {expected} for a {} model; \
         see --model-kind",
        kind.model()
    ))
}

/// The INIT payload of an engine: its sockets, and for lockstep groups where the ranks meet.
pub(super) fn encode(
    config: &Config,
    slots: SlotAddresses,
    coordinator: (String, String),
    ports: &[u16],
) -> Bytes {
    let addresses = Addresses {
        inputs: slots.inputs,
        outputs: slots.outputs,
        coordinator_input: Some(coordinator.0),
        coordinator_output: Some(coordinator.1),
        frontend_stats_publish_address: None,
    };
    let init = match (config.kind, ports.split_first()) {
        (GroupKind::Lockstep, Some((&master_port, list))) => {
            let group = GroupPorts {
                master_ip: config.group_address.to_string(),
                master_port,
                ports: list.to_vec(),
                size: config.size,
            };
            // The version is not known before the engine registers. INIT of this line is right for
            // all: from 0.32.0 on it would also carry `_coord_store_port`, whose default is the same 0.
            let any = Layout::closest(VllmVersion::new(0, 31, 0));
            Init::lockstep(addresses, &group, &any)
        }
        _ => Init::independent(addresses),
    };
    init.encode()
}

/// Ports that are free on this node and outside the range the kernel hands out, so that no client
/// socket takes one before the group binds it.
pub(super) fn free_ports() -> Result<Vec<u16>, String> {
    const LOWEST: u16 = 20_000;
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let ephemeral: u16 = range.split_whitespace().next().and_then(|s| s.parse().ok()).unwrap_or(32_768);
    let span = u32::from(ephemeral.saturating_sub(LOWEST)).max(1_000);
    let seed = uuid::Uuid::new_v4().as_u128();
    let mut ports = Vec::with_capacity(GROUP_PORTS);
    for step in 0..span {
        let offset = (seed % u128::from(span)) as u32;
        let Ok(port) = u16::try_from(u32::from(LOWEST) + (offset + step) % span) else {
            continue;
        };
        // Bound on all interfaces, as torch's TCPStore will.
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            ports.push(port);
            if ports.len() == GROUP_PORTS {
                return Ok(ports);
            }
        }
    }
    Err(format!(
        "only {} free ports from {LOWEST} on, {GROUP_PORTS} needed for the group's stores",
        ports.len()
    ))
}

/// Exit status and last log lines of a child, for people.
pub(super) fn describe_exit(report: &ExitReport) -> String {
    let lines = report.last_lines.len().min(20);
    let tail = &report.last_lines[report.last_lines.len() - lines..];
    if tail.is_empty() {
        format!("{} (pid {}), no output", report.status, report.pid)
    } else {
        format!("{} (pid {}); its last lines:\n  {}", report.status, report.pid, tail.join("\n  "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_are_distinct_and_can_be_bound() {
        let ports = free_ports().unwrap();
        assert_eq!(ports.len(), GROUP_PORTS);
        for &port in &ports {
            assert!(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok(), "{port}");
        }
        let distinct: std::collections::BTreeSet<u16> = ports.iter().copied().collect();
        assert_eq!(distinct.len(), ports.len());
    }
}
