//! `sidecar update`: begins an update, follows or ends the one that runs, lists those that have ended.

use std::path::{Path, PathBuf};

use dp_sidecar_protocol::machine::weight_update::Renames;
use dp_sidecar_protocol::{UpdateId, WeightVersion};

use super::args::UpdateArgs;
use super::client::{print_json, print_line, run};
use super::progress::View;
use super::status::{optional, update_line};
use super::table::table;
use super::values::Source;
use crate::admin::client::{AdminClient, ClientError, unexpected};
use crate::api::{
    AdapterChange, Command, ErrorKind, ReportStatus, Response, UpdateReport, UpdateRequest, UpdateSource,
};
use crate::duration::millis;
use crate::exit_code;

/// Where an update that is to be followed is looked for when it has ended.
const SEARCHED: usize = 1000;

/// `sidecar update`.
pub(super) fn update(args: &UpdateArgs) -> u8 {
    let command = match command(args) {
        Ok(command) => command,
        Err(problem) => {
            eprintln!("error: {problem}");
            return exit_code::USAGE;
        }
    };
    let state_dir = args.target.state_dir();
    run(async {
        match command {
            Command::UpdateAbort => {
                AdminClient::connect(&state_dir).await?.call(Command::UpdateAbort).await?;
                Ok(exit_code::OK)
            }
            Command::UpdateHistory { limit } => {
                let reports = history(&state_dir, limit).await?;
                if args.json {
                    print_json(&reports);
                } else {
                    print!("{}", listed(&reports));
                }
                Ok(exit_code::OK)
            }
            command => follow(args, &state_dir, command).await,
        }
    })
}

fn command(args: &UpdateArgs) -> Result<Command, String> {
    if args.abort {
        return Ok(Command::UpdateAbort);
    }
    if let Some(limit) = args.history {
        return Ok(Command::UpdateHistory { limit });
    }
    if let Some(id) = &args.follow {
        return Ok(Command::UpdateFollow { id: id.clone().map(UpdateId) });
    }
    let absolute = |path: &PathBuf| match std::path::absolute(path) {
        Ok(path) if path.to_str().is_none() => Err(format!("--path {}: not UTF-8", path.display())),
        Ok(path) => Ok(path),
        Err(error) => Err(format!("--path {}: {error}", path.display())),
    };
    let (source, upload) = match &args.source {
        Source::Path(source) => (*source, None),
        Source::Upload(id) => (UpdateSource::default(), Some(id.clone())),
    };
    let removed = args.remove_lora.iter().map(|name| AdapterChange { name: name.clone(), path: None });
    let mut rename = Renames::default();
    for (from, to) in args.rename.iter().cloned() {
        rename.insert(from, to);
    }
    let request = UpdateRequest {
        rename,
        path: args.path.as_ref().map(absolute).transpose()?,
        upload,
        source,
        adapters: args.lora.iter().cloned().chain(removed).collect(),
        retain: args.retain,
        version: args.version.clone().map(WeightVersion),
        mode: args.mode,
        pause_deadline_ms: args.pause_deadline.map(millis),
        from_version: args.from_version.clone().map(WeightVersion),
        id: args.id.clone().map(UpdateId),
        allow_no_rollback: args.allow_no_rollback,
        allow_stale_kv: args.allow_stale_kv,
        strict_dtype: args.strict_dtype,
    };
    request.check()?;
    Ok(Command::Update(request))
}

async fn follow(args: &UpdateArgs, state_dir: &Path, command: Command) -> Result<u8, ClientError> {
    let wanted = match &command {
        Command::UpdateFollow { id } => id.clone(),
        _ => None,
    };
    let mut client = AdminClient::connect(state_dir).await?;
    let mut view = View::new(args.events);
    let report = client.update(command, |step| view.show(&step)).await;
    view.end();
    let report = match (report, wanted) {
        // It may have ended before.
        (Err(ClientError::Refused(error)), Some(id)) if error.kind == ErrorKind::Unavailable => {
            let ended = history(state_dir, SEARCHED).await?.into_iter().rfind(|report| report.id == id);
            ended.ok_or(ClientError::Refused(error))?
        }
        (report, _) => report?,
    };
    if args.events {
        print_line(&report);
    } else if args.json {
        print_json(&report);
    } else if report.status == ReportStatus::Committed {
        println!("{}", update_line(&report));
    } else {
        eprintln!("error: {}", update_line(&report));
    }
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(code_of(&report))
}

async fn history(state_dir: &Path, limit: usize) -> Result<Vec<UpdateReport>, ClientError> {
    let mut client = AdminClient::connect(state_dir).await?;
    match client.call(Command::UpdateHistory { limit }).await? {
        Response::Updates(reports) => Ok(reports),
        other => Err(unexpected(&other)),
    }
}

/// A line per update, and below it one per engine.
fn listed(reports: &[UpdateReport]) -> String {
    let mut text = String::new();
    for report in reports {
        text.push_str(&update_line(report));
        text.push('\n');
        let engines = report.engines.iter().map(|(rank, of)| {
            [
                rank.to_string(),
                of.state.to_string(),
                optional(of.pause_ms),
                optional(of.load_ms),
                optional(of.rollback_ms),
                of.errors.join("; "),
            ]
        });
        if engines.len() > 0 {
            let columns = [">rank", "state", ">pause ms", ">load ms", ">rollback ms", "errors"];
            text.push_str(&table(columns, engines));
        }
    }
    text
}

fn code_of(report: &UpdateReport) -> u8 {
    match report.status {
        ReportStatus::Committed => exit_code::OK,
        ReportStatus::Refused => exit_code::UPDATE_REFUSED,
        ReportStatus::RolledBack => exit_code::UPDATE_ROLLED_BACK,
        ReportStatus::Degraded => exit_code::UPDATE_DEGRADED,
    }
}
