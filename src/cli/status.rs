//! `sidecar status`, for people and as JSON. Nothing is said by colour alone.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use super::args::StatusArgs;
use super::client::{ANSWER_LIMIT, call, print_json, run};
use super::table::Table;
use crate::admin::client::{AdminClient, ClientError, unexpected};
use crate::api::{
    Command, EngineStatus, FrontendStatus, NodeStatus, ReportStatus, Response, Status, UpdateReport,
};
use crate::driver::handles::GroupKind;
use crate::exit_code;
use crate::gpu::GpuReport;
use crate::peer::introduction::ranks_text;

/// Between two pictures of `--watch`.
const PERIOD: Duration = Duration::from_secs(1);
/// Clears a terminal and puts the cursor into its corner.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

/// `sidecar status`.
pub(super) fn status(args: &StatusArgs) -> u8 {
    run(async {
        if args.watch {
            return watch(args).await;
        }
        match call(&args.target, Command::Status, ANSWER_LIMIT).await? {
            Response::Status(status) => {
                if args.json {
                    print_json(&status);
                } else {
                    print!("{}", render(&status));
                }
                Ok(exit_code::OK)
            }
            other => Err(unexpected(&other)),
        }
    })
}

async fn watch(args: &StatusArgs) -> Result<u8, ClientError> {
    let mut client = AdminClient::connect(&args.target.state_dir()).await?;
    let mut ticks = tokio::time::interval(PERIOD);
    let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = tokio::signal::ctrl_c() => return Ok(exit_code::OK),
        }
        match client.call(Command::Status, ANSWER_LIMIT).await? {
            Response::Status(status) => {
                let mut stdout = std::io::stdout().lock();
                let picture = format!("{clear}{}", render(&status));
                // A closed pipe (`| head`) is the end, not a failure.
                if stdout.write_all(picture.as_bytes()).is_err() || stdout.flush().is_err() {
                    return Ok(exit_code::OK);
                }
            }
            other => return Err(unexpected(&other)),
        }
    }
}

/// The whole picture.
pub(super) fn render(status: &Status) -> String {
    let sidecar = &status.sidecar;
    let deployment = &status.deployment;
    let kind = match deployment.kind {
        GroupKind::Independent => "dense, independent ranks",
        GroupKind::Lockstep => "moe, lockstep ranks",
    };
    let mut text = format!(
        "sidecar {}  {}  pid {}  keeper {}  up {}\n",
        sidecar.version,
        sidecar.state,
        sidecar.pid,
        sidecar.keeper_pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string()),
        duration(sidecar.uptime_s)
    );
    text.push_str(&format!(
        "ranks {} to {} of {}  {kind}{}\n",
        deployment.start_rank,
        deployment.start_rank + deployment.size_local.max(1) - 1,
        deployment.size,
        deployment.model.as_ref().map_or_else(String::new, |model| format!("  {model}"))
    ));
    if let Some(http) = &deployment.http {
        text.push_str(&format!("frontend of this sidecar at http://{http}\n"));
    }
    if let Some(leader) = &status.leader {
        text.push_str(&format!(
            "leader {}  {} for {}  {}\n",
            leader.address,
            if leader.up { "up" } else { "DOWN" },
            duration(leader.since_s),
            leader.state
        ));
    }
    if let Some(missing) = &status.missing {
        text.push_str(&format!("waiting for the nodes of {missing}\n"));
    }
    text.push_str(&weights(status));
    if let Some(holder) = &status.controller.holder {
        text.push_str(&format!("controlled by {holder}\n"));
    }
    if status.controller.paused {
        text.push_str("the engines are PAUSED\n");
    }
    if deployment.kind == GroupKind::Lockstep {
        text.push_str(&format!(
            "wave {}  {}\n",
            status.coordinator.wave,
            if status.coordinator.running { "running" } else { "idle" }
        ));
    }
    if !status.nodes.is_empty() {
        text.push_str("\nnodes\n");
        text.push_str(&nodes(&status.nodes));
    }
    text.push_str("\nengines\n");
    text.push_str(&engines(&status.engines));
    text.push_str("\nfrontends\n");
    text.push_str(&frontends(&status.frontends));
    text.push_str("\ndevices\n");
    text.push_str(&gpus(&status.gpus));
    text
}

fn weights(status: &Status) -> String {
    let weights = &status.weights;
    let from = weights.dir.as_ref().map_or_else(String::new, |dir| format!(" from {dir}"));
    let mut text = format!("weights {}{from}\n", weights.version);
    if let Some(update) = &weights.last_update {
        text.push_str(&format!("last update {}\n", update_line(update)));
    }
    text
}

