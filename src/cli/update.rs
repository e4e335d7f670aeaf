//! `sidecar update`: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::args::UpdateArgs;
use super::commands::run;
use super::status::{print_json, update_line};
use crate::admin::client::AdminClient;
use crate::admin::types::{UpdateProgress, UpdateReport, UpdateRequest, UpdateStatus};
use crate::exit_code;
use crate::supervisor::keeper::wire::millis;

/// `sidecar update`.
pub fn update(args: &UpdateArgs) -> u8 {
    let path = match std::path::absolute(&args.path) {
        Ok(path) => path,
        Err(error) => {
            eprintln!("error: --path {}: {error}", args.path.display());
            return exit_code::USAGE;
        }
    };
    let Some(path) = path.to_str() else {
        eprintln!("error: --path {}: not UTF-8", path.display());
        return exit_code::USAGE;
    };
    let request = UpdateRequest {
        path: path.to_owned(),
        version: args.version.clone(),
        mode: args.mode,
        pause_deadline_ms: args.pause_deadline.map(millis),
        from_version: args.from_version.clone(),
        id: args.id.clone(),
        allow_no_rollback: args.allow_no_rollback,
    };
    run(async {
        let mut client = AdminClient::connect(&args.target.state_dir()).await?;
        let mut view = View::new();
        let report = client.update(request, |step| view.show(&step)).await;
        view.end();
        let report = report?;
        if args.json {
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
    })
}

fn code_of(report: &UpdateReport) -> u8 {
    match report.status {
        UpdateStatus::Committed => exit_code::OK,
        UpdateStatus::Refused => exit_code::UPDATE_REFUSED,
        UpdateStatus::RolledBack => exit_code::UPDATE_ROLLED_BACK,
        UpdateStatus::Degraded => exit_code::UPDATE_DEGRADED,
    }
}

/// How progress is shown.
struct View {
    bar: Option<ProgressBar>,
    last: Option<UpdateProgress>,
}

impl View {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, last: None }
    }

    fn show(&mut self, step: &UpdateProgress) {
        // A repetition only says that the sidecar lives.
        if self.last.as_ref() == Some(step) {
            return;
        }
        let new_phase = self.last.as_ref().is_none_or(|last| last.phase != step.phase);
        match &self.bar {
            Some(bar) => {
                let sized = |step: &UpdateProgress| step.total > 0;
                if new_phase || self.last.as_ref().map(sized) != Some(sized(step)) {
                    bar.set_style(style(step));
                }
                if new_phase {
                    bar.reset_elapsed();
                    bar.set_prefix(step.phase.clone());
                }
                if step.total > 0 {
                    bar.set_length(step.total);
                }
                bar.set_position(step.done);
                bar.set_message(step.message.clone());
            }
            // Not every byte count gets a line, every phase and message does.
            None => {
                let new_text = self.last.as_ref().is_none_or(|last| last.message != step.message);
                if new_phase || new_text {
                    eprintln!("{}: {}{}", step.phase, step.message, share(step));
                }
            }
        }
        self.last = Some(step.clone());
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn share(step: &UpdateProgress) -> String {
    if step.total == 0 { String::new() } else { format!(" ({} of {})", step.done, step.total) }
}

fn style(step: &UpdateProgress) -> ProgressStyle {
    let template = match (step.total, step.phase.as_str()) {
        (0, _) => "{spinner} {prefix}  {msg}  {elapsed}",
        (_, "staging") => "{spinner} {prefix}  [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}  {msg}",
        _ => "{spinner} {prefix}  [{bar:30}] {pos} of {len}  {msg}  {elapsed}",
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
        .progress_chars("=> ")
}
