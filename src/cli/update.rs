//! `sidecar update`: begins an update, follows or ends the one that runs, lists those that have ended.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use dp_sidecar_protocol::machine::weight_update::PauseMode;

use super::args::{Target, parse_duration};
use super::commands::run;
use super::progress::View;
use super::status::{print_json, update_line};
use super::table::Table;
use super::values::pause_mode;
use crate::admin::client::{AdminClient, ClientError, unexpected};
use crate::admin::types::{Command, ErrorKind, Response, UpdateReport, UpdateRequest, UpdateStatus};
use crate::driver::handles::Retain;
use crate::driver::weight_update::{AdapterChange, UpdateSource, state_words};
use crate::exit_code;
use crate::supervisor::keeper::wire::millis;

/// For answers that need no engine.
const ANSWER: Duration = Duration::from_secs(15);
/// Where an update that is to be followed is looked for when it has ended.
const SEARCHED: usize = 1000;

/// `sidecar update`.
#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// Directory of the new checkpoint (safetensors).
    #[arg(long, value_name = "DIR", required_unless_present_any = ["source", "lora", "remove_lora", "abort", "follow", "history"])]
    pub path: Option<PathBuf>,
    /// Where it is read: `shared` (each node reads the directory itself), `leader` (the leader reads it and passes it
    /// on), `auto` (shared if all nodes see the same files there), or `upload:ID`, what a trainer has uploaded.
    #[arg(long, value_parser = parse_source, default_value = "auto", value_name = "WHERE")]
    pub source: UpdateSource,
    /// Where the version that is replaced is kept, for the way back.
    #[arg(long, value_enum, default_value_t)]
    pub retain: Retain,
    /// Add or replace a LoRA adapter: a directory that the leader can read. May be given several times.
    #[arg(long, value_parser = parse_lora, value_name = "NAME=DIR")]
    pub lora: Vec<AdapterChange>,
    /// Remove a LoRA adapter. May be given several times.
    #[arg(long, value_name = "NAME")]
    pub remove_lora: Vec<String>,
    /// Version to stamp on the responses; made from the directory's name and the id if absent.
    #[arg(long, value_name = "V")]
    pub version: Option<String>,
    /// What happens to running requests.
    #[arg(long, value_parser = pause_mode(), default_value_t)]
    pub mode: PauseMode,
    /// With `wait`: abort what still runs after this long. [default: as the sidecar was started]
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub pause_deadline: Option<Duration>,
    /// Refuse unless the engines hold this version now.
    #[arg(long, value_name = "V")]
    pub from_version: Option<String>,
    /// Go on although there is no way back: neither memory nor a directory holds the current weights any more.
    #[arg(long)]
    pub allow_no_rollback: bool,
    /// Name of the transaction, for logs and repeats.
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
    /// End the update that runs, if it is not past its commit point.
    #[arg(long, conflicts_with_all = ["path", "follow", "history"])]
    pub abort: bool,
    /// Follow the update that runs (of this id) to its end.
    #[arg(long, value_name = "ID", num_args = 0..=1, conflicts_with_all = ["path", "history"])]
    pub follow: Option<Option<String>>,
    /// List the last updates with the times of every engine.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "10", conflicts_with = "path")]
    pub history: Option<usize>,
    /// Print the final report as one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
    /// Print each event as a line of JSON on stdout, and the report as the last line.
    #[arg(long, conflicts_with = "json")]
    pub events: bool,
    /// Which sidecar.
    #[command(flatten)]
    pub target: Target,
}

fn parse_source(text: &str) -> Result<UpdateSource, String> {
    match text {
        "auto" => Ok(UpdateSource::Auto),
        "shared" => Ok(UpdateSource::Shared),
        "leader" => Ok(UpdateSource::Leader),
        _ => match text.strip_prefix("upload:") {
            Some(id) if !id.is_empty() => Ok(UpdateSource::Upload(id.to_owned())),
            _ => Err("expected auto, shared, leader or upload:ID".to_owned()),
        },
    }
}

fn parse_lora(text: &str) -> Result<AdapterChange, String> {
    match text.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !dir.is_empty() => {
            let path = std::path::absolute(dir).map_err(|error| format!("{dir}: {error}"))?;
            Ok(AdapterChange { name: name.to_owned(), path: Some(path) })
        }
        _ => Err("expected NAME=DIR".to_owned()),
    }
}

/// `sidecar update`.
pub fn update(args: &UpdateArgs) -> u8 {
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
                AdminClient::connect(&state_dir).await?.call(Command::UpdateAbort, ANSWER).await?;
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
        return Ok(Command::UpdateFollow { id: id.clone() });
    }
    let is_upload = matches!(args.source, UpdateSource::Upload(_));
    let path = match &args.path {
        Some(path) if is_upload => return Err(format!("--path {}: the source is an upload", path.display())),
        Some(path) => std::path::absolute(path).map_err(|e| format!("--path {}: {e}", path.display()))?,
        None if is_upload || !(args.lora.is_empty() && args.remove_lora.is_empty()) => PathBuf::new(),
        None => return Err("--path DIR is missing".to_owned()),
    };
    let path = path.to_str().ok_or_else(|| format!("--path {}: not UTF-8", path.display()))?;
    let removed = args.remove_lora.iter().map(|name| AdapterChange { name: name.clone(), path: None });
    Ok(Command::Update(UpdateRequest {
        path: path.to_owned(),
        source: args.source.clone(),
        adapters: args.lora.iter().cloned().chain(removed).collect(),
        retain: args.retain,
        version: args.version.clone(),
        mode: args.mode,
        pause_deadline_ms: args.pause_deadline.map(millis),
        from_version: args.from_version.clone(),
        id: args.id.clone(),
        allow_no_rollback: args.allow_no_rollback,
    }))
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
        match serde_json::to_string(&report) {
            Ok(line) => println!("{line}"),
            Err(error) => eprintln!("error: {error}"),
        }
    } else if args.json {
        print_json(&report);
    } else if report.status == UpdateStatus::Committed {
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
    match client.call(Command::UpdateHistory { limit }, ANSWER).await? {
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
        let mut table = Table::new(&[">rank", "state", ">pause ms", ">load ms", ">rollback ms", "errors"]);
        let number = |ms: Option<u64>| ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string());
        for (rank, of) in &report.engines {
            table.row(vec![
                rank.to_string(),
                state_words(of.state).to_owned(),
                number(of.pause_ms),
                number(of.load_ms),
                number(of.rollback_ms),
                of.errors.join("; "),
            ]);
        }
        if !report.engines.is_empty() {
            text.push_str(&table.render());
        }
    }
    text
}

fn code_of(report: &UpdateReport) -> u8 {
    match report.status {
        UpdateStatus::Committed => exit_code::OK,
        UpdateStatus::Refused => exit_code::UPDATE_REFUSED,
        UpdateStatus::RolledBack => exit_code::UPDATE_ROLLED_BACK,
        UpdateStatus::Degraded => exit_code::UPDATE_DEGRADED,
    }
}