/// An update in one line.
pub(super) fn update_line(report: &UpdateReport) -> String {
    let outcome = match report.status {
        ReportStatus::Committed => "committed",
        ReportStatus::Refused => "REFUSED, no engine was touched",
        ReportStatus::RolledBack => "ROLLED BACK to the previous weights",
        ReportStatus::Degraded => "DEGRADED",
    };
    let mut text = format!(
        "{}: {outcome}, {} -> {}, {:.1} s, engines paused {:.2} s",
        report.id, report.previous, report.version, report.total_s, report.paused_s
    );
    if !report.fenced.is_empty() {
        let ranks: Vec<String> = report.fenced.iter().map(ToString::to_string).collect();
        text.push_str(&format!(", fenced ranks {}", ranks.join(" ")));
    }
    if let Some(reason) = &report.reason {
        text.push_str(&format!("\n  because {reason}"));
    }
    text
}

fn nodes(nodes: &[NodeStatus]) -> String {
    let mut table = Table::new(&["ranks", "host", "address", "link", ">for", ">rtt", "detail"]);
    for node in nodes {
        let rtt = node.rtt_us.map(|us| format!("{us} us"));
        table.row(vec![
            ranks_text(node.start_rank, node.size_local),
            node.host.clone(),
            optional(node.address.as_ref()),
            node.link.clone(),
            optional(node.since_s.map(duration)),
            optional(rtt),
            node.detail.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

fn engines(engines: &[EngineStatus]) -> String {
    if engines.is_empty() {
        return "  none\n".to_owned();
    }
    let mut table = Table::new(&[
        ">rank",
        "state",
        ">pid",
        "vllm",
        "weights",
        ">waiting",
        ">running",
        ">kv",
        ">in flight",
        ">held",
        ">restarts",
    ]);
    for engine in engines {
        table.row(vec![
            engine.rank.to_string(),
            engine.state.clone(),
            optional(engine.pid),
            optional(engine.vllm_version.as_ref()),
            optional(engine.weight_version.as_ref()),
            engine.waiting.to_string(),
            engine.running.to_string(),
            format!("{:.0}%", engine.kv_cache_usage * 100.0),
            engine.in_flight.to_string(),
            engine.held.to_string(),
            engine.restarts.to_string(),
        ]);
    }
    let mut text = table.render();
    for engine in engines {
        if let Some(error) = &engine.last_error {
            // Of an engine that serves again it is history; log lines in it are indented.
            let error = error.replace('\n', "\n    ");
            text.push_str(&format!("  rank {}, last failure: {error}\n", engine.rank));
        }
    }
    text
}

/// The table of frontends.
pub(super) fn frontends(frontends: &[FrontendStatus]) -> String {
    if frontends.is_empty() {
        return "  none\n".to_owned();
    }
    let mut table = Table::new(&["address", "state", ">slots", ">in flight", ">attached", "detail"]);
    for frontend in frontends {
        let attachment = &frontend.attachment;
        table.row(vec![
            attachment.address.clone(),
            attachment.state.clone(),
            attachment.api_servers.to_string(),
            frontend.in_flight.to_string(),
            format!("{}x", attachment.attachments),
            attachment.detail.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

fn gpus(report: &GpuReport) -> String {
    if report.devices.is_empty() {
        let reason = report.reason.as_deref().unwrap_or("no devices");
        return format!("  none ({reason})\n");
    }
    let mut table =
        Table::new(&[">index", "name", "uuid", ">memory", ">use", ">temp", ">ecc errors", "pids"]);
    for device in &report.devices {
        let memory = match (device.memory_used, device.memory_total) {
            (Some(used), Some(total)) => format!("{:.1} / {:.1} GiB", gib(used), gib(total)),
            (None, Some(total)) => format!("{:.1} GiB", gib(total)),
            _ => "-".to_owned(),
        };
        let pids: Option<Vec<String>> = device
            .processes
            .as_ref()
            .map(|list| list.iter().map(|process| process.pid.to_string()).collect());
        table.row(vec![
            device.index.to_string(),
            optional(device.name.as_ref()),
            optional(device.uuid.as_ref()),
            memory,
            device.utilization.map_or_else(|| "-".to_owned(), |percent| format!("{percent}%")),
            device.temperature.map_or_else(|| "-".to_owned(), |degrees| format!("{degrees} C")),
            optional(device.ecc_uncorrected),
            pids.map_or_else(|| "-".to_owned(), |pids| pids.join(" ")),
        ]);
    }
    let driver =
        report.driver_version.as_ref().map_or_else(String::new, |version| format!("  driver {version}\n"));
    format!("{driver}{}", table.render())
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

fn optional(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}
