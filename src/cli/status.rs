//! `sidecar status`, for people and as JSON. Nothing is said by colour alone.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::HumanBytes;

use super::args::StatusArgs;
use super::client::{print_json, run};
use super::table::table;
use crate::admin::client::{AdminClient, ClientError};
use crate::api::{EngineStatus, FrontendStatus, NodeStatus, ReportStatus, Status, UpdateReport};
use crate::exit_code;
use crate::gpu::{GpuDevice, GpuReport};
use crate::peer::hello::ranks_text;

/// Between two pictures of `--watch`.
const PERIOD: Duration = Duration::from_secs(1);
/// Clears a terminal and puts the cursor into its corner.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

/// `sidecar status`.
pub(super) fn status(args: &StatusArgs) -> u8 {
    run(async {
        let mut client = AdminClient::connect(&args.target.state_dir()).await?;
        if args.watch {
            return watch(&mut client).await;
        }
        let status = client.status().await?;
        if args.json {
            print_json(&status);
        } else {
            print!("{}", render(&status));
        }
        let failed = status.engines.iter().any(|engine| engine.state == "failed");
        Ok(if failed { exit_code::ENGINE_FAILED } else { exit_code::OK })
    })
}

async fn watch(client: &mut AdminClient) -> Result<u8, ClientError> {
    let mut ticks = tokio::time::interval(PERIOD);
    let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = tokio::signal::ctrl_c() => return Ok(exit_code::OK),
        }
        let picture = format!("{clear}{}", render(&client.status().await?));
        let mut stdout = std::io::stdout().lock();
        // A closed pipe (`| head`) is the end, not a failure.
        if stdout.write_all(picture.as_bytes()).is_err() || stdout.flush().is_err() {
            return Ok(exit_code::OK);
        }
    }
}

/// The whole picture.
pub(super) fn render(status: &Status) -> String {
    let sidecar = &status.sidecar;
    let deployment = &status.deployment;
    let kind = format!("{}, {} ranks", deployment.kind.model(), deployment.kind);
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
    if deployment.kind.is_lockstep() {
        text.push_str(&format!(
            "wave {}  {}\n",
            status.coordinator.wave,
            if status.coordinator.running { "running" } else { "idle" }
        ));
    }
    if !status.nodes.is_empty() {
        text.push_str(&format!("\nnodes\n{}", nodes(&status.nodes)));
    }
    let (engines, frontends) = (engines(&status.engines), frontends(&status.frontends));
    text + &format!("\nengines\n{engines}\nfrontends\n{frontends}\ndevices\n{}", gpus(&status.gpus))
}

fn weights(status: &Status) -> String {
    let weights = &status.weights;
    let from = weights.dir.as_ref().map_or_else(String::new, |dir| format!(" from {dir}"));
    let mut text = format!("weights {}{from}\n", weights.version);
    if !matches!(weights.updates.as_str(), "" | "possible") {
        text.push_str(&format!("updates {}\n", weights.updates));
    }
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
    if report.asleep {
        text.push_str(", still asleep");
    }
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
    let row = |node: &NodeStatus| {
        [
            ranks_text(node.start_rank, node.size_local),
            node.host.clone(),
            optional(node.address.as_ref()),
            node.link.clone(),
            optional(node.since_s.map(duration)),
            optional(node.rtt_us.map(|us| format!("{us} us"))),
            node.detail.clone().unwrap_or_default(),
        ]
    };
    table(["ranks", "host", "address", "link", ">for", ">rtt", "detail"], nodes.iter().map(row))
}

fn engines(engines: &[EngineStatus]) -> String {
    if engines.is_empty() {
        return "  none\n".to_owned();
    }
    let columns = [
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
    ];
    let row = |engine: &EngineStatus| {
        [
            engine.rank.to_string(),
            engine.state.clone(),
            optional(engine.pid),
            optional(engine.vllm_version.as_ref()),
            optional(engine.weight_version.as_ref()),
            engine.waiting.to_string(),
            engine.running.to_string(),
            format!("{:.0}%", engine.kv_cache_usage * 100.0),
            engine.in_flight.to_string(),
            match engine.held {
                0 => "0".to_owned(),
                held => format!("{held} ({})", HumanBytes(engine.held_bytes)),
            },
            engine.restarts.to_string(),
        ]
    };
    let mut text = table(columns, engines.iter().map(row));
    for engine in engines {
        if !engine.asleep.is_empty() {
            text.push_str(&format!("  rank {} SLEEPS: {}\n", engine.rank, engine.asleep.join(", ")));
        }
        if engine.without_weights {
            text.push_str(&format!(
                "  rank {} has NO WEIGHTS since a sleep of level 2, and holds new requests until others are loaded\n",
                engine.rank
            ));
        }
        if let Some(reason) = &engine.last_refusal {
            let (rank, refused) = (engine.rank, engine.refused);
            text.push_str(&format!(
                "  rank {rank}, {refused} messages of frontends refused, the last: {reason}\n"
            ));
        }
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
    let row = |frontend: &FrontendStatus| {
        let attachment = &frontend.attachment;
        [
            attachment.address.clone(),
            attachment.state.clone(),
            attachment.api_servers.to_string(),
            frontend.in_flight.to_string(),
            format!("{}x", attachment.attachments),
            attachment.detail.clone().unwrap_or_default(),
        ]
    };
    table(["address", "state", ">slots", ">in flight", ">attached", "detail"], frontends.iter().map(row))
}

fn gpus(report: &GpuReport) -> String {
    if report.devices.is_empty() {
        let reason = report.reason.as_deref().unwrap_or("no devices");
        return format!("  none ({reason})\n");
    }
    let row = |device: &GpuDevice| {
        let memory = match (device.memory_used, device.memory_total) {
            (Some(used), Some(total)) => format!("{:.1} / {:.1} GiB", gib(used), gib(total)),
            (None, Some(total)) => format!("{:.1} GiB", gib(total)),
            _ => "-".to_owned(),
        };
        let pids = device.processes.as_ref().map(|list| {
            let pids: Vec<String> = list.iter().map(|process| process.pid.to_string()).collect();
            pids.join(" ")
        });
        [
            device.index.to_string(),
            optional(device.name.as_ref()),
            optional(device.uuid.as_ref()),
            memory,
            optional(device.utilization.map(|percent| format!("{percent}%"))),
            optional(device.temperature.map(|degrees| format!("{degrees} C"))),
            optional(device.ecc_uncorrected),
            optional(pids),
        ]
    };
    let columns = [">index", "name", "uuid", ">memory", ">use", ">temp", ">ecc errors", "pids"];
    let driver = report.driver_version.as_ref().map(|version| format!("  driver {version}\n"));
    driver.unwrap_or_default() + &table(columns, report.devices.iter().map(row))
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// What is not known is a dash.
pub(super) fn optional(value: Option<impl ToString>) -> String {
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
