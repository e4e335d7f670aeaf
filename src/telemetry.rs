//! Logs, to stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::config::LogFormat;

/// What is logged unless `RUST_LOG` says otherwise.
pub const DEFAULT_FILTER: &str = "warn,zeromq=error,dp_sidecar=info";

/// Starts logging. Does nothing when it was started before.
pub fn init(format: LogFormat) {
    let filter = std::env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty());
    let builder = EnvFilter::builder().with_default_directive(LevelFilter::WARN.into());
    let (filter, problem) = match builder.parse(filter.as_deref().unwrap_or(DEFAULT_FILTER)) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(DEFAULT_FILTER), Some(error)),
    };
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => subscriber.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => subscriber.json().flatten_event(true).try_init(),
    };
    if started.is_ok()
        && let Some(error) = problem
    {
        tracing::warn!(%error, "RUST_LOG cannot be read; {DEFAULT_FILTER} is used");
    }
}
