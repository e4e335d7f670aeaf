//! How flags spell the values of types that know nothing of the command line.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use dp_sidecar_protocol::GroupKind;
use dp_sidecar_protocol::machine::weight_update::PauseMode;

use crate::api::{AdapterChange, UpdateSource};

/// What `--model-kind` says of the ranks; none: `auto`.
pub(super) type ModelKind = Option<GroupKind>;

/// Parser of `--model-kind`.
pub(super) fn model_kind() -> impl TypedValueParser<Value = ModelKind> {
    let auto = PossibleValue::new("auto").help("Look at the model's configuration");
    let kinds = GroupKind::ALL.map(|kind| {
        PossibleValue::new(kind.model()).help(match kind {
            GroupKind::Independent => "Ranks are independent",
            GroupKind::Lockstep => "Ranks step in lockstep",
        })
    });
    PossibleValuesParser::new([auto].into_iter().chain(kinds)).map(|text| text.parse().ok())
}

/// Parser of `--mode`. Says in the long help what each mode does.
pub(super) fn pause_mode() -> impl TypedValueParser<Value = PauseMode> {
    let values = PauseMode::ALL.map(|mode| {
        PossibleValue::new(mode.as_str()).help(match mode {
            PauseMode::Wait => "Let them finish; after the pause deadline they are aborted",
            PauseMode::Abort => "Abort them",
            PauseMode::Keep => {
                "Freeze them, and go on after the resume. Across an update this mixes weight versions inside one \
                 response"
            }
        })
    });
    PossibleValuesParser::new(values).try_map(|text| text.parse())
}

/// Where the bytes of an update come from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// From `--path`.
    Path(UpdateSource),
    /// From the upload of this id.
    Upload(String),
}

/// Reads `auto`, `shared`, `leader` or `upload:ID`.
pub(super) fn parse_source(text: &str) -> Result<Source, String> {
    match text {
        "auto" => Ok(Source::Path(UpdateSource::Auto)),
        "shared" => Ok(Source::Path(UpdateSource::Shared)),
        "leader" => Ok(Source::Path(UpdateSource::Leader)),
        _ => match text.strip_prefix("upload:") {
            Some(id) if !id.is_empty() => Ok(Source::Upload(id.to_owned())),
            _ => Err("expected auto, shared, leader or upload:ID".to_owned()),
        },
    }
}

/// Reads `NAME=DIR`; the directory becomes absolute.
pub(super) fn parse_lora(text: &str) -> Result<AdapterChange, String> {
    match text.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !dir.is_empty() => {
            let path = std::path::absolute(dir).map_err(|error| format!("{dir}: {error}"))?;
            Ok(AdapterChange { name: name.to_owned(), path: Some(path) })
        }
        _ => Err("expected NAME=DIR".to_owned()),
    }
}

/// Reads `FROM=TO`; one of them may be empty.
pub(super) fn parse_rename(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((from, to)) if from != to => Ok((from.to_owned(), to.to_owned())),
        _ => Err("expected FROM=TO, two prefixes of tensors' names".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, Command};

    #[test]
    fn every_pause_mode_has_a_spelling_for_flags_and_json_alike() {
        for mode in PauseMode::ALL {
            let command = Command::new("x").arg(Arg::new("mode").long("mode").value_parser(pause_mode()));
            let matches = command.try_get_matches_from(["x", "--mode", mode.as_str()]).unwrap();
            assert_eq!(matches.get_one("mode"), Some(&mode));
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.as_str());
            assert_eq!(mode.as_str().parse(), Ok(mode));
        }
        assert!("sleep".parse::<PauseMode>().is_err());
    }
}
