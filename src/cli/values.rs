//! How flags spell the values of types that know nothing of the command line.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use dp_sidecar_protocol::machine::weight_update::PauseMode;

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
